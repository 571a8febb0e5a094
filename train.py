"""Command line: a video in, a camera-control LoRA out.

    python train.py --video car-roundabout --prompt "a car driving through a roundabout" --out runs/car

Trains the LoRA of `trainer.py` on the clips of `clips.py` and keeps all of a run in one folder: the LoRA in the
official format, which sample.py, diffusers and PEFT load; the state from which --resume continues with the same losses;
a line of numbers a step, and their curve. Words and files are checked before the networks are loaded, files are written
under temporary names, and Ctrl-C saves. The official loop encodes each window anew in every step; here they are kept.
"""

import argparse
import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save
from tqdm import tqdm

import media
from camera import WINDOW, CameraPath, describe
from checkpoint import network_dtype, open_safetensors, read_json
from clips import (Clip, Conditions, Geometries, Source, draw_case, estimate_clip, files_beside, item_order,
                   known_geometry, read_frames, read_sources)
from flow import load_schedule
from output import to_frames
from pi3x import load_pi3x
from render import parse_size, run_program
from sample import check_place, default_weights, find_geometry, peak_memory
from trainer import TARGETS, Recipe, Trainer, build_history, parse_recipe
from wah import (MEMORY, NEGATIVE_PROMPT, Camera, Models, Prompts, Rollout, add_trigger, embed_prompts, load_models,
                 load_options, native_size, size_multiple)

FREE = {"steps", "save_every", "sample_every", "checkpointing", "keep_attention", "cache"}  # may change when a run goes on


def draw_curve(losses: list[float]) -> np.ndarray:
    """Losses over steps, pale, and their running mean: a picture [360, 640, 3] uint8."""
    image = Image.new("RGB", (640, 360), "white")
    draw, count, values = ImageDraw.Draw(image), len(losses), np.array(losses)
    left, top, right, bottom = 56, 32, 620, 320
    high = 1.1 * np.quantile(values, 0.99) + 1e-9  # a single high value would flatten the rest
    mean = [values[max(0, index - 24):index + 1].mean() for index in range(count)]

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / count, bottom - (bottom - top) * min(value / high, 1)

    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), step = place(share * count, share * high), round(share * count)
        draw.line([(left, y), (right, y)], fill="lightgray")
        draw.text((left - 6, y), f"{share * high:.2g}", fill="black", anchor="rm")
        draw.text((x, bottom + 6), f"{step}", fill="black", anchor="ma")
    for line, color, width in ((values, "lightskyblue", 1), (mean, "darkblue", 3)):
        draw.line([place(step, value) for step, value in enumerate(line, start=1)], fill=color, width=width)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    draw.text((left, 10), f"loss over steps; dark: the mean of 25, now {mean[-1]:.4g}", fill="darkblue")
    return np.array(image)


class Run:
    """The folder of a run: state.safetensors, lora.safetensors, metrics.jsonl, loss.png, and sample_STEP.png.

    The state holds the LoRA too, so that it is whole by itself whenever the program dies: --resume reads nothing else.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {"state": folder / "state.safetensors", "lora": folder / "lora.safetensors",
                      "metrics": folder / "metrics.jsonl", "curve": folder / "loss.png"}
        self.about: dict = {}  # what the run depends on
        self.metrics: list[dict] = []  # of each step
        self.saved = 0  # steps

    def check(self, resume: bool, overwrite: bool) -> None:
        there = [path.name for path in self.files.values() if path.exists()]
        if resume and not self.files["state"].is_file():
            raise ValueError(f"--resume: no {self.files['state']}")
        if there and not (resume or overwrite):
            raise ValueError(f"{self.folder} holds a run already ({', '.join(there)}):"
                             " --resume goes on, --overwrite starts anew")

    def begin(self, about: dict, trainer: Trainer, resume: bool) -> None:
        """Take the saved state and forget what was measured after it, or remove all that an earlier run left."""
        self.about = json.loads(json.dumps(about))
        if not resume:
            for path in (*self.files.values(), *self.folder.glob("sample_*.png")):
                path.unlink(missing_ok=True)
            return
        path = self.files["state"]
        with open_safetensors(path) as file:
            header = file.metadata() or {}
        if not {"run", "step"} <= header.keys():
            raise ValueError(f"{path}: not a state of this program")
        old, new = ({**each, **each["recipe"]} for each in (json.loads(header["run"]), self.about))
        for name in sorted(new.keys() - FREE - {"recipe"}):
            if new[name] != old.get(name):
                raise ValueError(f"{path}: {name} was {old.get(name)}, now it is {new[name]}; --resume needs the same")
        trainer.restore(path, int(header["step"]))
        self.saved = trainer.steps
        metrics = self.files["metrics"]
        lines = metrics.read_text().splitlines(keepends=True)[:trainer.steps] if metrics.exists() else []
        self.metrics = [json.loads(line) for line in lines]
        with media.replacing({"metrics": metrics}, []) as files:
            files["metrics"].write_text("".join(lines))

    def add(self, metrics: dict) -> None:
        self.metrics.append(metrics)
        try:
            with open(self.files["metrics"], "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise OSError(f"{self.files['metrics']}: could not be written ({error}); {self.last()}") from None

    def save(self, trainer: Trainer) -> None:
        """State, LoRA and curve, each under another name until it is complete."""
        recipe, step = trainer.recipe, str(trainer.steps)
        settings = {"r": recipe.rank, "lora_alpha": recipe.scale * recipe.rank, "target_modules": list(TARGETS)}
        settings = {f"transformer.{key}": value for key, value in settings.items()}  # as diffusers and PEFT read it
        header = {"run": json.dumps(self.about), "step": step}
        lora = {name: matrix.detach() for name, matrix in trainer.tensors.items()}
        try:
            with media.replacing({key: self.files[key] for key in ("state", "lora", "curve")}, []) as files:
                files["state"].write_bytes(save(trainer.state(), header))
                files["lora"].write_bytes(save(lora, header | {"lora_adapter_metadata": json.dumps(settings)}))
                media.save_png(files["curve"], draw_curve([each["loss"] for each in self.metrics]))
        except OSError as error:
            raise OSError(f"{self.folder}: step {step} could not be saved ({error}); {self.last()}") from None
        self.saved = trainer.steps

    def last(self) -> str:
        return f"step {self.saved} is safe there" if self.saved else "nothing had been saved before"


# ------------------------------------------------------------------------------------------------------------- program


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is cut in two; a second one stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; Ctrl-C again stops at once, without saving")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def load_clips(args: argparse.Namespace, sources: list[Source], size: tuple[int, int], recipe: Recipe) -> list[Clip]:
    pi3x = find_geometry(args.geometry, args.weights)
    given = list(zip(args.poses, args.depth))
    given = given or [None if args.geometry else files_beside(source.video) for source in sources]
    if None in given and pi3x is None:
        raise ValueError("no geometry: give the Pi3X weights (--geometry FILE; weights/README.md says where they are),"
                         " or the clip's own --poses and --depth")
    frames = [read_frames(source.video, size) for source in sources]
    args.out.mkdir(parents=True, exist_ok=True)
    network = cache(partial(load_pi3x, pi3x, args.device, network_dtype(args.device)))
    clips = []
    for source, each, known in zip(sources, frames, given):
        if known is not None:
            path = known_geometry(source.video, *known, each, args.out)
            forward, reverse = Geometries(path, args.device), Geometries(path, args.device, backwards=True)
        else:
            estimated = partial(estimate_clip, pi3x, network, pixels=recipe.geometry_pixels, folder=args.out)
            forward, reverse = (Geometries(estimated(images), args.device) for images in (each, each.flip(0)))
        clips.append(Clip(add_trigger(source.prompt), each, forward, reverse))
        print(f"{source.video}: {len(each)} frames, prompt {clips[-1].prompt!r}, geometry {forward.path.name},"
              f" camera: {describe(CameraPath(forward.c2w))}")
    return clips


def draw_sample(models: Models, prompts: Prompts, trainer: Trainer, clip: Clip, weights: Path, path: Path) -> None:
    """A contact sheet of what the LoRA makes of the clip's first frame and its own camera, with a fixed seed."""
    size, generator = tuple(clip.frames.shape[2:]), torch.Generator().manual_seed(trainer.recipe.seed)
    camera = Camera(clip.forward[0], size, unit=1.0)  # the poses are in the geometry's own unit
    rollout = Rollout(models, prompts, size, generator, image=clip.pixels(0)[:, :, 0], camera=camera, lora=trainer.lora,
                      options=load_options(weights))
    chunk = rollout.next(poses=clip.forward.c2w[:WINDOW])
    models.transformer.set_lora(trainer.lora)
    rows = {"video": clip.pixels(*range(WINDOW)), "warp": chunk.warp.frames, f"step {trainer.steps}": chunk.frames}
    with media.replacing({"sheet": path}, []) as files:
        media.save_png(files["sheet"], media.contact_sheet({name: to_frames(x / 2 + 0.5) for name, x in rows.items()}))


def report(trainer: Trainer, steps: int, device: str) -> None:
    seconds, total = trainer.clock.seconds, sum(trainer.clock.seconds.values())
    split = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in seconds.items())
    work = trainer.flops / 1e12
    busy = sum(value for name, value in seconds.items() if name in ("forward", "backward"))
    print(f"{total / steps:.3g} s/step ({split}), {trainer.tokens / steps:.0f} tokens/step, {work / busy:.3g} TFLOP/s"
          f" in forward and backward ({work / steps:.3g} TFLOP/step counted in the blocks: forward, recomputation,"
          f" gradients of activations), peak {peak_memory(device)}")


def check(args: argparse.Namespace) -> tuple[Recipe, tuple[int, int], list[Source]]:
    """What can be said of the words alone."""
    check_place(args.device, args.weights)
    recipe = parse_recipe([*read_json(args.weights / "model_index.json").get("train", []), *args.set])
    sources = read_sources(args.video, args.prompt)
    if args.memory == "stream" and not recipe.checkpointing:
        raise ValueError("--memory stream needs --set checkpointing=true: the backward pass fetches the blocks once more")
    schedule = load_schedule(args.weights)
    size, multiple = native_size(args.weights) if args.size is None else parse_size(args.size), size_multiple(schedule)
    if any(side % multiple for side in size):
        raise ValueError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {multiple}")
    if not set(recipe.stages) <= set(range(schedule.stages)) or not recipe.stages:
        raise ValueError(f"--set stages={recipe.stages}: {args.weights} has stages 0 to {schedule.stages - 1}")
    if not len(args.poses) == len(args.depth) in (0, len(sources)):
        raise ValueError(f"{len(args.poses)} --poses and {len(args.depth)} --depth: expected one of each for each of the"
                         f" {len(sources)} videos, or none")
    return recipe, size, sources


def train(args: argparse.Namespace) -> None:
    recipe, size, sources = check(args)
    run = Run(args.out)
    run.check(args.resume, args.overwrite)
    clips = load_clips(args, sources, size, recipe)
    wanted = {clip.prompt for clip in clips} | ({sources[0].prompt, NEGATIVE_PROMPT} if recipe.sample_every else set())
    embeddings = embed_prompts(args.weights, wanted, args.device, args.memory)
    models = load_models(args.weights, args.device, args.memory)
    trainer = Trainer(models.transformer, models.schedule, recipe)
    conditions = Conditions(models.vae, clips, size, recipe, recipe.cache, args.device)
    data = [{"video": source.video.name, "prompt": source.prompt, "geometry": clip.forward.path.name}
            for source, clip in zip(sources, clips)]  # the geometry's name stands for the frames too
    about = {"base": args.weights.resolve().name, "fp8": args.memory == "fp8", "size": size, "clips": data,
             "recipe": asdict(recipe)}
    run.begin(about, trainer, args.resume)
    text_of = lru_cache(1)(lambda prompt: models.transformer.text(embeddings[prompt]))  # 0.4 GB in the released model
    began, clock = trainer.steps, trainer.clock
    order = islice(item_order(len(clips), recipe.seed), began, recipe.steps)
    with deferred_interrupt() as stop, tqdm(total=recipe.steps, initial=began, unit="step") as bar:
        clock.start()
        for index in order:
            case = draw_case(recipe, len(clips[index].frames), f"online_{index:06d}", trainer.steps + 1)
            condition, text = conditions(index, case), text_of(clips[index].prompt)
            history = build_history(condition, recipe, trainer.generator)
            clock.lap("data")
            try:
                metrics = trainer.step(history, condition.target, text)
            except ValueError as error:
                raise ValueError(f"{error}; {run.last()}") from None
            run.add({**metrics, "video": index})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", grad_norm=f"{metrics['grad_norm']:.3f}", refresh=False)
            bar.update()
            if trainer.steps % recipe.save_every == 0 or trainer.steps == recipe.steps or stop.is_set():
                run.save(trainer)
            if recipe.sample_every and trainer.steps % recipe.sample_every == 0:
                prompts = Prompts(*(embeddings[each] for each in (sources[0].prompt, clips[0].prompt, NEGATIVE_PROMPT)))
                sheet = args.out / f"sample_{trainer.steps:06d}.png"
                draw_sample(models, prompts, trainer, clips[0], args.weights, sheet)
            clock.lap("saving")
            if stop.is_set():
                break
    if trainer.steps > began:
        report(trainer, trainer.steps - began, args.device)
    if trainer.steps < recipe.steps:
        words = [word for word in args.words if word not in ("--resume", "--overwrite")]
        print("stopped; to go on: python train.py", shlex.join([*words, "--resume"]))
    print(f"{trainer.steps} steps; wrote", *run.files.values())


def main(argv: list[str] | None = None) -> int:
    about = "Train a LoRA that makes Helios follow a camera, on one video or a few."
    parser = argparse.ArgumentParser("train.py", usage=argparse.SUPPRESS, description=about)  # one line an error
    parser.add_argument("--video", action="append", required=True, help="mp4, folder of frames, or a name in data/;"
                        " repeat it for several, or give a csv with the columns video and prompt")
    parser.add_argument("--prompt", action="append", default=[], help="what a video shows; for each, or once for all")
    parser.add_argument("--weights", type=Path, default=default_weights(),
                        help="folder in the official layout (default as for sample.py)")
    geometry = parser.add_mutually_exclusive_group()
    geometry.add_argument("--geometry", type=Path, help="Pi3X weights (default: Pi3X/model.safetensors in the weights'"
                                                        " folder or beside it)")
    geometry.add_argument("--depth", action="append", default=[], type=Path, help="instead: a video's depths, npy or npz"
                          " [T,h,w] or a folder of 16-bit png, and with them; of several videos in their order")
    parser.add_argument("--poses", action="append", default=[], type=Path,
                        help="its camera, a pose for each frame in the unit of the depths")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder of the run")
    parser.add_argument("--size", help="HEIGHTxWIDTH, multiples of 64 (default: the model's own, officially 384x640)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="numbers of the recipe, such as steps=500 rank=16 lr=2e-4; Recipe in trainer.py has all")
    going = parser.add_mutually_exclusive_group()
    going.add_argument("--resume", action="store_true", help="go on where the run in --out was saved")
    going.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")
    parser.add_argument("--memory", choices=MEMORY, default="full", help="how the weights are held, as in sample.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    return run_program("train.py", train, args)


if __name__ == "__main__":
    sys.exit(main())
