"""A program that dies, or finds the disk full, at a chosen moment: before or after a file is opened, in the middle of a
write, before or after a rename, a removal, a new folder. Both programs run in this process with a small stand-in for
their networks, so that every moment of a run can be tried."""

import builtins
import errno
import io
import os
import secrets
from types import SimpleNamespace as Some

import torch

from files import writing
from wah import Chunk


class Killed(BaseException):
    """The process is gone: nothing of it runs any more, least of all what cleans up."""


class Moments:
    """Counts all that touches the disk, and lets the program fail at moment number `at` (none: never): "kill" ends it
    there and then, "full" leaves the disk full until the program has ended."""

    def __init__(self, monkeypatch, at: int | None = None, how: str = "kill"):
        self.at, self.how, self.seen, self.failed = at, how, [], False
        self.open = builtins.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.opened)
        self.patched = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir", "mkdir", "truncate")}
        for name, function in self.patched.items():
            monkeypatch.setattr(os, name, self.around(name, function))
        monkeypatch.setattr(writing, "TOKEN", secrets.token_hex(4))  # as a new process has it

    def moment(self, what: str, takes_room: bool, *named: str) -> None:
        if not self.failed:
            self.seen.append(what)
            self.failed = len(self.seen) - 1 == self.at
        if self.failed and self.how == "kill":
            raise Killed(what)
        if self.failed and takes_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)

    def around(self, name: str, function):
        def call(path, *arguments, **options):
            self.moment(f"before {name} {path}", name == "mkdir", str(path))
            result = function(path, *arguments, **options)
            self.moment(f"after {name} {path}", False)
            return result
        return call

    def opened(self, path, mode="r", *arguments, **options):
        if not set(mode) & set("wax+") or isinstance(path, int):
            return self.open(path, mode, *arguments, **options)
        if mode != "rb+":
            self.moment(f"before open {path}", True, str(path))
        return Watched(self.open(path, mode, *arguments, **options), self)


class Watched:
    """A file whose writes are cut in two."""

    def __init__(self, file, moments: Moments):
        self.file, self.moments = file, moments

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, content) -> int:
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.moments.moment(f"in write {self.file.name}", True)
        self.file.write(content[half:])
        self.file.flush()
        return len(content)

    def truncate(self, size: int) -> None:
        self.moments.moment(f"before truncate {self.file.name}", False)
        self.file.truncate(size)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


# ------------------------------------------------------------------------------------------------- in place of networks


def write_frames(path, frames, fps) -> None:
    path.write_bytes(frames[:, ::16, ::16].tobytes())


def join_frames(parts, counts, fps, out) -> None:
    out.write_bytes(b"".join(part.read_bytes() for part in parts))


class Frames:
    """In place of a Rollout: noise that goes on from its state."""

    def __init__(self, models, prompts, size, generator, *_):
        self.size, self.generator, self.given = size, generator, torch.zeros(1, 4, 1, 2, 2)
        self.chunk = self.flops = 0

    def next(self, *_):
        rows = torch.rand(1, 3, 33, *(side // 16 for side in self.size), generator=self.generator) * 2 - 1
        frames = rows.repeat_interleave(16, -1).repeat_interleave(16, -2)
        return Chunk(frames, torch.randn(1, 4, 9, 2, 2, generator=self.generator), None)

    def state(self):
        return {"rng": self.generator.get_state()}

    def restore(self, state):
        self.generator.set_state(state["rng"])


def quick(monkeypatch, program: str) -> None:
    """What takes long and touches no file of the run."""
    monkeypatch.setattr(f"{program}.fingerprint", lambda *_: "weights")
    monkeypatch.setattr(os, "fsync", lambda number: None)


def stand_in_for_sampling(monkeypatch) -> None:
    quick(monkeypatch, "sample")
    monkeypatch.setattr("sample.try_encoder", lambda *_: None)
    monkeypatch.setattr("job.choose_lora", lambda *_: None)
    monkeypatch.setattr("sample.save_png", lambda path, sheet: path.write_bytes(sheet[::8, ::8].tobytes()))
    monkeypatch.setattr("sample.encode_each", lambda *_: [None])
    monkeypatch.setattr("sample.load_models", lambda *_: Some(schedule=Some(sampler="")))
    monkeypatch.setattr("sample.Rollout", Frames)
    monkeypatch.setattr("files.output.write_video", write_frames)
    monkeypatch.setattr("files.output.join_videos", join_frames)


class Steps:
    """In place of a Trainer: a number that noise is added to."""

    def __init__(self, transformer, schedule, recipe, *_):
        self.recipe, self.steps, self.flops, self.tokens = recipe, 0, 0, 0
        self.value, self.generator = torch.zeros(3), torch.Generator().manual_seed(recipe.seed)
        self.clock = Some(start=lambda: None, lap=lambda name: None, seconds={"forward": 1.0})

    def step(self, *_):
        self.value = self.value + torch.randn(3, generator=self.generator)
        self.steps += 1
        return {"step": self.steps, "loss": self.value[0].item(), "grad_norm": 1.0}

    def state(self):
        return {"value": self.value, "rng": self.generator.get_state()}

    def result(self):
        return {"value": self.value}, {"lora_adapter_metadata": "{}", "more": "words"}

    def restore(self, state, steps):
        self.value, self.steps = state["value"], steps
        self.generator.set_state(state["rng"])


def stand_in_for_training(monkeypatch) -> None:
    quick(monkeypatch, "train")
    monkeypatch.setattr("files.run.draw_curve", lambda losses: str(losses).encode())
    monkeypatch.setattr("files.run.save_png", lambda path, curve: path.write_bytes(curve))
    clip = Some(frames=range(40), prompt="", forward=Some(path=Some(name="g")))
    models = Some(transformer=Some(text=lambda embedding: None), schedule=None, vae=None)

    def load_clips(sources, known, pi3x, estimate_all, size, pixels, where, device):
        path = where("geometry_0123456789abcdef.safetensors")
        if not path.is_file():
            with writing.replacing({"file": path}) as files:
                files["file"].write_bytes(bytes(100))
        return [clip]

    monkeypatch.setattr("train.load_clips", load_clips)
    monkeypatch.setattr("train.embed_prompts", lambda weights, prompts, *_: dict.fromkeys(prompts, torch.zeros(1)))
    monkeypatch.setattr("train.load_models", lambda *_: models)
    monkeypatch.setattr("train.Trainer", Steps)
    monkeypatch.setattr("train.Conditions", lambda *_: lambda index, case: Some(target=None))
    monkeypatch.setattr("train.build_history", lambda *_: None)
    monkeypatch.setattr("train.draw_sample", lambda *words: words[-1].write_bytes(str(words[2].value.tolist()).encode()))
