"""How files are written: under another name until they are whole, and never over what the run reads.

What a run reads is known by identity (device and number of a file), so that links and other spellings of a name are
seen through. A temporary name tells the process that writes it: what a dead one left is removed by the next run that
writes the same output (docs/files.md).
"""

import hashlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = secrets.token_hex(4)  # this process is not an earlier one that had its number
TEMPORARY = re.compile(r"\.(.+)\.(\d{1,9})-([0-9a-f]{8})(\.\w+)?", re.DOTALL)


def beside(out: Path, **endings: str) -> dict[str, Path]:
    """Names of a program's outputs: `out`, which must be an .mp4, as "video", and others beside it: its stem +
    ending."""
    if out.suffix.lower() != ".mp4" or out.stem.startswith("."):
        raise ValueError(f"--out {str(out)!r}: expected a file name that ends in .mp4 and begins with no dot")
    return {"video": out} | {name: out.with_name(out.stem + ending) for name, ending in endings.items()}


# -------------------------------------------------------------------------------------------------- what the run reads


def identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file or folder. Raises OSError if there is none, ValueError for a pipe or device,
    which would be read only once, or never end."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise ValueError(f"{path}: a pipe or a device, expected a file or folder")
    return found.st_dev, found.st_ino


def real(path: Path) -> Path:
    """Where a path leads. Links in a circle are no error here, as they are of Path.resolve before Python 3.13."""
    return Path(os.path.realpath(path))


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises ValueError for an output that is, lies in, or (a folder) holds what the run reads, whatever its name."""
    inputs = list(inputs)
    read = {identity(given): given for given in inputs}
    inside = {identity(path): path for given in inputs if given.is_dir() for path in given.rglob("*") if path.exists()}
    around = {identity(folder): given for given in inputs for folder in given.resolve().parents}
    for output in outputs:
        out = real(output)
        for path in filter(Path.exists, (out, *out.parents)):
            found = (inside | read).get(identity(path))
            if found is not None:
                how = "would overwrite" if path == out else "lies in"
                raise ValueError(f"{output}: this output {how} {found}, which the run reads; choose another name")
        if out.is_dir() and identity(out) in around:
            raise ValueError(f"{output}: this folder of outputs holds {around[identity(out)]}, which the run reads;"
                             " choose another name")


# ----------------------------------------------------------------------------------------------------- temporary names


def temporary(path: Path) -> Path:
    """The name under which an output is written until it is complete."""
    return path.with_name(f".{path.stem}.{os.getpid()}-{TOKEN}{path.suffix}")


def lasting(path: Path | str) -> Path:
    """The name that a file under a temporary one will have; of all others their own."""
    path = Path(path)
    match = TEMPORARY.fullmatch(path.name)
    return path.with_name(match[1] + (match[4] or "")) if match else path


def alive(process: int) -> bool:
    """Whether a process with this number runs."""
    if sys.platform == "win32":  # where os.kill would end it
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sweep(outputs: Iterable[Path]) -> None:
    """Remove what dead processes left of these outputs under temporary names."""
    outputs = set(outputs)
    for folder in {path.parent for path in outputs}:
        for path in folder.iterdir() if folder.is_dir() else ():
            name = TEMPORARY.fullmatch(path.name)
            if name and path.with_name(name[1] + (name[4] or "")) in outputs and name[3] != TOKEN:
                if int(name[2]) == os.getpid() or not alive(int(name[2])):
                    path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- whole or not


def check_outputs(outputs: dict[str, Path], inputs: Iterable[Path]) -> None:
    """Raises ValueError or OSError for what would overwrite an input or another output, or can't be written."""
    check_apart(outputs.values(), inputs)
    sweep(outputs.values())
    taken = set()
    for path in outputs.values():
        if real(path) in taken:
            raise ValueError(f"{path}: this output would overwrite another output")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected the name of a file, this is something else")
        taken.add(real(path))
        try:
            temporary(path).touch()
            temporary(path).unlink()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(outputs: dict[str, Path], inputs: Iterable[Path] = ()) -> Iterator[dict[str, Path]]:
    """Temporary names for `outputs`. They become the real ones, all of them and in order, when the block ends without
    an error, and are gone otherwise. What can't be written, or would overwrite an input or another output, is an error
    at once."""
    check_outputs(outputs, inputs)
    partials = {name: temporary(path) for name, path in outputs.items()}
    try:
        yield partials
        for partial in partials.values():
            sync(partial)
        for name, path in outputs.items():
            os.replace(partials[name], path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(next(iter(outputs.values())))) from None
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def fingerprint(path: Path, read: Iterable[Path] | None = None) -> str:
    """A short digest of what is in a file, or in those files of a folder that are `read` (all but hidden ones): of a
    large one 64 pieces of 64 KiB, and the size."""
    digest = hashlib.blake2b(digest_size=8)
    if read is None:
        inside = path.rglob("*") if path.is_dir() else [path]
        read = (file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts))
    for file in filter(Path.is_file, sorted(read)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with open(file, "rb") as stream:
            for piece in range(64):
                stream.seek(piece * size // 64)
                digest.update(stream.read(2**16))
    return digest.hexdigest()
