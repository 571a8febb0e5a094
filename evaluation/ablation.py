"""The paper's ablation: what of the method is switched off, with which LoRA, and what the holes of a warp get."""

import re
from dataclasses import dataclass, field
from pathlib import Path

IDEAS = {"not aligned": {"align": False}, "no drop": {"drop": False}, "full": {}}
REFERENCE = "full, smooth filling"  # what the others are compared with


@dataclass(frozen=True)
class Way:
    """How a video is made: led by a warp or not, with options and a LoRA."""

    led: bool = True
    options: dict = field(default_factory=dict)  # of `wah.Options`
    lora: Path | None = None


def folder_name(row: str) -> str:
    """Of the folder of a row's videos."""
    return re.sub(r"\W+", "-", row).strip("-")


def labels(loras: list[Path]) -> dict[str, Path]:
    """LoRAs by their file names without the ending, or, where several have the same, by their paths as given. Raises
    ValueError if the videos of two would lie in one folder."""
    stems = [lora.stem for lora in loras]
    names = [stem if stems.count(stem) == 1 else str(lora) for stem, lora in zip(stems, loras)]
    folders = [*map(folder_name, names)]
    for name, folder in zip(names, folders):
        if folders.count(folder) > 1:
            raise ValueError(f"--lora {name}: too like another one's name, expected another letter or digit in it")
    return dict(zip(names, loras))


def ways(loras: list[Path]) -> dict[str, Way]:
    """All rows by their names; of the LoRAs after the first one the full method alone."""
    table = {"no camera": Way(led=False)}
    for number, (label, lora) in enumerate([("", None), *labels(loras).items()]):
        for fill in ("smooth", "mean"):
            for idea, options in IDEAS.items() if number < 2 else [("full", {})]:
                suffix = f", LoRA {label}" if label else ""
                table[f"{idea}, {fill} filling{suffix}"] = Way(True, options | {"warp_fill": fill}, lora)
    return table
