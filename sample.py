"""Command line: a picture and a camera path in, a video out.

    python sample.py --image x.png --poses p.json --prompt "..." --weights weights/Helios-Distilled --out out.mp4

The camera is given as a file of poses, as moves ("forward 1, yaw -20"), or as a finished warp video with its mask; with
none of them Helios runs as it is (text to video, image to video, or --video, which is continued). A video with a camera
path is shot again along it (reshoot.py), and a video given as --poses lends its own camera's path.
Without any argument it makes the demo's video. Everything is checked before the first file is written. Every chunk is
on disk as soon as it is made, and --continue goes on after the last one (files/output.py). At the end there is one mp4,
and beside it a warp video and a contact sheet. Unlike the official program, which rounds up to whole chunks and cuts to
4n + 1 frames, the video has exactly the frames asked for.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from files.checkpoint import few
from files.cli import Parser, existing, explain, run_program
from files.draw import save_png
from files.folder import STATE
from files.machine import allow_tf32, describe_machine, network_dtype, out_of_memory, peak_memory
from files.measure import steadiness
from files.media import read_frames, to_frames, to_u8
from files.output import Output, parts_folder
from files.settings import part_of, setting_names
from files.table import check_row, read_table
from files.video import try_encoder
from files.writing import beside, check_apart, check_outputs, fingerprint, real, replacing
from geometry.camera import WINDOW, CameraPath, path_error
from geometry.paths import path_json
from geometry.pi3x import Pi3X, find_pi3x
from geometry.scene import describe_visible, see
from helios.flow import Schedule
from helios.load import (
    MEMORY,
    NEGATIVE_PROMPT,
    Loader,
    Models,
    Prompts,
    add_trigger,
    default_weights,
    embed_prompts,
    encode_each,
    files_read,
    find_lora,
    load_models,
    prompt_at,
)
from helios.lora import Lora
from helios.taehv import find_taehv
from helios.team import follow, lead, ranks
from job import Job, Settings, check, clip_files, is_filmed, led_by_pi3x, load_settings, prepare, seen_together
from model import Helios
from wah import Chunk, Options, Rollout, stage_steps

DATA = Path(__file__).parent / "data"
DEMO = {
    "image": DATA / "plaza.png",
    "depth": DATA / "plaza_depth.png",
    "poses": DATA / "plaza.json",
    "prompt": "a square with wooden brown ground between houses, a marbled teal lamp, a checked red ball, a leafy gray"
    " ball, a marbled white ball, a checked dark lime box, a pink box",
}

HELP = """settings (--NAME VALUE, or --set NAME=VALUE ...), and what they are else:
  geometry=FILE keyframes=8 fov=55     Pi3X weights; pictures it sees at once; the picture's field of view
  seed=0 fps=24 resample=true          random numbers; frame rate; stretch the path to it or to --frames
  steps=2,2,2 guidance=1 threshold=0.1 numbers of the sampler; docs/options.md has all
  align=false drop=false               the paper's ideas switched off
  check=true latents=x.safetensors     measure the camera of the result; keep its latents
  device=cuda compile=true             where to run, and torch.compile"""


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser("sample.py", "Make a video that follows a camera path through a picture.", Settings())
    parser.epilog, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group("picture and camera")
    shown = group.add_mutually_exclusive_group()
    shown.add_argument("--image", type=Path, help="first frame (any picture)")
    shown.add_argument("--video", type=Path, help="a clip: shot again along a path, else continued")
    camera = group.add_mutually_exclusive_group()
    camera.add_argument("--poses", type=Path, help="camera path: a file, a COLMAP folder or a clip")
    camera.add_argument("--move", help='in words, a chunk of 33 frames each: "forward 1, yaw -20, hold"')
    camera.add_argument("--warp", type=Path, nargs="+", help="finished warp, mp4 or npy; and its mask, else all"
                                                             " is visible")
    group.add_argument("--depth", type=Path, help="depth map of the picture, or one a frame, instead of Pi3X")
    group.add_argument("--prompt", default="", help='what it shows; for each chunk: "a street | the same at night"')
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("out.mp4"))
    group.add_argument("--size", help="HEIGHTxWIDTH, multiples of 64, or 16 (default: 384x640, or the model's own)")
    group.add_argument("--frames", type=int, help="length (default: that of the path or warp, or 33)")
    group.add_argument("--list", type=Path, help="many videos: a csv of options and settings")
    group.add_argument("--continue", action="store_true", dest="resume", help="go on with the video that the"
                                                                              " same words began")
    group = parser.add_argument_group("model and machine")
    group.add_argument("--weights", type=Path, default=default_weights(), help="folder in the official layout (default:"
                       " weights/Helios-Distilled, else the miniature)")
    group.add_argument("--lora", default="auto", help="file, off, or auto: the one beside the weights, if any")
    group.add_argument("--memory", choices=MEMORY, default="full", metavar="KIND",
                       help="full, fp8 or stream (docs/memory.md)")
    args = parser.parse_args(words)
    if not {*words} - {"--continue"}:
        vars(args).update(DEMO)
    return argparse.Namespace(**vars(args), words=words)


CHECK_STRIDE = 4  # every fourth frame, as in the paper


class Progress:
    """A bar for each stage of each chunk."""

    def __init__(self, options: Options, schedule: Schedule, chunks: int):
        self.options, self.schedule, self.chunks = options, schedule, chunks
        self.bar: tqdm | None = None

    def __call__(self, chunk: int, stage: int, step: int) -> None:
        if step == 0 or self.bar is None:
            self.close()
            steps = stage_steps(self.options, self.schedule, chunk)
            name = f"chunk {chunk + 1}/{self.chunks}, stage {stage + 1}/{len(steps)}"
            self.bar = tqdm(total=steps[stage], desc=name, unit="step", leave=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def check_camera(pi3x: Pi3X, video: Path, path: CameraPath, limit: int | None) -> dict:
    """The camera of every fourth frame, as Pi3X sees it, against the path that was asked for (`camera.path_error`)."""
    frames = np.stack([*islice(read_frames(video), 0, None, CHECK_STRIDE)])
    wanted = path.c2w[(torch.arange(len(frames)) * CHECK_STRIDE).clamp(max=len(path.c2w) - 1)]
    return path_error(see(pi3x, frames, limit).c2w, wanted)


def measure(job: Job, video: Path, compares: bool) -> dict[str, float]:
    """Seams and drift of the finished video, and, where there is a Pi3X that `compares` frames, how far its camera is
    from the path."""
    found = steadiness(read_frames(video))
    if compares and job.pi3x is not None and job.path is not None and job.frames > CHECK_STRIDE:
        found |= check_camera(job.pi3x(), video, job.path, job.settings.geometry_pixels)
    return found


# What can be another in a run that goes on; all else is what the video depends on.
FREE = {"out", "resume", "memory", "words", "set", "latents", "check", "compile", "device", "split", "list", "part"}


def lora_files(lora: Lora | None) -> list[str]:
    """What a LoRA's file holds, and the settings that PEFT keeps beside it."""
    source = [] if lora is None else [Path(lora.source), Path(lora.source).with_name("adapter_config.json")]
    return [fingerprint(file) for file in source]


def describe_job(args: argparse.Namespace, job: Job) -> dict:
    """What the video depends on; files and folders by what they hold."""
    about = vars(args) | asdict(job.settings) | {
        "size": job.size, "frames": job.frames, "fps": job.fps, "fp8": args.memory == "fp8",
        "dtype": str(network_dtype(job.settings.device)), "lora": lora_files(job.lora),
        "weights": fingerprint(args.weights, files_read(args.weights)),
        "geometry": job.pi3x_file if led_by_pi3x(args, job.settings) else None,
        "taehv": None if job.settings.vae == "wan" else find_taehv(args.weights),
        "warp": [fingerprint(path) for path in args.warp or ()],
        "clip": [fingerprint(path) for path in existing(*(clip_files(args, job.settings) or ()))]}
    return {name: fingerprint(value) if isinstance(value, Path) else value
            for name, value in about.items() if name not in FREE}


def pictures(chunk: Chunk) -> dict[str, np.ndarray]:
    """A chunk's rows [33, H, W, 3] uint8: the result, and the warp and mask that led it."""
    rows = {"result": to_frames(chunk.frames)}
    if chunk.warp is not None:
        frames, visible = chunk.warp.frames[:, :, -WINDOW:], chunk.warp.visible[0, 0, -WINDOW:]  # 34 begin before
        mask = to_u8(visible)[..., None].expand(-1, -1, -1, 3).cpu().numpy()
        rows |= {"warp": to_frames(frames), "mask": mask}
    return rows


BESIDE = {"warp": "_warp.mp4", "sheet": "_sheet.png", "path": "_path.json", "check": "_check.json"}  # the video


def name_files(args: argparse.Namespace, settings: Settings) -> tuple[dict[str, Path], list[Path]]:
    """All that the run will write, by name, and all that it reads. Raises ValueError or OSError if these meet, or can't
    be written or read."""
    led = bool(existing(args.poses, args.move, args.warp))
    wanted = {"warp": led, "sheet": True, "path": is_filmed(args), "check": settings.check}
    outputs = beside(args.out, **{name: ending for name, ending in BESIDE.items() if wanted[name]})
    if settings.latents is not None:
        outputs["latents"] = settings.latents
    geometry = find_pi3x(settings.geometry, args.weights)
    lora = find_lora(args.lora, args.weights, led, settings.warp_band)
    tiny = None if settings.vae == "wan" else find_taehv(args.weights)
    inputs = existing(args.image, args.video, args.poses, args.depth, *(args.warp or ()), args.weights, args.list,
                      geometry, lora, tiny, *(clip_files(args, settings) or ()))
    parts = parts_folder(args.out)
    check_outputs(outputs, [*inputs, *([parts] if parts.is_dir() else [])])
    check_apart([parts], inputs)
    return outputs, inputs


def prompts_in(words: str) -> list[str]:
    return [part.strip() for part in words.split("|")]


class Networks:
    """What videos need of the weights: loaded when the first one needs it, and kept for the others of a list."""

    def __init__(self, load: Loader, coming: Iterable[str] = (), guided: bool = False):
        """coming: the prompts of more videos, which are embedded with the first ones, before the transformer takes the
        memory; with that of guidance, where one of them may be guided."""
        self.load, self.embedded = load, {}
        parts = {part for words in coming for part in prompts_in(words)}
        self.coming = {*parts, *map(add_trigger, parts), *([NEGATIVE_PROMPT] if guided else ())}
        self.key: tuple = ()
        self.loaded: Models[Helios] | None = None

    def embed(self, weights: Path, wanted: set[str], device: str, memory: str) -> dict[str, Tensor]:
        """Embeddings [1, rows, text_dim] of all prompts so far, the `wanted` ones among them."""
        if not wanted <= self.embedded.keys():
            self.embedded |= embed_prompts(weights, wanted | self.coming, device, memory, self.load)
        return self.embedded

    def give(self, args: argparse.Namespace, job: Job) -> tuple[list[Prompts], Models[Helios]]:
        """Of one video the prompts, one after another (see `prompt_at`), and the networks."""
        settings = job.settings
        key = args.weights, args.memory, settings.device, settings.vae, settings.compile
        if key != self.key:
            self.key, self.loaded, self.embedded = key, None, {}
        prompts = encode_each(args.weights, prompts_in(args.prompt), job.lora is not None, settings.guidance > 1,
                              settings.device, args.memory, self.embed)
        if self.loaded is None:
            self.loaded = load_models(Helios, args.weights, settings.device, args.memory, settings.vae, self.load)
            if settings.compile:
                self.loaded.transformer.compile_blocks()
        return prompts, self.loaded


def generate(args: argparse.Namespace, job: Job, output: Output, networks: Networks) -> Tensor:
    """Make the video, unless all chunks are there; Ctrl-C after the first one ends it early. Returns the latents that
    precede it."""
    if output.count == job.frames and output.rollout and "given" in output.rollout:
        return output.rollout["given"]
    settings, start = job.settings, job.start
    prompts, models = networks.give(args, job)
    progress = Progress(settings, models.schedule, job.chunks)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    begin, already, shares = time.perf_counter(), len(output.counts), []
    rollout = Rollout(models, prompts[0], job.size, generator, start.image, start.video, start.camera, job.lora,
                      settings, progress)
    if output.rollout is not None:
        rollout.restore(output.rollout)
    try:
        for control in islice(job.controls, already, None):
            prompt = prompt_at(prompts, rollout.chunk, settings.prompt_blend)
            chunk = rollout.next(control.poses, control.warp, prompt, control.zoom)
            if chunk.warp is not None:
                shares += chunk.warp.visible[0, 0, -WINDOW:].mean((1, 2)).tolist()
            output.add(pictures(chunk), chunk.latents, rollout.state())
            if output.count < job.frames:
                progress.close()
                print(f"{output.count} of {job.frames} frames: {output.latest}", flush=True)
    except KeyboardInterrupt:
        if not output.count:
            raise
        words = shlex.join([*(word for word in args.words if word != "--continue"), "--continue"])
        print(f"\nstopped: keeping the {output.count} frames that are done; to go on: python sample.py {words}")
    finally:
        progress.close()
    if shares := shares[: output.count - already * WINDOW]:
        print(describe_visible(shares, already * WINDOW))
    report(rollout, output, already, time.perf_counter() - begin, settings.device)
    return rollout.given


def report(rollout: Rollout, output: Output, already: int, seconds: float, device: str) -> None:
    """What this run made, beyond the chunks that were there already, and how fast."""
    made, work = len(output.counts) - already, rollout.flops / 1e12
    if made:
        frames = sum(output.counts[already:])
        print(f"{seconds / made:.2f} s/chunk, {frames / seconds:.2f} frames/s, {work / seconds:.3g} TFLOP/s"
              f" ({work:.3g} TFLOP counted in the transformer), peak {peak_memory(device)}")


def make(args: argparse.Namespace, settings: Settings, networks: Networks) -> bool:
    """One video; whether it is whole."""
    check(args, settings)
    allow_tf32(settings.tf32)
    outputs, inputs = name_files(args, settings)
    with Output(args.out, args.resume) as output:
        if output.done:
            print(f"{args.out} is whole; nothing is left to do")
            return True
        job = prepare(args, settings)
        try_encoder(job.fps, job.size)
        output.begin(describe_job(args, job), job.frames, job.fps, job.led, describe_machine(settings.device))
        given = generate(args, job, output, networks)
        whole = output.count == output.frames
        if not whole and (there := [*filter(output.is_older, outputs.values())]):
            print(f"{', '.join(map(str, there))}: of an earlier run, kept until the video is whole")
            return False
        with replacing(outputs, filter(Path.exists, inputs)) as files:  # what is gone by now can't be overwritten
            for name in files.keys() & {"video", "warp"}:
                output.join(f"_{name}.mp4", files[name])
            save_png(files["sheet"], output.sheet())
            if "latents" in files:
                files["latents"].write_bytes(save({"latents": output.latents(given)}))
            if job.filmed is not None:
                files["path"].write_text(path_json(job.filmed) + "\n")
            if "check" in files:
                found = measure(job, files["video"], seen_together(args, settings) > 1)
                files["check"].write_text(json.dumps(found, indent=1) + "\n")
                print("check: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        output.finish()
    print(f"wrote {output.count} frames:", *outputs.values())
    return whole


def list_rows(args: argparse.Namespace, settings: Settings) -> list[tuple[int, dict]]:
    """The rows of --list that are this run's part, and their numbers in the file, from 1 on."""
    part = part_of(settings.part)
    rows = list(enumerate(read_table(args.list, ("out",), dict), 1))
    parser_options = {name for name, value in vars(args).items() if not isinstance(value, list)} | {"warp"}
    known = parser_options - {"list", "resume", "words"} | {*setting_names(settings)} - {"device", "split", "part"}
    unknown = [name for name in rows[0][1] if name is not None and name not in known]
    if unknown:
        raise ValueError(f"{args.list}: column {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
    writers: dict[Path, int] = {}
    for number, row in rows:
        out, latents = Path(row["out"] or ""), row.get("latents") or settings.latents
        names = [out.with_name(out.stem + end) for end in (".mp4", *BESIDE.values(), "_parts")] if out.name else []
        for file in existing(*names, None if latents in (None, "none") else Path(latents)):
            if (other := writers.setdefault(real(file), number)) != number:
                raise ValueError(f"{args.list}: rows {other} and {number} could both write {file}")
    return rows[part]


def row_args(args: argparse.Namespace, row: dict) -> argparse.Namespace:
    """The words of the command line, and over them those of a row; one that was begun goes on."""
    if not check_row(row)["out"]:
        raise ValueError("no out, expected a file name")
    options = vars(args).keys()
    words = [f"--{name}={value}" for name, value in row.items() if value and name in options]
    more = [f"{name}={value}" for name, value in row.items() if value and name not in options]
    try:
        mine = parse([*args.words, *words, *(["--set", *more] if more else [])])
    except SystemExit:
        raise ValueError("its words were refused, for the reason above") from None
    mine.words, mine.resume = args.words, (parts_folder(mine.out) / STATE).is_file()
    return mine


def make_list(args: argparse.Namespace, settings: Settings, load: Loader) -> None:
    """All videos of a list, but those that are there; one that fails is told and left."""
    rows = list_rows(args, settings)
    guided = settings.guidance > 1 or any("guidance" in row for _, row in rows)
    networks = Networks(load, [row.get("prompt") or args.prompt for _, row in rows], guided)
    made, there, failed = 0, 0, []
    for number, row in rows:
        print(f"{args.list}, row {number}: {row['out']}")
        try:
            mine = row_args(args, row)
            if mine.out.is_file() and not parts_folder(mine.out).exists():
                there += 1
                continue
            whole = make(mine, load_settings(mine), networks)
        except KeyboardInterrupt:
            whole = False
        except ConnectionError:
            raise  # not the row's fault
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and (not out_of_memory(error) or ranks()[1] > 1):
                raise
            failed.append(f"row {number} ({explain(error)})")
            print(f"{args.list}, row {number}: {explain(error)}", file=sys.stderr)
            continue
        if not whole:
            raise KeyboardInterrupt(f"after {made} videos; the same words go on")
        made += 1
    print(f"{args.list}: {len(rows)} rows, {made} made, {there} were there, {len(failed)} failed")
    if failed:
        raise ValueError(f"{args.list}: {len(failed)} of {len(rows)} rows failed: {few(failed)}")


def run(args: argparse.Namespace) -> None:
    settings = load_settings(args)
    with lead(Helios, settings.split, settings.device) as load:
        if args.list is None:
            if not make(args, settings, Networks(load)):
                raise KeyboardInterrupt("what is done is kept")
        else:
            make_list(args, settings, load)


def main(words: list[str] | None = None) -> int:
    if ranks()[0] > 0:
        return run_program("sample.py", lambda _: follow(Helios), argparse.Namespace())
    return run_program("sample.py", run, parse(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    sys.exit(main())
