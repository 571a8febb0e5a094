"""Command line: a picture and a camera path in, a video out.

    python sample.py --image x.png --poses p.json --prompt "..." --weights weights/Helios-Distilled --out out.mp4

The camera is given as a file of poses, as moves ("forward 1, yaw -20"), or as a finished warp video with its mask; with none
of them Helios runs as it is (text to video, image to video, or --image with a video that is to be continued). Everything is
checked before the first file is written, frames stream into the mp4 as chunks arrive, and beside it a warp video and a
contact sheet are left. Unlike the official program, which rounds up to whole chunks and cuts to 4n + 1 frames, the video
has exactly the frames asked for.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import media
from camera import WINDOW, load_path, move_path
from checkpoint import Lora, load_lora, network_dtype
from flow import load_schedule
from render import geometry_from_depth, parse_size, pinhole, to_u8
from wah import Camera, Chunk, Options, Rollout, encode_prompts, load_models, load_options, make_warp, size_multiple

DEFAULT_FOV = 55.0  # horizontal, degrees


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a video that follows a camera path through a picture.")
    parser.add_argument("--image", type=Path, help="first frame (any picture); a video here is continued")
    camera = parser.add_mutually_exclusive_group()
    camera.add_argument("--poses", type=Path, help="camera path: poses.json or the official .npz")
    camera.add_argument("--move", help='camera path in words, one chunk of 33 frames each: "forward 1, yaw -20, hold"')
    camera.add_argument("--warp", type=Path, help="finished warp video, mp4 or npy (uint8 [T,H,W,3])")
    parser.add_argument("--mask", type=Path, help="visibility of --warp, mp4 or npy ([T,H,W]); default: all visible")
    parser.add_argument("--depth", type=Path, help="depth of the picture: npy, npz or 16-bit png; default: a plane at depth 1")
    parser.add_argument("--fov", type=float, help=f"horizontal field of view in degrees (default: the file's, or {DEFAULT_FOV:g})")
    parser.add_argument("--prompt", default="", help="what the video shows")
    parser.add_argument("--weights", type=Path, default=Path("weights/Helios-Distilled"), help="folder in the official layout")
    parser.add_argument("--lora", default="auto", help='LoRA file, "off", or "auto": the one beside the weights if there is one')
    parser.add_argument("--out", type=Path, default=Path("out.mp4"))
    parser.add_argument("--frames", type=int, help="length of the video (default: that of the path or warp, or 33)")
    parser.add_argument("--size", default="384x640", help="HEIGHTxWIDTH, multiples of 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablate", default="", help="comma-separated: no-align, no-drop, no-noise")
    parser.add_argument("--save-latents", type=Path, help="also write the latents (.safetensors, key `latents`)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def parse_ablation(text: str, options: Options) -> Options:
    switches = {"no-align": {"align": False}, "no-drop": {"drop": False}, "no-noise": {"warp_noise": False}}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in switches:
            raise ValueError(f"--ablate {word!r}: expected some of {', '.join(switches)}")
        options = replace(options, **switches[word])
    return options


def find_lora(choice: str, weights: Path, led: bool) -> Path | None:
    """The LoRA file to use. It belongs to runs that a warp leads; plain Helios runs without."""
    if choice.lower() in ("off", "none"):
        return None
    if choice != "auto":
        if not led:
            raise ValueError("--lora needs a camera: --poses, --move or --warp")
        return Path(choice)
    released = weights.parent / "warp-as-history" / "visible_lora_state_step1000.safetensors"
    return next((path for path in (weights / "lora.safetensors", released) if led and path.is_file()), None)


# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Job:
    """A run's inputs, all of them checked."""

    size: tuple[int, int]
    frames: int
    fps: float
    options: Options
    controls: Iterator[dict]  # what `Rollout.next` takes, chunk by chunk
    image: Tensor | None = None  # [1, 3, H, W]
    video: Tensor | None = None  # [1, 3, T, H, W]
    camera: Camera | None = None
    lora: Lora | None = None
    led: bool = False  # by a warp, rendered or given


def pose_chunks(c2w: Tensor, frames: int) -> Iterator[dict]:
    """Poses by the chunk; the last pose holds to the end of the last chunk."""
    for start in range(0, frames, WINDOW):
        yield {"poses": c2w[torch.arange(start, start + WINDOW).clamp(max=len(c2w) - 1)]}


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


def prepare(args: argparse.Namespace) -> Job:
    """Read and check all inputs but the networks; raises ValueError or OSError with one line."""
    schedule, options = load_schedule(args.weights), parse_ablation(args.ablate, load_options(args.weights))
    size, multiple = parse_size(args.size), size_multiple(schedule)
    if any(side % multiple for side in size):
        raise ValueError(f"--size {args.size}: height and width must be multiples of {multiple}")
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames {args.frames}: expected at least 1")
    path = load_path(args.poses) if args.poses else None
    c2w = move_path(args.move) if args.move else path.c2w if path else None
    led = c2w is not None or args.warp is not None
    for flag, given, partner, there in (("--mask", args.mask, "--warp", args.warp), ("--depth", args.depth, "a camera path", c2w)):
        if given is not None and there is None:
            raise ValueError(f"{flag} needs {partner}")
    if led and args.image is None:
        raise ValueError("a camera needs --image: the picture that it moves through")
    lora = find_lora(args.lora, args.weights, led)
    dtype = network_dtype(args.device)
    job = Job(size, args.frames or WINDOW, (path and path.fps) or 16.0, options, iter(()),
              lora=load_lora(lora, args.device, dtype) if lora else None, led=led)
    print(f"weights {args.weights}, LoRA {lora or 'none'}, {args.device} in {str(dtype).removeprefix('torch.')}, seed {args.seed}")

    if args.image is not None and args.image.suffix.lower() not in media.PICTURES and not led:
        frames = media.load_video(args.image)
        if len(frames) < WINDOW:
            raise ValueError(f"{args.image}: {len(frames)} frames, to be continued a video needs at least {WINDOW}")
        job = replace(job, video=make_warp(frames, None, size).frames)
    elif args.image is not None:
        picture = media.load_image(args.image)
        job = replace(job, image=media.fit_image(picture, size, crop=c2w is not None))

    if c2w is not None:
        fov = (path and path.fov_x) or args.fov or DEFAULT_FOV
        depth = media.load_depth(args.depth) if args.depth else torch.ones(1, 1)
        geometry = geometry_from_depth(job.image.to(args.device), depth.to(args.device), pinhole(fov, *size))
        camera = Camera(geometry, size)
        print(f"camera: {len(c2w)} poses, horizontal field of view {fov:g} degrees, one unit of the path is {camera.unit:.4g} of depth;"
              f" geometry: {args.depth or 'no --depth, so the picture stands on a plane at depth 1'}")
        frames = args.frames or len(c2w)
        return replace(job, frames=frames, camera=camera, controls=pose_chunks(c2w, frames))
    if args.warp is not None:
        there = sum(1 for _ in media.read_frames(args.warp))
        masked = there if args.mask is None else sum(1 for _ in media.read_mask(args.mask))
        if masked != there or there < (args.frames or 1):
            raise ValueError(f"{args.warp} has {there} frames and the mask {masked}, expected {args.frames or 'as many'} in both")
        frames = args.frames or there
        return replace(job, frames=frames, controls=warp_chunks(args.warp, args.mask, frames, size))
    return replace(job, controls=({} for _ in range(0, job.frames, WINDOW)))


# ------------------------------------------------------------------------------------------------------------ outputs


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


def to_frames(video: Tensor) -> np.ndarray:
    """[1, C, T, H, W] in 0..1 -> [T, H, W, 3] uint8, gray repeated."""
    return rearrange(to_u8(video[0]).expand(3, -1, -1, -1), "c t h w -> t h w c").cpu().numpy()


class Output:
    """The video, its warp and the tiles of the contact sheet, written as chunks arrive.

    `files` closes the videos, which appear under their names when it ends without an error.
    """

    def __init__(self, path: Path, job: Job, files: ExitStack):
        self.job, self.count = job, 0
        self.paths = {"result": path} | ({"warp": path.with_name(f"{path.stem}_warp.mp4")} if job.led else {})
        self.videos = {name: files.enter_context(media.VideoWriter(file, job.fps, job.size)) for name, file in self.paths.items()}
        self.picks = set(media.evenly_spaced(job.frames, 8))
        self.tiles: dict[str, list[np.ndarray]] = {name: [] for name in (("warp", "mask") if job.led else ()) + ("result",)}

    def add(self, chunk: Chunk) -> None:
        rows = {"result": to_frames(chunk.frames / 2 + 0.5)}
        if self.job.led:
            rows |= {"warp": to_frames(chunk.warp.frames / 2 + 0.5), "mask": to_frames(chunk.warp.visible)}
        for index in range(min(WINDOW, self.job.frames - self.count)):
            for name, frames in rows.items():
                if name in self.videos:
                    self.videos[name].write(frames[index])
                if self.count in self.picks:
                    self.tiles[name].append(frames[index])
            self.count += 1

    def save_sheet(self) -> None:
        self.paths["sheet"] = self.paths["result"].with_name(f"{self.paths['result'].stem}_sheet.png")
        media.save_png(self.paths["sheet"], media.contact_sheet({name: np.stack(tiles) for name, tiles in self.tiles.items()}))


def peak_memory(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory"


def run(args: argparse.Namespace) -> None:
    job = prepare(args)
    with ExitStack() as files:
        output = Output(args.out, job, files)
        latents_file = files.enter_context(media.replacing(args.save_latents)) if args.save_latents else None
        prompts = encode_prompts(args.weights, args.prompt, job.lora is not None, job.options.guidance > 1, args.device)
        models = load_models(args.weights, args.device)
        progress = Progress(job.options, models.schedule.sampler == "dmd", chunks=-(-job.frames // WINDOW))
        generator = torch.Generator("cpu").manual_seed(args.seed)
        begin = time.perf_counter()
        rollout = Rollout(models, prompts, job.size, generator, job.image, job.video, job.camera, job.lora, job.options, progress)
        latents = [rollout.given.cpu()]
        try:
            for control in job.controls:
                chunk = rollout.next(**control)
                output.add(chunk)
                if latents_file:
                    latents.append(chunk.latents.cpu())
        except KeyboardInterrupt:
            if not output.count:
                raise
            print(f"\nstopped: keeping the {output.count} frames that are done")
        progress.close()
        seconds = time.perf_counter() - begin
        if latents_file:  # as the official latent output, with the fake latent (or the video's latents) in front
            latents_file.write_bytes(save({"latents": torch.cat(latents, dim=2)}))
    output.save_sheet()
    print(f"wrote {output.count} frames:", *output.paths.values(), args.save_latents or "")
    print(f"{seconds / rollout.chunk:.2f} s/chunk, {output.count / seconds:.2f} frames/s, {rollout.flops / seconds / 1e12:.3g} TFLOP/s"
          f" ({rollout.flops / 1e12:.3g} TFLOP counted in the transformer), peak {peak_memory(args.device)}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsample.py: stopped before the first chunk, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
