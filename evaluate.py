"""Numbers for videos: how near they are to the truth, how well their camera follows, and what each idea is worth.

    python evaluate.py --mini --scenes 20 --seeds 3 --out runs/mini.md     # the miniature's own table

It writes a Markdown table and, beside it, the numbers of every video as json. What is under way is kept in a folder
beside the table, so that the same words go on after an interruption; `--part i/N` takes every N-th scene.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from evaluation.ablation import REFERENCE
from evaluation.quality import libraries
from evaluation.table import Rows, markdown, means
from files.cli import Parser, run_program
from files.writing import check_apart, replacing
from geometry.camera import WINDOW
from helios.index import check_weights, read_index
from helios.load import ROOT
from job import Settings
from mini.judge import Trial, held_out, judge


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate.py", "Measure videos.", Settings())
    parser.add_argument("--mini", action="store_true", help="the miniature's table, on scenes that it never saw")
    parser.add_argument("--out", type=Path, default=Path("runs/table.md"), help="the table; other files lie beside it")
    parser.add_argument("--part", default="0/1", help="i/N: every N-th video, from the i-th on (i from 0)")
    group = parser.add_argument_group("what makes the videos")
    group.add_argument("--weights", type=Path, default=ROOT / "mini", help="a folder in the official layout")
    group.add_argument("--lora", type=Path, nargs="*", help="files; all rows for the first, the full method for others"
                                                            " (default: lora.safetensors of the weights, if any)")
    group = parser.add_argument_group("the miniature")
    group.add_argument("--scenes", type=int, default=20)
    group.add_argument("--seeds", type=int, default=3)
    group.add_argument("--found", type=int, nargs="+", default=[WINDOW // 2, WINDOW - 1],
                       help="frames whose camera is searched (default: 16 32)")
    group.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args(words)


def read_part(text: str) -> slice:
    """"1/4" -> every fourth from the second on."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--part {text!r}: expected i/N with i from 0 to N - 1, as in 0/4")
    return slice(int(found[1]), None, int(found[2]))


def write(out: Path, text: str, numbers: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing({"table": out, "numbers": out.with_suffix(".json")}) as files:
        files["table"].write_text(text, encoding="utf-8")
        files["numbers"].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"{text}\nwrote {out} and {out.with_suffix('.json')}")


# ----------------------------------------------------------------------------------------------------- the miniature


def side_by_side(work: Callable[[int], None], items: list[int], processes: int) -> Iterable[int]:
    """Each item as soon as it is done, in whatever order."""
    if processes == 1:
        for item in items:
            work(item)
            yield item
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        under_way = {pool.submit(work, item): item for item in items}
        try:
            for done in as_completed(under_way):
                done.result()
                yield under_way[done]
        finally:
            pool.shutdown(cancel_futures=True)


def run_mini(args: argparse.Namespace) -> None:
    """The scenes that are not measured yet, then, if all are there, the table."""
    for name in ("scenes", "seeds", "processes"):
        if not 1 <= getattr(args, name) <= 10**4:
            raise ValueError(f"--{name} {getattr(args, name)}: expected a number from 1 to 10000")
    if not all(0 < index < WINDOW for index in args.found):
        raise ValueError(f"--found {args.found}: expected frames from 1 to {WINDOW - 1}")
    trial = Trial(args.weights, args.lora, args.seeds, args.found, args.out.with_suffix(""))
    check_apart([trial.folder], [args.weights, *args.lora])
    seeds = held_out(args.scenes, read_index(args.weights).size)
    there = {seed: trial.read(seed) for seed in seeds}
    wanted = [seed for seed in seeds[read_part(args.part)] if there[seed] is None]
    trial.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for number, seed in enumerate(side_by_side(partial(judge, trial=trial), wanted, args.processes), 1):
        print(f"scene {seed}: {number} of {len(wanted)}, {time.perf_counter() - begin:.0f} s", flush=True)
    there = {seed: found for seed in seeds if (found := trial.read(seed))}
    if len(there) < len(seeds):
        print(f"{len(there)} of {len(seeds)} scenes are there; the table comes with the last")
        return
    rows, walks = (gather(there, key) for key in ("rows", "walks"))
    head = [f"{len(seeds)} held-out scenes of the miniature's world, {args.seeds} seeds from 0 on, whose numbers are"
            f" averaged before errors are taken; {'x'.join(map(str, read_index(args.weights).size))} pixels",
            "the 32 frames after the first, which is given; exact warps; ghost: the share of what the first frame does"
            " not show that is near its mean colour",
            f"camera: searched in the known scene, frames {', '.join(map(str, args.found))} of the first seed",
            f"measured with {libraries(False)}"]
    text = markdown(head, rows, REFERENCE) + "\nThree chunks, warps rendered from the first frame's true depth:\n\n"
    write(args.out, text + means(walks), {"rows": rows, "walks": walks})


def gather(scenes: dict[int, dict], key: str) -> Rows:
    """Scene -> row -> metric to row -> scene -> metric."""
    names = next(iter(scenes.values()))[key]
    return {name: {f"scene-{seed}": found[key][name] for seed, found in scenes.items()} for name in names}


# --------------------------------------------------------------------------------------------------------------- main


def run(args: argparse.Namespace) -> None:
    args.weights = check_weights(args.weights)
    if args.out.suffix != ".md":
        raise ValueError(f"--out {args.out}: expected a file name that ends in .md")
    own = args.weights / "lora.safetensors"
    if args.lora is None:
        args.lora = [own] if own.is_file() else []
    if args.mini:
        run_mini(args)


def main(words: list[str] | None = None) -> int:
    return run_program("evaluate.py", run, parse(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
