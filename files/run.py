"""The folder of a training run: what it holds, and how a run goes on.

state.safetensors holds all that --resume needs, the LoRA too, so that it is whole by itself whenever the program dies;
lora.safetensors is the result; metrics.jsonl and loss.png say how it went; sample_STEP.png are looked at on the way.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from files.checkpoint import open_safetensors
from files.draw import draw_curve, save_png
from files.writing import replacing


class Run:
    """A run under way. `free` names what it depends on that may change when it goes on."""

    def __init__(self, folder: Path, free: set[str]):
        self.folder, self.free = folder, free
        self.state = folder / "state.safetensors"
        self.lora = folder / "lora.safetensors"
        self.log = folder / "metrics.jsonl"
        self.curve = folder / "loss.png"
        self.about: dict = {}  # what the run depends on
        self.metrics: list[dict] = []  # of each step
        self.saved = 0  # steps

    @property
    def files(self) -> tuple[Path, ...]:
        return self.state, self.lora, self.log, self.curve

    def check(self, resume: bool, overwrite: bool) -> None:
        there = [path.name for path in self.files if path.exists()]
        if resume and not self.state.is_file():
            raise ValueError(f"--resume: no {self.state}")
        if there and not (resume or overwrite):
            raise ValueError(f"{self.folder} holds a run already ({', '.join(there)}):"
                             " --resume goes on, --overwrite starts anew")

    def begin(self, about: dict) -> None:
        """Remove all that an earlier run left."""
        self.about = json.loads(json.dumps(about))
        for path in (*self.files, *self.folder.glob("sample_*.png")):
            path.unlink(missing_ok=True)

    def resume(self, about: dict) -> int:
        """Check that the saved state is one of this run, forget what was measured after it, and return its step."""
        self.about = json.loads(json.dumps(about))
        with open_safetensors(self.state) as file:
            header = file.metadata() or {}
        if not {"run", "step"} <= header.keys():
            raise ValueError(f"{self.state}: not a state of this program")
        old, new = ({**each, **each["recipe"]} for each in (json.loads(header["run"]), self.about))
        for name in sorted(new.keys() - self.free - {"recipe"}):
            if new[name] != old.get(name):
                raise ValueError(f"{self.state}: {name} was {old.get(name)}, now it is {new[name]}; --resume"
                                 f" needs the same")
        self.saved = int(header["step"])
        lines = self.log.read_text().splitlines(keepends=True)[:self.saved] if self.log.exists() else []
        self.metrics = [json.loads(line) for line in lines]
        with replacing({"log": self.log}, []) as files:
            files["log"].write_text("".join(lines))
        return self.saved

    def add(self, metrics: dict) -> None:
        self.metrics.append(metrics)
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise OSError(f"{self.log}: could not be written ({error}); {self.last()}") from None

    def save(self, step: int, state: dict[str, Tensor], lora: dict[str, Tensor], about: dict[str, str]) -> None:
        """State, LoRA (with what is said `about` it in its header) and curve, each under another name until it is
        complete."""
        header = {"run": json.dumps(self.about), "step": str(step)}
        try:
            with replacing({"state": self.state, "lora": self.lora, "curve": self.curve}, []) as files:
                files["state"].write_bytes(save(state, header))
                files["lora"].write_bytes(save(lora, header | about))
                save_png(files["curve"], draw_curve([each["loss"] for each in self.metrics]))
        except OSError as error:
            raise OSError(f"{self.folder}: step {step} could not be saved ({error}); {self.last()}") from None
        self.saved = step

    @contextmanager
    def sheet(self, step: int) -> Iterator[Path]:
        """Where to write the picture of a step."""
        with replacing({"sheet": self.folder / f"sample_{step:06d}.png"}, []) as files:
            yield files["sheet"]

    def last(self) -> str:
        return f"step {self.saved} is safe there" if self.saved else "nothing had been saved before"
