"""Settings: dataclasses that check themselves, and words like "rank=16" that change them (`--set NAME=VALUE`)."""

import math
import re
from dataclasses import fields, replace
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

D = TypeVar("D")  # a dataclass


def require(settings: object, *rules: tuple[str, bool, str]) -> None:
    """Raises ValueError for the first rule (names of fields, whether they are good, what is expected) that is
    broken."""
    for names, good, expected in rules:
        if not good:
            found = ", ".join(f"{name} is {show_value(getattr(settings, name))}" for name in names.split())
            raise ValueError(f"{found}, expected {expected}")


def setting_names(settings: object) -> list[str]:
    return [field.name for field in fields(settings)]  # pyright: ignore[reportArgumentType]


def read_value(text: str, kind: Any) -> Any:
    """A word as a value of an annotated type: bool, int, float, str, Path, a tuple of them, or one of them or None.
    Raises KeyError or ValueError if it is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if text == "none" else read_value(text, next(each for each in inner if each is not NoneType))
    if origin is tuple:
        words = text.split(",")
        kinds = [inner[0]] * len(words) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(words):
            raise ValueError
        return tuple(map(read_value, words, kinds))
    if kind is bool:
        return {"true": True, "false": False}[text]
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


def part_of(text: str) -> slice:
    """"2/4" -> every fourth from the second on. Raises ValueError unless it is i/N with i from 1 to N."""
    words = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not words or not 1 <= int(words[1]) <= int(words[2]):
        raise ValueError(f"--part {text!r}: expected i/N with i from 1 to N, as in 1/4")
    return slice(int(words[1]) - 1, None, int(words[2]))


def show_value(value: Any) -> str:
    """A value as `read_value` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(show_value, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def parse_settings(words: list[str], defaults: D) -> D:
    """The dataclass `defaults` with values from words like "rank=16", "steps=1,1,1" or "align=false"."""
    names, values = setting_names(defaults), {}
    kinds = get_type_hints(type(defaults))
    for word in words:
        name, given, text = word.partition("=")
        if name not in names or not given:
            near = get_close_matches(name.strip().lower(), names)
            likely = f", perhaps {' or '.join(near)}" if near else ""
            raise ValueError(f"--set {word}: expected NAME=VALUE with the name of a setting{likely} (docs/options.md)")
        try:
            values[name] = read_value(text, kinds[name])
        except (KeyError, ValueError):
            default = show_value(getattr(defaults, name))
            raise ValueError(f"--set {word}: expected a value like {default}, of type"
                             f" {kind_name(kinds[name])}") from None
    try:
        return replace(defaults, **values)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"--set: {error}") from None


def kind_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("pathlib.", "")
