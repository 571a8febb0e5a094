"""The paper's ablation: what of the method is switched off, with which LoRA, and what the holes of a warp get."""

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


def ways(loras: list[Path]) -> dict[str, Way]:
    """All rows by their names; of the LoRAs after the first one the full method alone."""
    table = {"no camera": Way(led=False)}
    for number, lora in enumerate((None, *loras)):
        for fill in ("smooth", "mean"):
            for idea, options in IDEAS.items() if number < 2 else [("full", {})]:
                suffix = "" if lora is None else f", LoRA {lora.stem}"
                table[f"{idea}, {fill} filling{suffix}"] = Way(True, options | {"warp_fill": fill}, lora)
    return table
