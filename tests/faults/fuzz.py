"""Damaged and hostile files by the thousand: real files are mutated, each reader must take them or refuse in one line.

    PYTHONPATH=.:tests python tests/faults/fuzz.py [READER [SECONDS [SEED]]]

Mutations know the formats: archives keep their checksums and safetensors their lengths, so that what is inside is
reached. A case is its seed alone. A reader that crashes Python, hangs, or takes more than its share of memory has
failed too. Left out: pictures and videos, whose decoders are others' (tests/files/test_media.py has chosen ones).
"""

import io
import json
import math
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from goldens import DISTILLED, GEOMETRY, HELIOS
from safetensors.torch import save

from files.arrays import Arrays
from files.checkpoint import build, few, load, read_json_value
from files.depth import load_depth
from files.machine import host_memory
from geometry.paths import load_path
from geometry.pi3x import load_pi3x
from helios.flow import load_schedule
from helios.index import read_index
from helios.lora import load_lora
from helios.text import Tokenizer, UMT5Encoder
from helios.vae import VAE
from model import Helios
from wah import model_options

SECONDS, MEMORY = 5.0, 2**30  # of one case
PATHS = Path(__file__).parents[1] / "paths"
HOSTILE: list[Any] = [None, True, False, 0, -1, 1, 1.5, 3, 10**9, 10**30, 10**400, -(2**63), math.nan, math.inf, 1e308, "",
                      "x", "no", "1", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]],
                      ["x"], [0], [1, 2], [[1]] * 3, {"a": 1}, [10**9] * 9, [-1, 0, 1], [math.nan] * 4]


# ----------------------------------------------------------------------------------------------------------- mutations


def hostile(random: Random) -> Any:
    return deepcopy(random.choice(HOSTILE))


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """A few flipped, removed, repeated or replaced pieces."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        if not content:
            break
        at, length = random.randrange(len(content)), random.choice((1, 1, 2, 4, 8, 100))
        piece = random.choice((b"", random.randbytes(length), b"\xff" * length, b"\0" * length,
                               bytes(content[at:at + length]) * 2, str(hostile(random))[:50].encode("utf-8", "replace")))
        content[at:at + random.choice((0, length))] = piece
    return bytes(content[:random.randrange(len(content) + 1)] if random.random() < 0.1 else content)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a JSON value has parts: the keys on the way to each."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def mutate_value(random: Random, value: Any) -> Any:
    """A few parts of a JSON value replaced, removed, repeated or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        *way, last = random.choice(places(value)[1:] or [("x",)])
        parent = value
        for key in way:
            parent = parent[key]
        if not isinstance(parent, (dict, list)):
            return hostile(random)
        action = random.randrange(5)
        if action == 0 and len(parent) > 0 and last in (parent if isinstance(parent, dict) else range(len(parent))):
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[random.choice(("x", "", "c2w", "frames", "0", "lora_alpha", "r"))] = hostile(random)
        elif action == 2 and isinstance(parent, list):
            parent += parent[:random.choice((1, 2, 50))]
        elif isinstance(parent, dict) or last in range(len(parent)):
            parent[last] = hostile(random)
    return value


def write_json(random: Random, value: Any) -> bytes:
    text = json.dumps(value) if random.random() < 0.8 else json.dumps(mutate_value(random, value), indent=1)
    if random.random() < 0.05:
        text = random.choice(("[" * 10**5, '{"a":' * 10**5, text[:len(text) // 2], text + text, "\ufeff" + text,
                              text.replace("{", '{"c2w": 1, "c2w": 2, ', 1), text.replace("\n", "\r\n")))
    return text.encode("utf-8", "surrogatepass")


def mutate_json(random: Random, data: bytes) -> bytes:
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    return write_json(random, mutate_value(random, json.loads(data)))


def mutate_npy(random: Random, data: bytes) -> bytes:
    """Its header rewritten with another type or shape, or its bytes mutated."""
    if random.random() < 0.3 or len(data) < 12:
        return mutate_bytes(random, data)
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10:10 + length].decode("latin1"), data[10 + length:]
    descr = random.choice(("'<f4'", "'>f8'", "'|O'", "'V0'", "'<U0'", "{}", "[]", "[('a','<f4')]", "'<c8'", "'<M8[s]'", "'b1'",
                           "'<f2'", "('<f4', (10**9,))", "'|S1000000000'", "None", "1", "'<f16'", "'|V4'", "(" * 200))
    side = random.choice((0, 1, 4, -1, 10**6, 2**31, 2**62, 2**64, 10**30))
    shape = random.choice((f"({side},)", f"({side}, 4, 4)", f"({side}, {side}, {side})", "()", "(4, 4", "'x'", "None",
                           str((1,) * 40), f"(True, {side})"))
    if random.random() < 0.7:
        header = re.sub(r"'descr': .*?, 'fortran", f"'descr': {descr}, 'fortran", header)
    if random.random() < 0.7:
        header = re.sub(r"'shape': \(.*?\)", f"'shape': {shape}", header)
    text = header.encode("latin1")
    return data[:8] + struct.pack("<H", len(text)) + text + body[:random.choice((len(body), len(body) // 2))]


def mutate_zip(random: Random, data: bytes, inner: Callable[[Random, bytes], bytes]) -> bytes:
    """An archive whose members are mutated and packed again with right checksums, or its own bytes mutated."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    buffer = io.BytesIO()
    warnings.filterwarnings("ignore", "Duplicate name", module="zipfile")
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        members = [(member.filename, old.read(member)) for member in old.infolist()]
        for name, content in members:
            if random.random() < 0.6:
                content = inner(random, content)
            for _ in range(random.choice((1, 1, 1, 1, 0, 2))):
                name = name if random.random() < 0.9 else random.choice(("../x.npy", "/x.npy", "x", "", "camera_poses.npy"))
                new.writestr(zipfile.ZipInfo(name or "x"), content, random.choice(
                    (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    packed = bytearray(buffer.getvalue())
    if random.random() < 0.2:  # flags and methods
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = packed.find(mark)
            if at >= 0:
                packed[at + offset + random.choice((0, 2))] = random.choice((1, 8, 99, 255))
    return bytes(packed)


def mutate_npz(random: Random, data: bytes) -> bytes:
    return mutate_zip(random, data, mutate_npy)


def mutate_pt(random: Random, data: bytes) -> bytes:
    return mutate_zip(random, data, mutate_bytes)


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """Its header mutated, with the right length before it, or its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    nested = header.get("__metadata__", {}).get("lora_adapter_metadata")
    if nested is not None and random.random() < 0.7:
        text = write_json(random, mutate_value(random, json.loads(nested))).decode("utf-8", "replace")
        header["__metadata__"]["lora_adapter_metadata"] = text
    else:
        header = mutate_value(random, header)
    body = data[8 + length:]
    if random.random() < 0.3:
        at = random.randrange(max(1, len(body) - 4))
        body = body[:at] + random.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", random.randbytes(4))) + body[at + 4:]
    text = json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + body


def mutate_text(random: Random, data: bytes) -> bytes:
    """Words and lines replaced, removed or repeated."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(lines))
        words = lines[at].split(" ")
        words[random.randrange(len(words))] = random.choice(("nan", "inf", "1e400", "-1", "x", "", "0", "1,2", "٣", "#", "9" * 5000))
        lines[at:at + random.choice((0, 1, 1))] = random.choice(([" ".join(words)], [], lines[at:at + 1] * 2, ["# x"]))
        lines = lines or [""]
    return random.choice(("\n", "\n", "\r\n", "\r")).join(lines).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------------------- readers


def packed(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def plain(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def adapters() -> dict[str, torch.Tensor]:
    return {f"blocks.{index}.attn1.to_q.lora_{half}.weight": torch.ones(2, 8) if half == "A" else torch.ones(8, 2)
            for index in range(2) for half in "AB"}


def settings() -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4, "alpha_pattern": {"blocks.1.attn1.to_q": 3},
                                                 "rank_pattern": {}, "use_rslora": True, "use_dora": False})}


def check_lora(file: Path) -> None:
    for down, up, scale in load_lora(file).adapters.values():
        assert math.isfinite(scale) and down.isfinite().all() and up.isfinite().all() and len(down) == up.shape[1]


def within(folder: Path, name: str, file: Path) -> Path:
    """A copy of the small official weights' folder in which `file` stands for one of the files."""
    for part in folder.rglob("*"):
        if part.is_file():
            link = file.parent / "w" / part.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(part)
    place = file.parent / "w" / name
    place.unlink(missing_ok=True)
    place.write_bytes(file.read_bytes())
    return file.parent / "w"


def check_index(file: Path) -> None:
    weights = within(DISTILLED, "model_index.json", file)
    index = read_index(weights)
    model_options(weights)
    assert 16 <= index.height <= 8192 and type(index.max_sequence_length) is int


def check_config(part: str, network: type) -> Callable[[Path], None]:
    def read(file: Path) -> None:
        build(network, within(DISTILLED, f"{part}/config.json", file) / part)

    return read


def check_shards(file: Path) -> None:
    folder = file.parent / "shards"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).exists():
            (folder / name).symlink_to(DISTILLED / "vae" / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(file.read_bytes())
    load(VAE, folder)


def all_arrays(file: Path) -> None:
    for array in Arrays(file).values():
        assert array.dtype.kind in "biuf" and array.dtype.itemsize > 0


def of(*names: str) -> list[bytes]:
    return [(PATHS / name).read_bytes() for name in names]


def in_paths(suffix: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted(PATHS.glob(f"*{suffix}"))]


def check_colmap(file: Path) -> None:
    folder = file.parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "cameras.txt").write_bytes((PATHS / "colmap" / "cameras.txt").read_bytes())
    (folder / "images.txt").write_bytes(file.read_bytes())
    load_path(folder)


def check_folder(file: Path) -> None:
    """A folder of one kind or another, one of its files mutated; `file` has the seed."""
    random = Random(file.read_bytes())
    folder = random.choice([place for place in sorted(PATHS.iterdir()) if place.is_dir()])
    copy = file.parent / "copy" / folder.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(folder, copy)
    part = random.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    mutation = {".npy": mutate_npy, ".json": mutate_json, ".txt": mutate_text}.get(part.suffix, mutate_bytes)
    part.write_bytes(mutation(random, part.read_bytes()))
    load_path(copy)


POSES = np.tile(np.eye(4, dtype=np.float32), (4, 1, 1))
# name -> suffix, files to begin with, mutation, reader
READERS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Random, bytes], bytes], Callable[[Path], Any]]] = {
    "npy": (".npy", lambda: [plain(POSES), plain(np.ones((3, 4), ">f8"))], mutate_npy, all_arrays),
    "npz": (".npz", lambda: [packed(a=POSES, b=np.ones(3, np.uint8))], mutate_npz, all_arrays),
    "depth npy": (".npy", lambda: [plain(np.ones((4, 6), np.float32))], mutate_npy, load_depth),
    "depth npz": (".npz", lambda: [packed(depth=np.ones((4, 6)))], mutate_npz, load_depth),
    "safetensors": (".safetensors", lambda: [(GEOMETRY / "pi3x_weights.safetensors").read_bytes()], mutate_safetensors,
                    load_pi3x),
    "lora": (".safetensors", lambda: [save(adapters(), settings()), save(adapters())], mutate_safetensors, check_lora),
    "lora pt": (".pt", lambda: [pickled({"peft": adapters()}), (HELIOS / "visible_lora_state.pt").read_bytes()],
                mutate_pt, check_lora),
    "json": (".json", lambda: [b'{"a": [1, {"b": null}]}'], mutate_json, read_json_value),
    "model_index": (".json", lambda: [(DISTILLED / "model_index.json").read_bytes(), json.dumps(
        {"scheduler": ["", "HeliosScheduler"], "height": 64, "width": 64, "num_inference_steps": 4, "train": ["rank=2"],
         "guidance_scale": 2.0, "keyframes": 2, "max_sequence_length": 9}).encode()], mutate_json, check_index),
    "scheduler": (".json", lambda: [(DISTILLED / "scheduler" / "scheduler_config.json").read_bytes()], mutate_json,
                  lambda file: load_schedule(within(DISTILLED, "scheduler/scheduler_config.json", file))),
    "transformer": (".json", lambda: [(DISTILLED / "transformer" / "config.json").read_bytes()], mutate_json,
                    check_config("transformer", Helios)),
    "text_encoder": (".json", lambda: [(DISTILLED / "text_encoder" / "config.json").read_bytes()], mutate_json,
                     check_config("text_encoder", UMT5Encoder)),
    "vae": (".json", lambda: [(DISTILLED / "vae" / "config.json").read_bytes()], mutate_json, check_config("vae", VAE)),
    "tokenizer": (".model", lambda: [(DISTILLED / "tokenizer" / "spiece.model").read_bytes()], mutate_bytes,
                  lambda file: Tokenizer(file)("a b")),
    "shards": (".json", lambda: [b'{"metadata": {}, "weight_map": {"a": "diffusion_pytorch_model.safetensors"}}'],
               mutate_json, check_shards),
    "path json": (".json", lambda: in_paths(".json"), mutate_json, load_path),
    "path npz": (".npz", lambda: in_paths(".npz"), mutate_npz, load_path),
    "path npy": (".npy", lambda: in_paths(".npy"), mutate_npy, load_path),
    "path txt": (".txt", lambda: in_paths(".txt") + in_paths(".csv") + in_paths(".tum") + in_paths(".log")
                 + in_paths(".traj"), mutate_text, load_path),
    "colmap": (".txt", lambda: of("colmap/images.txt"), mutate_text, check_colmap),
    "folders": (".seed", lambda: [b""], lambda random, data: random.randbytes(8), check_folder),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- runs


def one(folder: Path, name: str, seed: int, begin: list[bytes]) -> str:
    """A case: "taken", "refused", or what is wrong with the reader."""
    suffix, _, mutation, read = READERS[name]
    random = Random(f"{name} {seed}")
    file = folder / f"case{suffix}"
    file.write_bytes(mutation(random, random.choice(begin)))
    start, before = time.perf_counter(), host_memory()[1]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read(file)
        outcome = f"a stray warning: {said[0].message}" if said else "taken"
    except (ValueError, OSError) as error:
        line = str(error)
        named = any(word in line for word in (str(folder), "Pi3X"))
        outcome = "refused" if named and line.count("\n") == 0 and len(line) < 1000 else f"not one clear line: {line[:300]}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    if time.perf_counter() - start > SECONDS:
        outcome = f"{time.perf_counter() - start:.1f} s"
    if host_memory()[1] - before > MEMORY:
        outcome = f"{(host_memory()[1] - before) / 2**30:.1f} GiB"
    return outcome


def fuzz(name: str, count: int = 10**9, seconds: float = math.inf, seed: int = 0) -> tuple[Counter, list[str]]:
    """Outcomes of so many cases, or of what fits in the time, and the failures with their seeds."""
    counts, failures, begin, end = Counter(), [], READERS[name][1](), time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for index in range(seed, seed + count):
            if time.perf_counter() > end:
                break
            outcome = one(Path(folder), name, index, begin)
            good = outcome in ("taken", "refused")
            counts[outcome if good else "failed"] += 1
            failures += [] if good else [f"{name} {index}: {outcome}"]
    return counts, failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] != "all" else None
    total = Counter()
    for reader in [chosen] if chosen else READERS:
        found, wrong = fuzz(reader, seconds=float(sys.argv[2]) if len(sys.argv) > 2 else 10,
                            seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        total += found
        print(f"{reader:<14}{dict(found)}", few(wrong, 30), flush=True)
    print(f"{'all':<14}{dict(total)}")
