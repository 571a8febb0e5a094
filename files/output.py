"""What sample.py leaves: the video, its warp and a contact sheet, and on the way there every chunk as soon as it is
made.

For out.mp4 a folder out_parts (files/folder.py) holds each chunk's pieces, 0000_video.mp4, 0000_warp.mp4 and
0000.safetensors (latents), and state.safetensors, from which the run can go on. The state is replaced last and at once,
so whenever the program dies there are whole chunks and a state that fits them. At the end the pieces are joined without
encoding anew, and the folder goes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from files.checkpoint import open_safetensors
from files.draw import contact_sheet, evenly_spaced
from files.folder import STATE, Folder
from files.state import check_same, pack_state, read_state
from files.video import join_videos, write_video
from files.writing import fingerprint, replacing


def parts_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}_parts")


VIDEO, WARP, LATENTS = "_video.mp4", "_warp.mp4", ".safetensors"  # endings of a chunk's pieces


class Output:
    """`with Output(path, resume) as output:` is a video under way; `begin` says which, then come its chunks."""

    def __init__(self, out: Path, resume: bool):
        self.out, self.resume = out, resume
        self.folder = Folder(parts_folder(out), "sample.py", passing=True)
        self.state = self.folder.path / STATE
        self.counts: list[int] = []  # frames of each chunk that is whole
        self.pieces: dict[str, str] = {}  # their files and what these hold
        self.begun = False
        self.rollout: dict[str, Tensor] | None = None  # the state to go on from

    def __enter__(self) -> "Output":
        """Raises ValueError or OSError if there is no state to resume, or one that would be lost."""
        self.folder.__enter__()
        try:
            if self.resume and not self.done and not self.state.is_file():
                there = f"; {self.out} is there, and nothing is left to be done for it" if self.out.is_file() else ""
                raise ValueError(f"--continue: {self.state}: no such file, so no chunk is there to go on from{there}")
            if not self.resume and not self.done and self.state.exists():
                raise ValueError(f"{self.folder.path} holds an unfinished video: --continue goes on with it; remove it"
                                 " to start anew")
        except BaseException:
            self.folder.__exit__(None, None, None)
            raise
        return self

    @property
    def done(self) -> bool:
        """The video is whole; what is left in the folder is to go."""
        return self.folder.done

    @property
    def count(self) -> int:
        return sum(self.counts)

    def begin(self, about: dict, frames: int, fps: float, led: bool, machine: str = "") -> None:
        """`about` says what the video depends on: a state of another one is refused. frames: of the whole video; led:
        there are warps; machine: what its last bits depend on."""
        self.about, self.frames, self.fps, self.machine = json.loads(json.dumps(about)), frames, fps, machine
        self.tiles: dict[str, list] = {name: [] for name in (("warp", "mask", "result") if led else ("result",))}
        self.picks = evenly_spaced(frames, 8)
        if self.resume:
            self.load()
        else:
            self.folder.clear()  # what an earlier run left before its first chunk was whole
        self.begun = True

    def load(self) -> None:
        """What is there of this video. Raises ValueError if it is another one's, or a chunk's file was changed."""
        state, header = read_state(self.state)
        check_same(self.state, json.loads(header["about"]), self.about, "--continue")
        self.counts, self.pieces = json.loads(header["counts"]), json.loads(header["pieces"])
        for name, content in self.pieces.items():
            path = self.folder.path / name
            if not path.is_file() or fingerprint(path) != content:
                raise ValueError(f"{path}: missing, or changed since it was written; remove {self.folder.path} to"
                                 " start anew")
        if header["machine"] != self.machine:
            print(f"going on with {self.machine}, begun with {header['machine']}: the numbers may differ from those of"
                  " an uninterrupted run in their last digits, and so may the video")
        self.tiles = {name: list(state.pop(f"tiles.{name}").numpy()) for name in self.tiles}
        self.rollout = state

    def piece(self, index: int, ending: str) -> Path:
        return self.folder.path / f"{index:04d}{ending}"

    @property
    def latest(self) -> Path:
        """The video of the last chunk that is whole."""
        return self.piece(len(self.counts) - 1, VIDEO)

    def add(self, rows: dict[str, np.ndarray], latents: Tensor, rollout: dict[str, Tensor]) -> None:
        """Write a chunk; it is whole when the state after it is there. `rows` are its result, and its warp and mask
        if there are any, [T, H, W, 3] uint8; `rollout` is the state to go on from."""
        index, begun = len(self.counts), self.count
        length = min(len(rows["result"]), self.frames - begun)
        videos = {VIDEO: rows["result"]} | ({WARP: rows["warp"]} if "warp" in rows else {})
        pieces = {ending: self.folder.claim(self.piece(index, ending).name) for ending in (*videos, LATENTS)}
        with replacing(pieces) as files:
            for ending, frames in videos.items():
                write_video(files[ending], frames[:length], self.fps)
            files[LATENTS].write_bytes(save({"latents": latents.cpu()}))
        there = self.pieces | {path.name: fingerprint(path) for path in pieces.values()}
        here = [pick - begun for pick in self.picks if 0 <= pick - begun < length]
        tiles = {name: [*tiles, *(rows[name][pick].copy() for pick in here)] for name, tiles in self.tiles.items()}
        stacked = {f"tiles.{name}": torch.from_numpy(np.stack(each)) for name, each in tiles.items()}
        counts = [*self.counts, length]
        header = {"about": self.about, "counts": counts, "pieces": there}
        header = {name: json.dumps(value) for name, value in header.items()} | {"machine": self.machine}
        with replacing({"state": self.folder.claim(STATE)}) as files:
            files["state"].write_bytes(pack_state(rollout | stacked, header))
        self.counts, self.pieces, self.tiles = counts, there, tiles

    def join(self, ending: str, out: Path) -> None:
        join_videos([self.piece(index, ending) for index in range(len(self.counts))], self.counts, self.fps, out)

    def latents(self, given: Tensor) -> Tensor:
        """Those of all chunks, after those given in front."""
        parts = [given.cpu()]
        for index in range(len(self.counts)):
            with open_safetensors(self.piece(index, LATENTS)) as file:
                parts.append(file.get_tensor("latents"))
        return torch.cat(parts, dim=2)

    def sheet(self) -> np.ndarray:
        return contact_sheet({name: np.stack(tiles) for name, tiles in self.tiles.items()})

    def is_older(self, path: Path) -> bool:
        """Whether a file was there before this video's first chunk."""
        return path.exists() and path.stat().st_mtime < self.piece(0, VIDEO).stat().st_mtime

    def finish(self) -> None:
        """What was to be made of the chunks is made; the folder goes if there are no more to come."""
        if self.count == self.frames:
            self.folder.finish()

    def kept(self) -> str:
        """What is there, for one who stopped the program."""
        if self.done:
            return f"{self.out} is whole"
        if self.state.is_file():
            return f"what is done is kept in {self.folder.path}; the same words with --continue go on"
        return "nothing written"

    def __exit__(self, error_type, error, traceback) -> None:
        """The folder goes after a whole video, and when no chunk is whole."""
        try:
            if self.done or self.begun and not self.state.is_file():
                self.folder.clear()
        finally:
            self.folder.__exit__(None, None, None)
        if error_type is KeyboardInterrupt:
            raise KeyboardInterrupt(self.kept()) from None
