"""What the page shows and drives: one picture and its geometry, keyframes, one rollout, the frames made so far.

It has one worker, so that nothing runs twice, and knows nothing of browsers (view.py is the page). Film: keyframes, a
smooth path, the video along it, the same as sample.py makes of that path. Drive: each next chunk goes from where the
camera is to wherever somebody looks then. With Pi3X later chunks see geometry estimated anew; the points shown are
the first's.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import job
from files.draw import save_ply
from files.machine import allow_tf32, use_device
from files.media import load_image, read_rate, to_frames
from files.video import write_video
from geometry.camera import WINDOW, CameraPath, square_lens
from geometry.flight import drive, film
from geometry.paths import load_path, path_json
from geometry.surface import Geometry
from helios.load import Prompts, encode_prompts, load_models
from memory import Camera, Memory
from model import Helios
from wah import Rollout, stage_steps

UPLOAD = 50 * 2**20  # bytes of a picture at most


class Studio:
    """One picture, its keyframes, and what has been filmed. `submit` returns at once; `changed` hears of what is
    new."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.settings = args, job.load_settings(args)
        self.size = job.choose_size(args)
        self.lora = job.choose_lora(args, self.settings)
        allow_tf32(self.settings.tf32)
        # each thread has a current card of its own
        self.worker = ThreadPoolExecutor(max_workers=1, initializer=use_device, initargs=(self.settings.device,))
        self.folder = tempfile.TemporaryDirectory()  # of pictures that were sent
        self.changed: list[Callable[[], None]] = []
        self.stopping, self.stops = threading.Event(), 0
        self.filming: Future | None = None  # the last film that was asked for and not stopped
        self.prompt, self.seed, self.preset = args.prompt, self.settings.seed, self.settings.preset
        self.message, self.progress = "", 0.0
        self.worlds = 0
        self.prompts: tuple[str, Prompts] | None = None
        self.open(self.check(args.image, args.depth, args.poses, args.set))
        self.models = load_models(Helios, args.weights, self.settings.device, args.memory, self.settings.vae)
        if self.settings.compile:
            self.models.transformer.compile_blocks()

    def check(self, image: Path | None, depth: Path | None = None, poses: Path | None = None,
              needed: Sequence[str] = ()) -> argparse.Namespace:
        """The words of another picture, or of the clip that they name; of `poses` the lens alone is taken. `needed` are
        words of --set that are refused if they do nothing here; the settings are the same without. Raises ValueError or
        OSError."""
        video = self.args.video if image is None else None
        known = {"image": image, "depth": depth, "poses": poses, "video": video, "move": "hold", "set": needed}
        words = argparse.Namespace(**{**vars(self.args), **known})
        job.check(words, self.settings)
        return words

    def open(self, words: argparse.Namespace) -> None:
        """The picture or clip of the words; the old world is forgotten. Raises ValueError or OSError, and nothing
        changes then."""
        self.start(words, self.settings)
        self.forget()
        self.fps = self.settings.fps or (words.video and read_rate(words.video)) or 16  # as sample.py has it
        self.keys: list[Tensor] = [torch.eye(4)]  # relative to the picture's camera, in its own unit
        self.seconds: list[float] = []

    def start(self, words: argparse.Namespace, settings: job.Settings) -> None:
        """The picture or clip of the words with its geometry, estimated once for all films. What was filmed stays,
        but does not go on."""
        frames = 2 * WINDOW if words.video is None else job.count_frames(words.video, None)
        file, pi3x = job.open_pi3x(words, settings, frames)
        fov = None if words.poses is None else load_path(words.poses).fov_x
        lens = {} if fov is None else square_lens(fov)
        still = CameraPath(torch.eye(4).repeat(2, 1, 1), **lens)
        self.first = job.start_path(words, settings, self.size, still, file, pi3x, frames)
        self.words, self.lens, self.fresh = words, lens, self.camera.state()  # lens: that of a path file, if any
        self.worlds += 1  # so that pages notice
        self.rewind()

    def receive(self, name: str, content: bytes) -> None:
        """A picture that was sent, checked as a file is. A good one ends the film under way and is opened then; a bad
        one raises ValueError, and nothing else happens."""
        if len(content) > UPLOAD:
            raise ValueError(f"{name}: {len(content)} bytes, expected at most {UPLOAD}")
        with tempfile.NamedTemporaryFile(dir=self.folder.name, suffix=Path(name).suffix, delete=False) as file:
            file.write(content)
        path = Path(file.name)
        try:
            words = self.check(path)
            load_image(path)
        except (ValueError, OSError) as error:
            path.unlink()
            raise ValueError(str(error).replace(str(path), name)) from None
        self.stop()
        self.submit(lambda: self.show(words, name))

    def show(self, words: argparse.Namespace, name: str) -> None:
        """Open a picture that was sent; it is kept until another one comes."""
        other = self.words.image
        self.open(words)
        if other is not None and other.parent == words.image.parent:
            other.unlink()
        self.tell(f"{name} is the picture now")

    def prefer(self, preset: str) -> None:
        """Another preset of settings, from the next film on: the LoRA and the geometry may be others."""
        kept = [word for word in self.args.set if not word.startswith("preset=")]
        args = argparse.Namespace(**{**vars(self.args), "set": [*kept, f"preset={preset}"]})
        try:
            settings = job.load_settings(args)
            lora = job.choose_lora(args, settings)
            self.start(self.words, settings)
            self.args, self.settings, self.lora = args, settings, lora
            self.prompts = None  # a LoRA has a trigger
        finally:
            self.preset = self.settings.preset
        self.tell(f"preset {preset}")

    def rewind(self) -> None:
        """The camera as it was before any film; what comes next is a new one."""
        self.camera.restore(self.fresh)
        self.rollout: Rollout | None = None
        self.here = torch.eye(4)  # where the next chunk of a drive begins
        self.rate = 0.0  # seconds a chunk

    def forget(self) -> None:
        """No film yet."""
        self.rewind()
        self.frames: list[np.ndarray] = []  # [H, W, 3] uint8
        self.path = torch.empty(0, 4, 4)  # that the frames were made along
        self.rest: list[np.ndarray] = []  # of the last chunk, beyond the path

    @property
    def camera(self) -> Camera | Memory:
        assert self.first.camera is not None
        return self.first.camera

    @property
    def geometry(self) -> Geometry:
        return self.camera.reference if isinstance(self.camera, Memory) else self.camera.geometry

    @property
    def picture(self) -> np.ndarray:
        """The first frame, [H, W, 3] uint8."""
        assert self.first.image is not None
        return to_frames(self.first.image[:, :, None])[0]

    def tell(self, message: str | None = None) -> None:
        self.message = self.message if message is None else message
        for hear in list(self.changed):
            hear()

    def stop(self) -> None:
        """The film under way ends after its chunk, and those that wait don't begin."""
        self.stops, self.filming = self.stops + 1, None
        self.stopping.set()

    def submit(self, work: Callable[[], None], film: bool = False) -> Future:
        """Let the worker do it, after what it is at; an error is shown, and the studio lives on. A `film` can be
        stopped."""
        stops = self.stops

        def run() -> None:
            if film and stops != self.stops:
                return
            try:
                work()
            except Exception as error:  # whatever it is, the page has to go on
                self.tell(f"**{'error' if isinstance(error, ValueError) else type(error).__name__}**: {error}")
            self.progress = 0.0
            self.tell()

        done = self.worker.submit(run)
        if film:
            self.filming = done
        return done

    def replace_film(self, work: Callable[[], None]) -> None:
        """Let the worker make a film in the place of the one that is there; refused while that one is under way."""
        if self.filming is not None and not self.filming.done():
            raise ValueError("a film is under way; stop it first, or wait for its end")
        self.submit(work, film=True)

    # ---- making

    def planned(self) -> Tensor:
        """The path through the keyframes [T, 4, 4]."""
        if len(self.keys) < 2:
            raise ValueError("a path takes two keyframes, and there is only the picture's own; add a keyframe first")
        return film(torch.stack(self.keys), self.seconds, self.fps)

    def preview(self) -> None:
        """The frames of the warp along the planned path, in the film's place."""
        self.stopping.clear()
        path, camera = self.planned(), self.camera
        if isinstance(camera, Memory):
            camera = Camera(self.geometry, self.size, camera.unit, camera.settings)
        self.forget()
        self.tell("rendering the path ...")
        for poses in path.split(WINDOW):
            if self.stopping.is_set():
                break
            warp = camera.warp(poses).frames[:, :, :len(poses)]
            camera.remember(warp[:, :, -1])
            self.frames += list(to_frames(warp))
            self.path = path[:len(self.frames)]
            self.progress = len(self.frames) / len(path)
            self.tell(f"rendering the path: {len(self.frames)} of {len(path)} frames")
        self.tell(f"preview: the warp of {len(self.frames)} frames")

    def begin(self) -> Rollout:
        """A rollout from the picture, with the seed: the same words give the same video."""
        self.forget()
        self.tell("getting ready ...")
        generator = torch.Generator().manual_seed(self.seed)
        self.rollout = Rollout(self.models, self.embedded(), self.size, generator, self.first.image,
                               camera=self.first.camera, lora=self.lora, options=self.settings, on_step=self.on_step)
        return self.rollout

    def embedded(self) -> Prompts:
        """The prompt's embeddings, made anew when it is another. The transformer is there already, so the text encoder
        is streamed past it, whatever --memory says: the numbers are the same."""
        if "|" in self.prompt:
            raise ValueError(f"prompt {self.prompt!r}: one for each chunk is not of the page; change it between chunks")
        if self.prompts is None or self.prompts[0] != self.prompt:
            made = encode_prompts(self.args.weights, self.prompt, self.lora is not None, self.settings.guidance > 1,
                                  self.settings.device, memory="stream")
            self.prompts = self.prompt, made
        return self.prompts[1]

    def on_step(self, chunk: int, stage: int, step: int) -> None:
        steps = stage_steps(self.settings, self.models.schedule, chunk)
        self.progress = (sum(steps[:stage]) + step + 1) / (sum(steps) + 1)  # and one for the decoding
        self.tell()

    def add_chunk(self, rollout: Rollout, poses: Tensor) -> None:
        begin = time.perf_counter()
        chunk = rollout.next(poses=poses, prompts=self.embedded())
        self.rate = time.perf_counter() - begin
        made = list(to_frames(chunk.frames))
        # a film that goes on beyond its path shows the rest of its last chunk too, whose camera stood still
        self.path = torch.cat([self.path, *[self.path[-1:]] * len(self.rest), poses])
        self.frames, self.rest = [*self.frames, *self.rest, *made[:len(poses)]], made[len(poses):]
        self.tell(f"{len(self.frames)} frames; {self.rate:.1f} s a chunk, {WINDOW / self.fps / self.rate:.2f} times"
                  f" real time")

    def generate(self) -> None:
        """Film the planned path, chunk by chunk."""
        self.stopping.clear()  # before the rollout is made ready, so that "stop" counts meanwhile
        path, rollout = self.planned(), self.begin()
        for poses in path.split(WINDOW):
            if self.stopping.is_set():
                break
            self.add_chunk(rollout, poses)
            self.here = poses[-1]

    def drive(self, target: Callable[[], Tensor | None], chunks: int | None = None) -> None:
        """So many chunks, or until stopped or there is no target any more, each to where `target` then is."""
        self.stopping.clear()
        while not self.stopping.is_set() and chunks != 0 and (there := target()) is not None:
            self.add_chunk(self.rollout or self.begin(), drive(self.here, there))
            self.here = there
            chunks = None if chunks is None else chunks - 1

    # ---- leaving with something

    def saved(self, kind: str) -> bytes:
        """The film as "mp4", its path as "json" (which sample.py reads), the picture's points as "ply"."""
        if kind == "json":
            path = self.path if len(self.path) else self.planned()
            return path_json(CameraPath(path, self.fps, self.settings.unit or "depth", **self.lens)).encode()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"film.{kind}"
            if kind == "ply":
                valid = self.geometry.valid
                save_ply(file, self.geometry.points[valid].cpu().numpy(), self.geometry.rgb[valid].cpu().numpy())
            elif self.frames:
                write_video(file, np.stack(self.frames), self.fps)
            else:
                raise ValueError("nothing has been filmed yet")
            return file.read_bytes()
