"""What sample.py leaves: the video, its warp and a contact sheet, and on the way there every chunk as soon as it is
made.

For out.mp4 a folder out_parts holds each chunk's pieces, 0000_video.mp4, 0000_warp.mp4 and 0000.safetensors
(latents), and state.safetensors, from which the run can go on. The state is replaced last and at once, so whenever
the program dies there are whole chunks and a state that fits them. At the end the pieces are joined without encoding
anew, and the folder goes.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from files.checkpoint import open_safetensors
from files.draw import contact_sheet, evenly_spaced
from files.video import join_videos, write_video
from files.writing import replacing

PIECES = "[0-9]*_video.mp4", "[0-9]*_warp.mp4", "[0-9]*.safetensors", "*state*.safetensors", ".[0-9]*.txt"


class Output:
    """A video under way. `about` says what it depends on: a state of another video is refused."""

    def __init__(self, out: Path, about: dict, resume: bool, frames: int, fps: float, led: bool):
        """frames: of the whole video; led: there are warps. Raises ValueError or OSError if there is no state to
        resume, or one that would be lost."""
        self.folder = out.with_name(f"{out.stem}_parts")
        self.path = self.folder / "state.safetensors"
        self.about = json.loads(json.dumps(about))
        self.frames, self.fps = frames, fps
        self.counts: list[int] = []  # frames of each chunk that is whole
        self.tiles: dict[str, list] = {name: [] for name in (("warp", "mask", "result") if led else ("result",))}
        self.picks = evenly_spaced(frames, 8)
        self.rollout: dict[str, Tensor] | None = None  # the state to go on from
        if resume:
            self.load()
        elif self.path.exists():
            raise ValueError(f"{self.folder} holds an unfinished video: --continue goes on with it; remove it"
                             f" to start anew")

    @property
    def count(self) -> int:
        return sum(self.counts)

    def load(self) -> None:
        with open_safetensors(self.path) as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key).clone() for key in file.keys()}
        if not {"about", "counts"} <= header.keys():
            raise ValueError(f"{self.path}: not a state of this program")
        old = json.loads(header["about"])
        for name in sorted(old.keys() | self.about.keys()):
            if old.get(name) != self.about.get(name):
                raise ValueError(
                    f"{self.path}: {name} was {old.get(name)}, now it is {self.about.get(name)}; --continue"
                    " needs the same"
                )
        self.counts = json.loads(header["counts"])
        self.tiles = {name: list(state.pop(f"tiles.{name}").numpy()) for name in self.tiles}
        self.rollout = state

    def piece(self, index: int, ending: str) -> Path:
        return self.folder / f"{index:04d}{ending}"

    def add(self, rows: dict[str, np.ndarray], latents: Tensor, rollout: dict[str, Tensor]) -> None:
        """Write a chunk; it is whole when the state after it is there. `rows` are its result, and its warp and mask
        if there are any, [T, H, W, 3] uint8; `rollout` is the state to go on from."""
        self.folder.mkdir(exist_ok=True)
        index, begun = len(self.counts), self.count
        length = min(len(rows["result"]), self.frames - begun)
        for row, name in (("result", "_video.mp4"), ("warp", "_warp.mp4")):
            if row in rows:
                write_video(self.piece(index, name), rows[row][:length], self.fps)
        self.piece(index, ".safetensors").write_bytes(save({"latents": latents.cpu()}))
        for name, tiles in self.tiles.items():
            tiles += [rows[name][pick - begun].copy() for pick in self.picks if 0 <= pick - begun < length]
        tiles = {f"tiles.{name}": torch.from_numpy(np.stack(tiles)) for name, tiles in self.tiles.items()}
        # own storages
        state = {name: value.to("cpu", copy=True).contiguous() for name, value in (rollout | tiles).items()}
        counts = [*self.counts, length]
        with replacing({"state": self.path}, []) as files:
            files["state"].write_bytes(save(state, {"about": json.dumps(self.about), "counts": json.dumps(counts)}))
        self.counts = counts

    def join(self, ending: str, out: Path) -> None:
        join_videos([self.piece(index, ending) for index in range(len(self.counts))], self.counts, self.fps, out)

    def latents(self, given: Tensor) -> Tensor:
        """Those of all chunks, after those given in front."""
        parts = [given.cpu()]
        for index in range(len(self.counts)):
            with open_safetensors(self.piece(index, ".safetensors")) as file:
                parts.append(file.get_tensor("latents"))
        return torch.cat(parts, dim=2)

    def sheet(self) -> np.ndarray:
        return contact_sheet({name: np.stack(tiles) for name, tiles in self.tiles.items()})

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """The folder goes after a whole video, and when no chunk is whole."""
        if self.counts and (error_type is not None or self.count < self.frames):
            return
        for path in (path for pattern in PIECES for path in self.folder.glob(pattern)):
            path.unlink()
        with suppress(OSError):  # there is none, or it holds something else
            self.folder.rmdir()
