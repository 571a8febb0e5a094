"""A folder that belongs to a program: marked as its own, for one process at a time, and nothing else in it is touched.

manifest.txt is the mark, the list and the lock. Its first line says whose folder it is; then come the names of all that
was made there, each written down before its file is made, so that whenever the process dies nothing is made that is not
named. Only what is named is ever removed or replaced. While a process is at work the file is locked; the system takes
the lock away when it dies. A folder without the mark that is not empty belongs to someone else, whatever the words say.
"""

import errno
import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

from files.writing import sweep

MARK = "manifest.txt"
STATE = "state.safetensors"  # what both programs go on from; of all that is removed it goes first
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def lock(file: BinaryIO) -> bool:
    """Take a file for this process, until it closes it or dies; False if another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**30)  # past the end, so that others can read what is there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return False
        print(f"{file.name}: there are no locks on this file system; don't let two runs write there", file=sys.stderr)
    return True


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def same_file(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


class Folder:
    """`with Folder(path, "train.py") as folder:`. Raises ValueError or OSError if it is someone else's, or another
    process is at work there. When nothing but the mark is in it at the end, the mark goes, and with it the folders that
    were made for it; if the folder is a `passing` one by its name, also one that a killed process made."""

    def __init__(self, path: Path, program: str, passing: bool = False):
        self.passing = passing
        self.path, self.mark = path, path / MARK
        self.header = f"Made by Warp-as-History's {program}, format 1, which may remove what is named below.\n".encode()
        self.program = program
        self.names: list[str] = []  # of what was made here
        self.before = self.begun = 0  # length of the list without and with this process
        self.done = False  # all that was to be made is whole, the rest is to go
        self.made: list[Path] = []  # folders, the inner first

    def __enter__(self) -> "Folder":
        try:
            self.file = self.take()
        except BaseException:
            remove_empty(self.made)
            raise
        try:
            self.read()
            self.before = self.file.seek(0, os.SEEK_END)
            self.write(f"process {os.getpid()}")
            self.begun = self.file.tell()
            sweep(self.path / name for name in self.names)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def check(self) -> None:
        """Raises ValueError for a folder that is not this program's, before anything in it is opened for writing."""
        if self.path.is_symlink() or self.mark.is_symlink():
            raise ValueError(f"{self.path}: a link, expected the path of the folder itself")
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: this is a file, expected a folder or a new name")
        mark = self.mark.read_bytes() if self.mark.is_file() else b""
        alone = not {path.name for path in self.path.iterdir()} - {MARK}
        if not mark.startswith(self.header) and not (alone and self.header.startswith(mark)):
            raise ValueError(f"{self.path}: holds files that {self.program} did not make (its mark, {MARK}, is not"
                             " there), and they stay: choose another --out, or move them")
        if mark and self.mark.stat().st_nlink > 1:
            raise ValueError(f"{self.mark}: has another name elsewhere (a hard link), expected a folder of its own")

    def take(self) -> BinaryIO:
        """The mark, locked; the folder is made if there is none."""
        while True:
            self.check()
            missing = [path for path in (self.path, *self.path.absolute().parents) if not path.exists()]
            self.made = [path for path in self.made if path not in missing] + missing
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.mark, "a+b", buffering=0)
            if not lock(file):
                words = [line.split() for line in self.mark.read_bytes().split(b"\n")]
                process = [line[1].decode() for line in words if line[:1] == [b"process"] and len(line) == 2]
                file.close()
                raise ValueError(f"{self.path}: process {process[-1] if process else 'another'} is at work there: wait"
                                 " until it ends, or choose another --out")
            if same_file(file, self.mark):
                return file
            file.close()  # the other run ended just now and took it away

    def read(self) -> None:
        """What the mark says; a last line that was cut off by a kill names nothing yet."""
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)
        if not whole:
            self.write_bytes(self.header)
        for line in content[len(self.header):whole].decode("utf-8", "replace").splitlines():
            word, _, name = line.partition(" ")
            self.done = self.done or line == "done"
            if word == "file" and re.fullmatch(r"\w[\w.-]*", name) and name not in self.names:
                self.names.append(name)

    def write_bytes(self, line: bytes) -> None:
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.mark)) from None

    def write(self, line: str) -> None:
        self.write_bytes(f"{line}\n".encode())

    def claim(self, name: str) -> Path:
        """Where to make a file, which from now on may be replaced and removed. Raises ValueError if one is there that
        was not made by a run."""
        path = self.path / name
        if name not in self.names:
            if os.path.lexists(path):
                raise ValueError(f"{path}: not made by {self.program}, and it would be replaced: move it away")
            self.write(f"file {name}")
            self.names.append(name)
        return path

    def remove(self, keep: str | None = None) -> None:
        """Remove all that was made here, but what begins with `keep`; the state first, so that nothing goes on from a
        part of it."""
        for name in sorted(self.names, key=lambda name: name != STATE):
            path = self.path / name
            if not (keep and name.startswith(keep)) and (path.is_file() or path.is_symlink()):
                path.unlink()

    def finish(self) -> None:
        """All is whole elsewhere: what was made here goes, and if the process dies meanwhile the next one knows."""
        self.write("done")
        self.clear()
        self.done = True

    def clear(self) -> None:
        """`remove`, and forget."""
        self.remove()
        self.file.truncate(len(self.header))
        self.names.clear()
        self.done = False

    def __exit__(self, error_type, error, traceback) -> None:
        file = self.file
        try:
            if [path.name for path in self.path.iterdir()] == [MARK]:
                if sys.platform == "win32":  # where an open file can't be removed
                    file.close()
                self.mark.unlink()
            elif file.seek(0, os.SEEK_END) == self.begun:
                file.truncate(self.before)  # as it was, where nothing came of it
            remove_empty([self.path, *self.made] if self.passing else self.made)
        finally:
            file.close()
