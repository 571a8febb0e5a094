"""Command line: a picture and a camera path in, a video out.

    python sample.py --image x.png --poses p.json --prompt "..." --weights weights/Helios-Distilled --out out.mp4

The camera is given as a file of poses, as moves ("forward 1, yaw -20"), or as a finished warp video with its mask; with
none of them Helios runs as it is (text to video, image to video, or --image with a video that is to be continued). Without
any argument it makes the demo's video. Everything is checked before the first file is written. Every chunk is on disk as
soon as it is made, and --continue goes on after the last one (output.py); at the end there is one mp4, and beside it a warp
video and a contact sheet. Unlike the official program, which rounds up to whole chunks and cuts to 4n + 1 frames, the
video has exactly the frames asked for.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import media
from camera import WINDOW, CameraPath, describe, load_path, move_path, path_error, retime
from checkpoint import Lora, count_numbers, free_memory, load_lora, network_dtype, read_json, weight_files
from flow import load_schedule
from memory import Memory
from output import Output, fingerprint
from pi3x import Pi3X, load_pi3x
from render import choose_fov, estimate, parse_size, place, run_program
from wah import (MEMORY, Camera, Options, Rollout, encode_prompts, load_models, load_options, make_warp, native_size,
                 size_multiple)


DATA = Path(__file__).parent / "data"
DEMO = {"image": DATA / "plaza.png", "depth": DATA / "plaza_depth.png", "poses": DATA / "plaza.json",
        "prompt": "a square with checked dark lime ground between houses, a checked orange ball, a yellow box, a striped"
                  " green ball, a marbled dark brown box, a gray box, a striped blue box"}


def default_weights() -> Path:
    """The released model if it has been downloaded, else the miniature that comes with the code."""
    root = Path(__file__).parent / "weights"
    released = root / "Helios-Distilled"
    return released if released.is_dir() else root / "mini"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("sample.py", usage=argparse.SUPPRESS,  # one line an error
                                     description="Make a video that follows a camera path through a picture.")
    parser.add_argument("--image", type=Path, help="first frame (any picture); a video here is continued")
    camera = parser.add_mutually_exclusive_group()
    camera.add_argument("--poses", type=Path, help="camera path: a file or COLMAP folder; README.md lists the formats")
    camera.add_argument("--move", help='camera path in words, one chunk of 33 frames each: "forward 1, yaw -20, hold"')
    camera.add_argument("--warp", type=Path, help="finished warp video, mp4 or npy (uint8 [T,H,W,3])")
    parser.add_argument("--mask", type=Path, help="visibility of --warp, mp4 or npy ([T,H,W]); default: all visible")
    parser.add_argument("--geometry", type=Path, help="Pi3X weights (default: Pi3X/model.safetensors in the weights'"
                                                      " folder or beside it; without any: a plane at depth 1)")
    parser.add_argument("--keyframes", type=int, help="pictures that Pi3X sees at once: first and latest (default: 8, or the"
                                                      " weights' own)")
    parser.add_argument("--depth", type=Path, help="depth map of the picture instead: npy, npz or 16-bit png")
    parser.add_argument("--fov", type=float, help="the picture's horizontal degrees (default: the path file's, or 55)")
    parser.add_argument("--prompt", default="", help="what the video shows")
    parser.add_argument("--weights", type=Path, default=default_weights(), help="folder in the official layout (default:"
                        " weights/Helios-Distilled if it is there, else the miniature, weights/mini)")
    parser.add_argument("--lora", default="auto", help='LoRA file, "off", or "auto": the one beside the weights if any')
    parser.add_argument("--out", type=Path, default=Path("out.mp4"))
    parser.add_argument("--frames", type=int, help="length of the video (default: that of the path or warp, or 33)")
    parser.add_argument("--fps", type=float, help="frame rate of the video (default: the path file's, or 16)")
    parser.add_argument("--resample", action="store_true", help="stretch or squeeze the path to --frames or --fps instead")
    parser.add_argument("--size", help="HEIGHTxWIDTH, multiples of 64, of 16 for one-stage models (default: 384x640,"
                        " of the miniature 64x96)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablate", default="", help="comma-separated: no-align, no-drop, no-noise;"
                                                      " no-lag puts the masks of later Pi3X chunks in step")
    parser.add_argument("--save-latents", type=Path, help="also write the latents (.safetensors, key `latents`)")
    parser.add_argument("--check", action="store_true", help="measure with Pi3X how well the video follows (out_check.json)")
    parser.add_argument("--continue", action="store_true", dest="resume", help="go on with the video that a run with the same"
                        " words began; every chunk is saved")
    parser.add_argument("--memory", choices=MEMORY, default="full", help="full: weights stay on the device; fp8: in half the"
                        " room, with small errors; stream: they come from the file as they are needed (README.md has a table)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer: slow to begin, faster then")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not argv:
        vars(args).update(DEMO)
    return argparse.Namespace(**vars(args), words=argv)


def parse_ablation(text: str, options: Options) -> Options:
    switches = {"no-align": {"align": False}, "no-drop": {"drop": False}, "no-noise": {"warp_noise": False},
                "no-lag": {"mask_lag": False}}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in switches:
            raise ValueError(f"--ablate {word!r}: expected some of {', '.join(switches)}")
        options = replace(options, **switches[word])
    return options


def find_lora(choice: str, weights: Path, led: bool) -> Path | None:
    """The LoRA file to use. It belongs to runs that a warp leads; plain Helios runs without."""
    word = choice.lower()
    if word in ("off", "none", "no", "false", "null", "0", "") or (word == "auto" and not led):
        return None
    if word == "auto":
        released = weights.parent / "warp-as-history" / "visible_lora_state_step1000.safetensors"
        return next((path for path in (weights / "lora.safetensors", released) if path.is_file()), None)
    if not led:
        raise ValueError("--lora needs a camera: --poses, --move or --warp")
    return Path(choice)


def find_geometry(choice: Path | None, weights: Path) -> Path | None:
    """The Pi3X file to use."""
    if choice is not None:
        return choice
    places = (folder / "Pi3X" / "model.safetensors" for folder in (weights, weights.parent))
    return next((path for path in places if path.is_file()), None)


def pi3x_source(file: Path, weights: Path, device: str, often: bool) -> Callable[[], Pi3X]:
    """How a run gets Pi3X: read anew for each estimate, so that it makes room for the transformer, or kept beside it if it
    is used often and both fit on the device, with a quarter more for what they compute."""
    dtype = network_dtype(device)
    load = partial(load_pi3x, file, device, dtype)
    needed = count_numbers([file, *weight_files(weights / "transformer")]) * dtype.itemsize * 5 // 4
    return cache(load) if often and free_memory(device) > needed else load


# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Job:
    """A run's inputs, all of them checked; the networks are still to come."""

    options: Options
    size: tuple[int, int]
    frames: int
    fps: float
    controls: Iterator[dict]  # what `Rollout.next` takes, chunk by chunk
    start: dict  # what `Rollout` starts from: image [1, 3, H, W] and camera, or video [1, 3, T, H, W], or nothing
    led: bool  # by a warp, rendered or given
    lora: Lora | None
    path: CameraPath | None
    pi3x: Callable[[], Pi3X] | None  # for the check


def pose_chunks(c2w: Tensor, frames: int) -> Iterator[dict]:
    """Poses by the chunk; the last pose holds to the end."""
    for start in range(0, frames, WINDOW):
        yield {"poses": c2w[min(start, len(c2w) - 1):][:WINDOW]}


def warp_chunks(warp: Path, mask: Path | None, frames: int, size: tuple[int, int]) -> Iterator[dict]:
    """Warps by the chunk, read as they are needed; the last frame holds to the end of the last chunk."""
    pictures = media.read_frames(warp)
    masks = None if mask is None else media.read_mask(mask)

    def take(stream: Iterator[np.ndarray], count: int) -> np.ndarray:
        taken = list(islice(stream, count))
        return np.stack(taken + taken[-1:] * (WINDOW - len(taken)))

    for start in range(0, frames, WINDOW):
        count = min(WINDOW, frames - start)
        yield {"warp": make_warp(take(pictures, count), None if masks is None else take(masks, count), size)}


def count_warp(warp: Path, mask: Path | None, asked: int | None) -> int:
    """Frames to make from a warp; the whole warp and mask are read once to be sure that they are there."""
    there = sum(1 for _ in media.read_frames(warp))
    masked = there if mask is None else sum(1 for _ in media.read_mask(mask))
    if masked != there:
        raise ValueError(f"{mask} has {masked} frames, expected {there} as {warp}")
    if asked is not None and there < asked:
        raise ValueError(f"{warp} has {there} frames, expected at least {asked} (--frames)")
    return there if asked is None else asked


def check_place(device: str, weights: Path) -> None:
    """Whether there are such a device and such weights."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device!r}: expected cpu, cuda or cuda:N")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there is no such device, {torch.cuda.device_count()} found")
    if not (weights / "model_index.json").is_file():
        raise ValueError(f"--weights {weights}: no model_index.json there; weights/README.md says what to download")


def check(args: argparse.Namespace) -> None:
    """What can be said of the words alone."""
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames {args.frames}: expected at least 1")
    if args.fps is not None and not 1 <= args.fps <= 240:
        raise ValueError(f"--fps {args.fps:g}: expected a number from 1 to 240")
    if args.keyframes is not None and args.keyframes < 1:
        raise ValueError(f"--keyframes {args.keyframes}: expected at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected a number from 0 to 2^63 - 1")
    path = args.poses is not None or args.move is not None
    if args.mask is not None and args.warp is None:
        raise ValueError("--mask needs --warp")
    for name in ("depth", "fov", "geometry", "resample", "check"):
        if getattr(args, name) not in (None, False) and not path:
            raise ValueError(f"--{name} needs a camera path: --poses or --move")
    if args.image is None and (path or args.warp is not None):
        raise ValueError("a camera needs --image: the picture that it moves through")
    if args.save_latents is not None and args.save_latents.suffix != ".safetensors":
        raise ValueError(f"--save-latents {args.save_latents}: expected a file name that ends in .safetensors")
    check_place(args.device, args.weights)


def prepare(args: argparse.Namespace) -> Job:
    """Read and check all inputs but the networks; raises ValueError or OSError with one line."""
    check(args)
    schedule, options = load_schedule(args.weights), parse_ablation(args.ablate, load_options(args.weights))
    size = native_size(args.weights) if args.size is None else parse_size(args.size)
    multiple = size_multiple(schedule)
    if any(side % multiple for side in size):
        raise ValueError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {multiple}")
    path = None if args.poses is None else load_path(args.poses)
    path = path if args.move is None else CameraPath(move_path(args.move))
    led = path is not None or args.warp is not None
    lora, dtype = find_lora(args.lora, args.weights, led), network_dtype(args.device)
    precision = str(dtype).removeprefix("torch.")
    print(f"weights {args.weights}, LoRA {lora or 'none'}, {args.device} in {precision}, seed {args.seed}")
    frames, fps, start, controls = args.frames or WINDOW, args.fps or 16, {}, ({} for _ in itertools.count())
    pi3x = None
    if path is not None:
        path, frames, fps = retime(path, args.frames, args.fps, args.resample)
        picture, unit = media.load_image(args.image), 1.0 if path.unit == "meter" else None
        pi3x_file = find_geometry(args.geometry, args.weights)
        if pi3x_file is not None and (args.depth is None or args.check):
            pi3x = pi3x_source(pi3x_file, args.weights, args.device, often=args.depth is None and frames > WINDOW)
        elif args.check:
            raise ValueError("--check needs Pi3X: --geometry PATH")
        if args.depth is None and pi3x is not None:
            image, source = media.fit_image(picture, size).to(args.device), f"Pi3X of {pi3x_file}"
            keyframes = args.keyframes or read_json(args.weights / "model_index.json").get("keyframes", 8)
            camera = Memory(pi3x, image, size, keyframes=keyframes, unit=unit)
        else:
            fov, depth = choose_fov(args.fov, path), None if args.depth is None else media.load_depth(args.depth)
            image, geometry = place(picture, depth, fov, size, args.device)
            camera = Camera(geometry, size, unit)
            source = args.depth or "neither Pi3X nor --depth, so the picture stands on a plane at depth 1"
            source = f"{source}, field of view {fov:g} degrees"
        start, controls = {"image": image, "camera": camera}, pose_chunks(path.c2w, frames)
        print(f"geometry: {source}\ncamera: {describe(path)}; one unit of it is {camera.unit:.4g} of the geometry's")
    elif args.warp is not None:
        start = {"image": media.fit_image(media.load_image(args.image), size, crop=False)}
        frames = count_warp(args.warp, args.mask, args.frames)
        controls = warp_chunks(args.warp, args.mask, frames, size)
    elif args.image is not None and (args.image.is_dir() or args.image.suffix.lower() in media.VIDEOS):
        start = {"video": make_warp(media.load_video(args.image), None, size).frames}
        if start["video"].shape[2] < WINDOW:
            raise ValueError(f"{args.image}: fewer than the {WINDOW} frames that a video to be continued needs")
    elif args.image is not None:
        start = {"image": media.fit_image(media.load_image(args.image), size, crop=False)}
    return Job(options, size, frames, fps, islice(controls, -(-frames // WINDOW)), start, led,
               load_lora(lora, args.device, dtype) if lora else None, path, pi3x if args.check else None)


# ------------------------------------------------------------------------------------------------------------ outputs


CHECK_STRIDE = 4  # every fourth frame, as in the paper


class Progress:
    """A bar for each stage of each chunk."""

    def __init__(self, options: Options, few_step: bool, chunks: int):
        self.options, self.few_step, self.chunks, self.bar = options, few_step, chunks, None

    def __call__(self, chunk: int, stage: int, step: int) -> None:
        if step == 0:
            self.close()
            twice = self.few_step and self.options.amplify_first_chunk and chunk == 0
            total = self.options.steps[stage] * (2 if twice else 1)
            name = f"chunk {chunk + 1}/{self.chunks}, stage {stage + 1}/{len(self.options.steps)}"
            self.bar = tqdm(total=total, desc=name, unit="step", leave=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def check_camera(pi3x: Pi3X, video: Path, path: CameraPath) -> dict:
    """The camera of every fourth frame, as Pi3X sees it, against the path that was asked for (`camera.path_error`)."""
    frames = islice(media.read_frames(video), 0, None, CHECK_STRIDE)
    images = [rearrange(torch.from_numpy(frame), "h w c -> 1 c h w") / 127.5 - 1 for frame in frames]
    estimated = torch.stack([geometry.c2w for geometry in estimate(pi3x, images)])
    wanted = path.c2w[(torch.arange(len(images)) * CHECK_STRIDE).clamp(max=len(path.c2w) - 1)]
    return path_error(estimated, wanted)


def peak_memory(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory"


# What can be another in a run that goes on; all else is what the video depends on.
FREE = {"out", "save_latents", "check", "resume", "memory", "device", "words"}


def describe_job(args: argparse.Namespace, job: Job) -> dict:
    """What the video depends on; files and folders by what they hold."""
    about = vars(args) | {"size": job.size, "frames": job.frames, "fps": job.fps, "fp8": args.memory == "fp8",
                          "dtype": str(network_dtype(args.device)),
                          "lora": Path(job.lora.source) if job.lora else None,
                          "geometry": find_geometry(args.geometry, args.weights) if job.path else None}
    return {name: fingerprint(value) if isinstance(value, Path) else value
            for name, value in about.items() if name not in FREE}


def generate(args: argparse.Namespace, job: Job, output: Output) -> Rollout:
    """Load the networks and make the video; Ctrl-C after the first chunk ends it early."""
    prompts = encode_prompts(args.weights, args.prompt, job.lora is not None, job.options.guidance > 1, args.device,
                             args.memory)
    models = load_models(args.weights, args.device, args.memory)
    if args.compile:
        models.transformer.compile_blocks()
    progress = Progress(job.options, models.schedule.sampler == "dmd", chunks=-(-job.frames // WINDOW))
    generator = torch.Generator("cpu").manual_seed(args.seed)
    begin, already = time.perf_counter(), len(output.counts)
    rollout = Rollout(models, prompts, job.size, generator, **job.start, lora=job.lora, options=job.options,
                      on_step=progress)
    if output.rollout is not None:
        rollout.restore(output.rollout)
    try:
        for control in islice(job.controls, already, None):
            output.add(rollout.next(**control), rollout)
    except KeyboardInterrupt:
        if not output.count:
            raise
        words = shlex.join([*(word for word in args.words if word != "--continue"), "--continue"])
        print(f"\nstopped: keeping the {output.count} frames that are done; to go on: python sample.py {words}")
    finally:
        progress.close()
    seconds, made, work = time.perf_counter() - begin, len(output.counts) - already, rollout.flops / 1e12
    if made:
        frames = sum(output.counts[already:])
        print(f"{seconds / made:.2f} s/chunk, {frames / seconds:.2f} frames/s, {work / seconds:.3g} TFLOP/s ({work:.3g} TFLOP"
              f" counted in the transformer), peak {peak_memory(args.device)}")
    return rollout


def run(args: argparse.Namespace) -> None:
    job = prepare(args)
    outputs = media.beside(args.out, **({"warp": "_warp.mp4"} if job.led else {}), sheet="_sheet.png")
    if args.save_latents is not None:
        outputs["latents"] = args.save_latents
    if args.check:
        outputs["check"] = args.out.with_name(f"{args.out.stem}_check.json")
    given = args.image, args.poses, args.warp, args.mask, args.depth, args.geometry
    inputs = [path for path in given if path is not None]
    media.check_outputs(outputs, inputs)
    with Output(args.out, describe_job(args, job), args.resume, job.frames, job.fps, job.led) as output:
        rollout = generate(args, job, output)
        with media.replacing(outputs, inputs) as files:
            for name in files.keys() & {"video", "warp"}:
                output.join(f"_{name}.mp4", files[name])
            media.save_png(files["sheet"], output.sheet())
            if "latents" in files:
                files["latents"].write_bytes(save({"latents": output.latents(rollout.given)}))
            if "check" in files:
                error = check_camera(job.pi3x(), files["video"], job.path)
                files["check"].write_text(json.dumps(error, indent=1) + "\n")
                print("camera check: " + ", ".join(f"{name} {value:.4g}" for name, value in error.items()))
    print(f"wrote {output.count} frames:", *outputs.values())


def main(argv: list[str] | None = None) -> int:
    return run_program("sample.py", run, parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
