"""Numbers for videos: how near they are to the truth, how well their camera follows, and what each idea is worth.

    python evaluate.py results_a results_b --truth videos --out table.md
    python evaluate.py --protocol davis33 --data DAVIS --ablation --out davis.md
    python evaluate.py --mini --scenes 20 --seeds 3 --out runs/mini.md     # the miniature's own table
    python evaluate.py --few-shot 0 1 3 5 7 --out runs/fewshot.md          # LoRAs of so many clips

It writes a Markdown table and, beside it, the numbers of every video as json and a page that plays the worst and the
best. What is under way is kept in a folder beside the table, so that the same words go on after an interruption;
`--part i/N` takes every N-th scene or case.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from evaluation.ablation import REFERENCE, ways
from evaluation.compare import STRIDE, Pair, Protocol, find_videos, match, read_video
from evaluation.make import Maker
from evaluation.page import make_page
from evaluation.protocols import PROTOCOLS, Case, check_path, describe_case, find_path, read_cases
from evaluation.quality import Perceptual, libraries
from evaluation.table import Rows, column, markdown, mean_error, means, title
from files.checkpoint import read_json
from files.cli import Parser, existing, parse_size, run_program
from files.draw import draw_means, save_png
from files.machine import allow_tf32, choose_products, network_dtype, use_device
from files.settings import part_of
from files.writing import check_apart, fingerprint, replacing
from geometry.camera import WINDOW
from geometry.pi3x import Pi3X, find_pi3x, load_pi3x
from helios.index import check_weights, read_index
from helios.load import MEMORY, ROOT, files_read
from helios.taehv import find_taehv
from job import Settings, load_settings
from mini.fewshot import MOST, describe_loras, train_loras
from mini.judge import ESTIMATED, Trial, held_out, judge
from wah import model_options

Show = Callable[[str], dict[str, np.ndarray]]  # the videos of a name by their labels
POSES = {".txt", ".json", ".npz", ".npy", ".csv", ".tum", ".traj", ".log"}  # file names of camera paths


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate.py", "Measure videos.", Settings())
    parser.add_argument("results", type=Path, nargs="*", help="folders of videos, or single ones")
    parser.add_argument("--truth", type=Path, help="the true videos, by the same names")
    parser.add_argument("--poses", type=Path, help="the true camera paths (default: what Pi3X sees in the truth)")
    parser.add_argument("--masks", type=Path, help="masks of what is visible, for numbers of these pixels alone")
    parser.add_argument("--mini", action="store_true", help="the miniature's table, on scenes that it never saw")
    parser.add_argument("--out", type=Path, default=Path("runs/table.md"), help="the table; other files lie beside it")
    parser.add_argument("--part", default="1/1", help="i/N: every N-th video, from the i-th on")
    group = parser.add_argument_group("a data set, whose videos are made and then measured")
    group.add_argument("--protocol", choices=PROTOCOLS, help="how a copy of it is laid out, and what is measured")
    group.add_argument("--data", type=Path, help="the folder of the copy")
    group.add_argument("--names", nargs="+", help="of its videos (default: all)")
    group.add_argument("--ablation", action="store_true", help="all rows of the paper's ablation, not the method alone")
    group = parser.add_argument_group("how it is measured")
    group.add_argument("--frames", type=int, default=WINDOW, help="the first ones (default: 33)")
    group.add_argument("--size", help="HEIGHTxWIDTH (default: that of the first results; of videos that are made the"
                                       " model's own)")
    group.add_argument("--stretch", action="store_true", help="to that size, instead of cropping around the middle")
    group.add_argument("--lpips", choices=("on", "off"), default="on")
    group.add_argument("--geometry", type=Path, help="Pi3X weights, for cameras (default: beside --weights)")
    group.add_argument("--device", default="cpu", help="of Pi3X (default: cpu)")
    group = parser.add_argument_group("what makes the videos")
    group.add_argument("--weights", type=Path, default=ROOT / "mini", help="a folder in the official layout")
    group.add_argument("--memory", default="full", choices=MEMORY, help="as sample.py's (docs/memory.md)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--lora", type=Path, nargs="*", help="files; all rows for the first, the full method for others"
                                                            " (default: lora.safetensors of the weights, if any)")
    group = parser.add_argument_group("the miniature")
    group.add_argument("--few-shot", type=int, nargs="+", metavar="CLIPS", help="train LoRAs of so many clips (0: none)"
                                                                          " and compare them; --set is train.py's")
    group.add_argument("--scenes", type=int, default=20)
    group.add_argument("--seeds", type=int, default=3)
    group.add_argument("--found", type=int, nargs="+", default=[WINDOW // 2, WINDOW - 1],
                       help="frames whose camera is searched (default: 16 32)")
    group.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args(words)


def write(out: Path, head: list[str], rows: Rows, reference: str | None, shown: str, show: Show,
          more: str = "", also: dict | None = None) -> None:
    """The table, its numbers, and the page, of which `shown` is the row whose videos are ranked."""
    text = markdown(head, rows, reference) + more
    page = make_page(head, rows, reference, shown, show)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = outputs(out)
    with replacing(names) as files:
        files["table"].write_text(text, encoding="utf-8")
        numbers = {"head": head, "rows": rows} | (also or {})
        files["numbers"].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        files["page"].write_text(page, encoding="utf-8")
    print(f"{text}\nwrote", *names.values())


def outputs(out: Path) -> dict[str, Path]:
    return {"table": out, "numbers": out.with_suffix(".json"), "page": out.with_suffix(".html")}


# ------------------------------------------------------------------------------------------------- given videos


def find_network(args: argparse.Namespace) -> tuple[Callable[[], Pi3X] | None, str]:
    """Pi3X for cameras, read when it is needed and kept, and in words which, or why there is none."""
    file = find_pi3x(args.geometry, args.weights)
    if file is None:
        return None, "cameras not measured: no Pi3X (--geometry)"
    if args.geometry is None and read_index(args.weights).keyframes == 1:
        return None, "cameras not measured: the miniature's Pi3X does not know how two cameras stand to each other"
    use_device(args.device)
    load = cache(partial(load_pi3x, file, args.device, network_dtype(args.device)))
    return load, (f"cameras by {file}, of every {STRIDE}th frame, seen together; R-Err, T-Err: means over frames, after"
                  " the scale is aligned")


def open_lpips(choice: str) -> Perceptual | None:
    if choice == "off":
        return None
    print("LPIPS: torchvision fetches AlexNet's weights (233 MB) if they are not there yet")
    return Perceptual()


def pair_up(args: argparse.Namespace, protocol: Protocol) -> dict[str, dict[str, Pair]]:
    """Row -> name -> what is compared. Rows are the folders' names."""
    truths = {} if args.truth is None else find_videos(args.truth)
    names = list(truths or find_videos(args.results[0]))
    paths = {} if args.poses is None else match(args.poses, names, "the truth", POSES)
    masks = {} if args.masks is None else match(args.masks, names, "the truth")
    rows, sizes = {}, {}
    labels = [path.stem for path in args.results]
    for label, path in zip(labels if len({*labels}) == len(labels) else map(str, args.results), args.results):
        rows[label] = {}
        for name, video in match(path, names, str(args.truth or args.results[0])).items():
            sizes.setdefault(name, read_video(video, Protocol(1), protocol.size).shape[1:3])
            rows[label][name] = Pair(video, truths.get(name), protocol, sizes[name], paths.get(name), masks.get(name))
    return rows


def show_pairs(rows: dict[str, dict[str, Pair]]) -> Show:
    """The videos of a name, side by side: all results, the warp, the truth."""

    def show(name: str) -> dict[str, np.ndarray]:
        pairs = {label: replace(row[name]) for label, row in rows.items() if name in row}
        one = next(iter(pairs.values()))
        shown = {label: pair.frames for label, pair in pairs.items()}
        if one.warp is not None:
            shown["warp"] = read_video(one.warp, one.protocol, one.size)
        return shown if one.true_frames is None else shown | {"truth": one.true_frames}

    return show


def run_compare(args: argparse.Namespace) -> None:
    if args.truth is None and args.poses is None:
        raise ValueError("--truth: needed, or --poses, to measure anything against")
    if args.truth is None and args.masks is not None:
        raise ValueError("--masks: needs --truth, whose pixels they choose from")
    if not 1 <= args.frames <= 10**5:
        raise ValueError(f"--frames {args.frames}: expected a number from 1 to 100000")
    check_apart(outputs(args.out).values(), existing(*args.results, args.truth, args.poses, args.masks))
    protocol = Protocol(args.frames, None if args.size is None else parse_size(args.size), not args.stretch)
    pairs = pair_up(args, protocol)
    perceptual = open_lpips(args.lpips) if args.truth else None
    pi3x, words = find_network(args)
    rows = {label: {name: pair.numbers(perceptual, pi3x) for name, pair in row.items()}
            for label, row in pairs.items()}
    head = [*describe_measures(args, protocol, words), "nothing is drawn at random here; seeds are those of the videos"]
    first = next(iter(rows))
    write(args.out, head, rows, first, first, show_pairs(pairs))


def describe_measures(args: argparse.Namespace, protocol: Protocol, cameras: str) -> list[str]:
    against = [f"{what} {path}" for what, path in
               (("truth", args.truth), ("paths", args.poses), ("masks", args.masks)) if path is not None]
    return [", ".join(against), str(protocol), cameras,
            f"measured with {libraries(args.lpips == 'on')}" + (", LPIPS off" if args.lpips == "off" else ", AlexNet")]


# --------------------------------------------------------------------------------------------------------- data sets


def begin_folder(folder: Path, about: dict) -> None:
    """The folder of what is under way says what it depends on; ValueError if that was something else."""
    file, about = folder / "about.json", json.loads(json.dumps(about))  # as it is read back
    if file.is_file():
        found = read_json(file)
        other = [name for name in found | about if found.get(name) != about.get(name)]
        if other:
            raise ValueError(f"{file}: what is there was made with other words, videos, weights or LoRAs, it differs in"
                             f" {', '.join(other[:5])}; choose another --out, or remove {folder}")
        return
    if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder}: holds files, and no about.json that says what they depend on; choose another"
                         " --out, or move them")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing({"about": file}) as files:
        files["about"].write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def describe_videos(args: argparse.Namespace, cases: list[Case], given: dict[str, Path], maker: Maker,
                    settings: Settings) -> dict:
    """What they depend on; files by what they hold."""
    loras = [file for lora in args.lora for file in (lora, lora.with_name("adapter_config.json"))]
    geometry = existing(find_pi3x(args.geometry, args.weights), find_pi3x(settings.geometry, args.weights))
    return {
        "protocol": args.protocol, "words": maker.words[2:], "settings": maker.settings, "rows": [*maker.ways],
        "weights": fingerprint(args.weights, files_read(args.weights)), "loras": [*map(fingerprint, loras)],
        "geometry": [*map(fingerprint, geometry)],
        "taehv": None if settings.vae == "wan" else fingerprint(find_taehv(args.weights)),
        "names": [case.name for case in cases],
    } | {f"case {case.name}": describe_case(case, given.get(case.name)) for case in cases}


def open_maker(args: argparse.Namespace, cases: list[Case], given: dict[str, Path]) -> Maker:
    """Nothing is written before all words are checked."""
    for word in args.set:
        if (name := word.partition("=")[0]) in ("device", "seed"):
            raise ValueError(f"--set {word}: expected --{name} {word.partition('=')[2]}")
        if name in ("latents", "check") or name == "warp_fill" and args.ablation:
            raise ValueError(f"--set {word}: does nothing with --protocol, expected it with sample.py")
    every, fill = ways(args.lora), load_settings(argparse.Namespace(**vars(args), video=None)).warp_fill
    rows = every if args.ablation else {name: way for name, way in every.items() if name.startswith(f"full, {fill}")}
    if not rows:
        raise ValueError(f"--set warp_fill={fill}: expected smooth or mean, with --protocol")
    words = ["--weights", str(args.weights), "--seed", str(args.seed), "--memory", args.memory,
             *([] if args.size is None else ["--size", args.size])]
    maker = Maker(args.out.with_suffix(""), (*words,), (*args.set, f"device={args.device}"), rows,
                  tuple(dict.fromkeys(case.prompt for case in cases)))
    settings = maker.check(cases[0])
    allow_tf32(settings.tf32)
    begin_folder(maker.folder, describe_videos(args, cases, given, maker, settings))
    return maker


def draw_picture(case: Case, file: Path) -> None:
    """The first frame of a case's video."""
    assert case.video is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing({"picture": file}) as files:
        save_png(files["picture"], read_video(case.video, Protocol(1))[0])


def make_case(case: Case, maker: Maker, poses: Path | None, pi3x: Callable[[], Pi3X] | None) -> Path:
    """All rows of a case that are not there yet; returns its path."""
    frames = partial(read_video, case.video or Path(), Protocol())
    path, settings = find_path(case, poses, maker.folder / "paths", pi3x, frames)
    if not maker.picture(case).is_file():
        draw_picture(case, maker.picture(case))
    for row in maker.ways:
        if not maker.video(row, case.name).is_file():
            maker.make(case, path, settings, row)
            print(f"{case.name}: {row}", flush=True)
    return path


def run_protocol(args: argparse.Namespace) -> None:
    if args.data is None:
        raise ValueError("--data: the folder of your copy is needed")
    cases = read_cases(args.protocol, args.data, args.names)
    names = [case.name for case in cases]
    inputs = existing(args.data, args.poses, args.weights, args.geometry, *args.lora)
    check_apart([args.out.with_suffix(""), *outputs(args.out).values()], inputs)
    given = {} if args.poses is None else match(args.poses, names, f"--data {args.data}", POSES)
    pi3x, words = find_network(args)
    mine = cases[part_of(args.part)]
    for case in cases:
        check_path(case, given.get(case.name), pi3x)
    maker = open_maker(args, cases, given)
    paths = {case.name: make_case(case, maker, given.get(case.name), pi3x) for case in mine}
    there = sum(maker.video(row, name).is_file() for name in names for row in maker.ways)
    if there < len(names) * len(maker.ways):
        print(f"{there} of {len(names) * len(maker.ways)} videos are there; the table comes with the last")
        return
    paths |= {case.name: make_case(case, maker, given.get(case.name), pi3x) for case in cases if case.name not in paths}
    protocol = Protocol(10**5 if args.protocol == "wbench-nav" else WINDOW)
    pairs = {row: {case.name: Pair(maker.video(row, case.name), case.video, protocol, None, paths[case.name],
                                   maker.mask(case.name), case.actions, case.perspective)
                   for case in cases} for row in maker.ways}
    perceptual = open_lpips(args.lpips) if any(case.video for case in cases) else None
    rows = {row: {name: pair.numbers(perceptual, pi3x) for name, pair in each.items()} for row, each in pairs.items()}
    head = [f"{args.protocol}: {len(cases)} videos of {args.data}; {args.weights}, seed {args.seed}",
            "visible: what the warp shows", *describe_measures(args, protocol, words)[1:]]
    shown = next(row for row in rows if row.startswith("full"))
    write(args.out, head, rows, shown, shown, show_pairs(pairs))


# ----------------------------------------------------------------------------------------------------- the miniature


def side_by_side(work: Callable[[int], None], items: list[int], processes: int) -> Iterable[int]:
    """Each item as soon as it is done, in whatever order."""
    if processes == 1:
        for item in items:
            work(item)
            yield item
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), choose_products) as pool:  # as this process
        under_way = {pool.submit(work, item): item for item in items}
        try:
            for done in as_completed(under_way):
                done.result()
                yield under_way[done]
        finally:
            pool.shutdown(cancel_futures=True)


def check_numbers(args: argparse.Namespace) -> None:
    part_of(args.part)
    for name in ("scenes", "seeds", "processes"):
        if not 1 <= getattr(args, name) <= 10**4:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from 1 to 10000")
    if not all(0 < index < WINDOW for index in args.found):
        raise ValueError(f"--found {args.found}: expected frames from 1 to {WINDOW - 1}")


def run_trial(args: argparse.Namespace, trial: Trial) -> dict[int, dict] | None:
    """The scenes that are not measured yet; all of them, when all are there."""
    seeds = held_out(args.scenes, read_index(args.weights).size)
    there = {seed: trial.read(seed) for seed in seeds}
    wanted = [seed for seed in seeds[part_of(args.part)] if there[seed] is None]
    trial.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for number, seed in enumerate(side_by_side(partial(judge, trial=trial), wanted, args.processes), 1):
        print(f"scene {seed}: {number} of {len(wanted)}, {time.perf_counter() - begin:.0f} s", flush=True)
    there = {seed: found for seed in seeds if (found := trial.read(seed))}
    if len(there) < len(seeds):
        print(f"{len(there)} of {len(seeds)} scenes are there; the table comes with the last")
        return None
    return there


def describe_scenes(args: argparse.Namespace) -> list[str]:
    size = "x".join(map(str, read_index(args.weights).size))
    return [f"{args.scenes} held-out scenes of the miniature's world, {args.seeds} seeds from 0 on, whose numbers are"
            f" averaged before errors are taken; {size} pixels",
            "the 32 frames after the first, which is given; exact warps; ghost: the share of what the first frame does"
            " not show that is near its mean colour", f"measured with {libraries(False)}"]


def show_scene(trial: Trial, columns: dict[str, str], name: str) -> dict[str, np.ndarray]:
    """Videos of a scene by their labels, from the rows of the `columns`."""
    seed = int(name.removeprefix("scene-"))
    return {label: read_video(trial.video(row, seed), Protocol()) for label, row in columns.items()}


def run_few_shot(args: argparse.Namespace) -> None:
    """LoRAs of so many clips, trained, then measured beside one another: a table and a plot."""
    counts = sorted({*args.few_shot})
    if not (len(counts) > 1 and 0 <= counts[0] and counts[-1] <= MOST):
        raise ValueError(f"--few-shot {args.few_shot}: expected two or more numbers of clips, from 0 to {MOST}")
    folder, plot = args.out.with_suffix(""), args.out.with_suffix(".png")
    check_apart([folder, plot, *outputs(args.out).values()], [args.weights])
    check_numbers(args)
    begin_folder(folder, describe_loras(args.weights, args.set))
    loras = train_loras(counts, folder, args.weights, args.set)
    trial = Trial(args.weights, loras, args.seeds, [], folder / "scenes", full=True)
    there = run_trial(args, trial)
    if there is None:
        return
    fill = model_options(args.weights).warp_fill
    names = {f"{count} clips": f", {fill} filling" + (f", LoRA {count}-clips" if count else "") for count in counts}
    found, none = gather(there, "rows"), f"{counts[0]} clips"
    rows, estimated = ({label: found[way + name] for label, name in names.items() if way + name in found}
                       for way in ("full", ESTIMATED))
    more = "\n" + markdown(["the same with geometry that is estimated from the first frame"], estimated, none)
    head = [*describe_scenes(args), f"LoRAs by the weights' recipe{' and ' if args.set else ''}{' '.join(args.set)}"]
    lines = {title(metric): [mean_error(column(row, metric)) for row in rows.values()]
             for metric in ("psnr visible", "psnr", "psnr not visible")}
    with replacing({"plot": plot}) as files:
        save_png(files["plot"], draw_means([*map(float, counts)], lines, "clips that the LoRA learnt from"))
    show = partial(show_scene, trial, {label: f"full{name}" for label, name in names.items()})
    write(args.out, head, rows, none, f"{counts[-1]} clips", show, more if estimated else "",
          {"estimated": estimated})
    print("and", plot)


def run_mini(args: argparse.Namespace) -> None:
    check_numbers(args)
    trial = Trial(args.weights, args.lora, args.seeds, args.found, args.out.with_suffix(""))
    check_apart([trial.folder, *outputs(args.out).values()], [args.weights, *args.lora])
    there = run_trial(args, trial)
    if there is None:
        return
    rows, walks = (gather(there, key) for key in ("rows", "walks"))
    head = [*describe_scenes(args),
            f"camera: searched in the known scene, frames {', '.join(map(str, args.found))} of the first seed"]
    more = f"\nThree chunks, warps rendered from the first frame's true depth:\n\n{means(walks)}"
    columns = {"truth": "the truth", "warp": "the smooth filling alone", "full": REFERENCE, "no camera": "no camera"}
    write(args.out, head, rows, REFERENCE, REFERENCE, partial(show_scene, trial, columns), more, {"walks": walks})


def gather(scenes: dict[int, dict], key: str) -> Rows:
    """Scene -> row -> metric to row -> scene -> metric."""
    names = next(iter(scenes.values()))[key]
    return {name: {f"scene-{seed}": found[key][name] for seed, found in scenes.items()} for name in names}


# --------------------------------------------------------------------------------------------------------------- main


TASKS = {  # the option that asks for each, and all that it uses beside --out
    "results": (run_compare, "truth poses masks frames size stretch lpips geometry device weights"),
    "protocol": (run_protocol, "data names ablation poses part size lpips geometry device weights memory seed lora"
                               " set"),
    "mini": (run_mini, "scenes seeds found processes part weights lora"),
    "few_shot": (run_few_shot, "scenes seeds processes part weights set"),
}


def spell(name: str) -> str:
    return "videos to measure" if name == "results" else "--" + name.replace("_", "-")


def check_options(args: argparse.Namespace, task: str) -> None:
    """Raises ValueError for an option that does nothing in the task."""
    usual, used = vars(parse([])), {name: {name, "out", *words.split()} for name, (_, words) in TASKS.items()}
    for name, value in vars(args).items():
        if value != usual[name] and name not in used[task]:
            others = " or ".join(spell(each) for each in TASKS if name in used[each])
            raise ValueError(f"{spell(name)}: does nothing with {spell(task)}, expected it with {others}")


def run(args: argparse.Namespace) -> None:
    asked = [task for task in TASKS if getattr(args, task)]
    if len(asked) != 1:
        raise ValueError("expected one of: videos to measure, --protocol, --mini, --few-shot")
    check_options(args, asked[0])
    args.weights = check_weights(args.weights)
    if args.out.suffix != ".md":
        raise ValueError(f"--out {args.out}: expected a file name that ends in .md")
    own = args.weights / "lora.safetensors"
    if args.lora is None:
        args.lora = [own] if own.is_file() else []
    try:
        TASKS[asked[0]][0](args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("" if asked == ["results"] else "before the table; the same words go on") from None


def main(words: list[str] | None = None) -> int:
    return run_program("evaluate.py", run, parse(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
