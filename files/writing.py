"""How files are written: under another name until they are whole, and never over what the run reads."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(out: Path, **endings: str) -> dict[str, Path]:
    """Names of a program's outputs: `out`, which must be an .mp4, as "video", and others beside it: its stem +
    ending."""
    if out.suffix.lower() != ".mp4" or out.stem.startswith("."):
        raise ValueError(f"--out {str(out)!r}: expected a file name that ends in .mp4")
    return {"video": out} | {name: out.with_name(out.stem + ending) for name, ending in endings.items()}


def temporary(path: Path) -> Path:
    """The name under which an output is written until it is complete."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def check_outputs(outputs: dict[str, Path], inputs: Iterable[Path]) -> None:
    """Raises ValueError or OSError for what would overwrite an input or another output, or can't be written."""
    taken = {path.resolve() for path in inputs}
    for path in outputs.values():
        if path.resolve() in taken:
            raise ValueError(f"{path}: this output would overwrite an input or another output")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected the name of a file, this is something else")
        taken.add(path.resolve())
        try:
            temporary(path).touch()
            temporary(path).unlink()
        except OSError as error:
            raise OSError(f"{path}: can't be written ({error.strerror})") from None


@contextmanager
def replacing(outputs: dict[str, Path], inputs: Iterable[Path]) -> Iterator[dict[str, Path]]:
    """Temporary names for `outputs`. They become the real ones, all of them, when the block ends without an error, and
    are gone otherwise. What can't be written, or would overwrite an input or another output, is an error at once."""
    check_outputs(outputs, inputs)
    partials = {name: temporary(path) for name, path in outputs.items()}
    try:
        yield partials
        for name, path in outputs.items():
            os.replace(partials[name], path)
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
