"""The folder of a training run (files/folder.py): what it holds, and how a run goes on.

state.safetensors holds all that --resume needs, the LoRA too, so that it is whole by itself whenever the program dies;
lora.safetensors is the result; metrics.jsonl and loss.png say how it went; sample_STEP.png are looked at on the way.
The geometry of the clips lies there too, and serves every later run in the folder.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from files.cli import what_to_do
from files.draw import draw_curve, save_png
from files.folder import STATE, Folder
from files.state import check_same, pack, pack_state, read_state
from files.writing import replacing

GEOMETRY = "geometry_"  # begins the names of what a new run in the folder keeps


class Run:
    """`with Run(folder, free, resume, overwrite) as run:` is a run under way. `free` names what it depends on that may
    change when it goes on."""

    def __init__(self, folder: Path, free: set[str], resume: bool, overwrite: bool):
        self.folder, self.free, self.overwrite = Folder(folder, "train.py"), free, overwrite
        self.going_on = resume
        self.state = folder / STATE
        self.lora = folder / "lora.safetensors"
        self.log = folder / "metrics.jsonl"
        self.curve = folder / "loss.png"
        self.about: dict = {}  # what the run depends on
        self.metrics: list[dict] = []  # of each step
        self.saved = 0  # steps

    @property
    def files(self) -> tuple[Path, ...]:
        return self.state, self.lora, self.log, self.curve

    def __enter__(self) -> "Run":
        """Raises ValueError or OSError if there is nothing to resume, or a run that would be lost."""
        self.folder.__enter__()
        try:
            if self.going_on and not self.state.is_file():
                raise ValueError(f"--resume: no {self.state}, so nothing was saved: the same words without --resume"
                                 " begin")
            if self.state.exists() and not (self.going_on or self.overwrite):
                raise ValueError(f"{self.folder.path} holds a run already: --resume goes on, --overwrite starts anew")
        except BaseException:
            self.folder.__exit__(None, None, None)
            raise
        return self

    def place(self, name: str) -> Path:
        """Where a file of that name is, whoever made it, or is to be made."""
        path = self.folder.path / name
        return path if path.is_file() else self.folder.claim(name)

    def begin(self, about: dict, machine: str = "") -> None:
        """Remove all that an earlier run left, but the clips' geometry."""
        self.about, self.machine = json.loads(json.dumps(about)), machine
        self.folder.remove(keep=GEOMETRY)

    def resume(self, about: dict, machine: str = "") -> tuple[dict[str, Tensor], int]:
        """Check that the saved state is one of this run, forget what was measured after it, and return it with its
        step."""
        self.about, self.machine = json.loads(json.dumps(about)), machine
        state, header = read_state(self.state)
        check_same(self.state, self.fixed(json.loads(header["run"])), self.fixed(self.about), "--resume")
        if header["machine"] != machine:
            print(f"going on with {machine}, begun with {header['machine']}: the losses may differ from those of an"
                  " uninterrupted run in their last digits")
        self.metrics, self.saved = json.loads(header["metrics"]), int(header["step"])
        with replacing({"log": self.folder.claim(self.log.name)}) as files:
            files["log"].write_text("".join(f"{json.dumps(each)}\n" for each in self.metrics))
        return state, self.saved

    def fixed(self, about: dict) -> dict:
        """What may not change when a run goes on."""
        return {name: value for name, value in {**about, **about.get("recipe", {})}.items()
                if name not in {*self.free, "recipe"}}

    def add(self, metrics: dict) -> None:
        self.metrics.append(metrics)
        try:
            with open(self.folder.claim(self.log.name), "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise OSError(f"{self.log}: could not be written ({what_to_do(error)}); {self.last()}") from None

    def save(self, step: int, state: dict[str, Tensor], lora: dict[str, Tensor], about: dict[str, str]) -> None:
        """LoRA (with what is said `about` it in its header), curve and state, each under another name until it is
        complete; the state is the last, so that what it goes on from is never ahead of the others."""
        header = {"run": json.dumps(self.about), "step": str(step)}
        more = {"machine": self.machine, "metrics": json.dumps(self.metrics)}
        try:
            outputs = {"lora": self.lora, "curve": self.curve, "state": self.state}
            with replacing({name: self.folder.claim(path.name) for name, path in outputs.items()}) as files:
                files["lora"].write_bytes(pack(lora, header | about))
                save_png(files["curve"], draw_curve([each["loss"] for each in self.metrics]))
                files["state"].write_bytes(pack_state(state, header | more))
        except OSError as error:
            raise OSError(f"{self.folder.path}: step {step} could not be saved ({what_to_do(error)}); {self.last()}"
                          ) from None
        self.saved = step

    def sheet_path(self, step: int) -> Path:
        return self.folder.path / f"sample_{step:06d}.png"

    @contextmanager
    def sheet(self, step: int) -> Iterator[Path]:
        """Where to write the picture of a step."""
        with replacing({"sheet": self.folder.claim(self.sheet_path(step).name)}) as files:
            yield files["sheet"]

    def last(self) -> str:
        return f"step {self.saved} is safe there" if self.saved else "nothing had been saved before"

    def __exit__(self, error_type, error, traceback) -> None:
        self.folder.__exit__(None, None, None)
        if error_type is KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.folder.path}: {self.last()}") from None
