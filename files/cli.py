"""What the programs' command lines share: errors in one line, sizes, and how they are stopped."""

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TypeVar, get_type_hints

from files.machine import NEEDS, SIZE, choose_products, out_of_memory, what_fits

T = TypeVar("T")
WHAT_TO_DO = {
    errno.ENOENT: "no such file or folder; is the name right?",
    errno.ENOTDIR: "a file, expected a folder; is the name right?",
    errno.EISDIR: "a folder, expected a file; is the name right?",
    errno.EACCES: "this user may not read or write there; change its rights, or choose another place",
    errno.EPERM: "this user may not read or write there; change its rights, or choose another place",
    errno.EROFS: "nothing can be written there; choose another place",
    errno.ENOSPC: "no room is left on the disk; make room, or choose another place",
    errno.EDQUOT: "no room is left for this user; make room, or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "links that lead in a circle; give the path of the file itself",
}


def what_to_do(error: Exception) -> str:
    """What the system's error means for the user."""
    known = WHAT_TO_DO.get(getattr(error, "errno", None) or 0)
    return known or getattr(error, "strerror", None) or str(error)


def explain(error: Exception) -> str:
    """An error in one line; of the system's own ones: which file, and what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        words = f"{'' if error.filename is None else f'{error.filename}: '}{what_to_do(error)}"
    else:
        words = str(error)
    return " ".join(words.splitlines())


MAX_FRAMES = 10**6


def check_frames(frames: int | None) -> None:
    if frames is not None and not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"--frames {frames}: expected a number from 1 to {MAX_FRAMES}")


def run_program(name: str, program: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Exit status 0; 2 and one line on stderr for bad input; 130 when the user stops it; 141 when nobody reads what it
    prints any more, 0 if that comes out at the end of it."""
    if sys.stderr is None:  # closed: what is said there goes nowhere
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # a console that has not all letters shows others
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    choose_products()
    finished = False
    try:
        program(args)
        finished = True
        if sys.stdout is not None:  # closed
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what is printed any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno() if sys.stdout else 1)
        return 0 if finished else 141  # what a shell reports for it
    except (ValueError, OSError) as error:
        print(f"{name}: error: {explain(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: error: {need_less(name, args, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{name}: stopped, {str(stop) or 'nothing written'}", file=sys.stderr)
        return 130
    return 0


SAVING = {"full": "--memory fp8 or stream, ", "fp8": "--memory stream, "}  # how weights are held -> what takes less


def need_less(name: str, args: argparse.Namespace, error: BaseException) -> str:
    """One line for a run that memory was too small for."""
    asked = re.search(r"(?i)(?:tried|unable) to allocate ([\d.]+ ?\w+)", str(error))
    reason = f"out of memory, {asked[1]} more were needed" if asked else "out of memory"
    # "GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is free. ... this process has 22.40 GiB memory in use"
    card = re.search(r"total capacity of ([\d.]+) GiB of which ([\d.]+) ([GM])iB is free", str(error))
    if card and name in NEEDS and hasattr(args, "memory"):  # which another process of a team does not know
        own = re.search(r"this process has ([\d.]+) GiB memory in use", str(error))
        free = float(card[2]) / (1 if card[3] == "G" else 1024)
        room = float(own[1]) + free if own else float(card[1])
        words = f"--memory {args.memory}" + " --set keep_attention=false" * ("keep_attention=false" in args.set)
        fit = what_fits(name, words, parse_size(args.size) if args.size else SIZE, room)
        reason = f"{reason}, {free:.2f} of {card[1]} GiB are free"
        if fit:
            return f"{reason}; of the released model {fit}"
    less = SAVING.get(getattr(args, "memory", ""), "")
    return f"{reason}; less is needed with {less}a smaller --size"


@cache
def note(line: str) -> None:
    """Tell the user something about the input, once."""
    print(line, file=sys.stderr)


def parse_size(text: str) -> tuple[int, int]:
    """"384x640" -> height, width. Raises ValueError unless they are even and from 16 to 8192."""
    height, _, width = text.partition("x")
    sides = [int(part) if part.isdecimal() and len(part) < 5 else 0 for part in (height, width)]
    if not all(16 <= side <= 8192 and side % 2 == 0 for side in sides):
        raise ValueError(f"--size {text!r}: expected HEIGHTxWIDTH, even numbers from 16 to 8192, as in 384x640")
    return sides[0], sides[1]


def given_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name, expected a file or folder")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """Errors are one line. `--name value` is another spelling of `--set name=value`; `--name` alone of name=true."""

    def __init__(self, name: str, about: str, settings: object):
        super().__init__(name, usage=argparse.SUPPRESS, description=about, allow_abbrev=False)
        self.kinds = get_type_hints(type(settings))
        self.register("type", Path, given_path)
        self.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=argparse.SUPPRESS)

    def parse_args(self, words: list[str]) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        said, coming = [], list(words)
        while coming:
            word = coming.pop(0)
            option, given, value = word.partition("=")
            name = option.removeprefix("--").replace("-", "_")
            if word[:2] != "--" or name not in self.kinds or option in self._option_string_actions:
                said.append(word)
                continue
            if not given:
                alone = self.kinds[name] is bool and coming[:1] not in (["true"], ["false"])
                if not (alone or coming):
                    self.error(f"{option}: expected a value")
                value = "true" if alone else coming.pop(0)
            said += ["--set", f"{name}={value}"]
        return super().parse_args(said)

    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def existing(*paths: T | None) -> list[T]:
    """Those that are given."""
    return [path for path in paths if path is not None]


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is cut in two; a second one stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstopping after this step; Ctrl-C again stops at once, without saving")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
