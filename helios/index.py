"""model_index.json: what kind of checkpoint a folder holds, checked once."""

from dataclasses import dataclass
from pathlib import Path

from files.checkpoint import read_config, snapshot
from files.settings import require


@dataclass(frozen=True)
class ModelIndex:
    """The keys that matter; the first three are the released checkpoints', the others a small model's own."""

    is_distilled: bool = False
    is_cfg_zero_star: bool = False
    scheduler: tuple[str, ...] = ()  # library and class
    num_inference_steps: int = 0  # a stage; 0: the official number for its kind
    guidance_scale: float | None = None  # None: the official one for its kind
    max_sequence_length: int = 512  # rows of a prompt's embedding
    height: int = 384
    width: int = 640
    keyframes: int = 8  # pictures that the geometry network sees together
    samples: int = 4  # of the warped surface, along each side of its quads
    warp_fill: str = "mean"  # what the holes of a warp get, as in `wah.Options`
    train: tuple[str, ...] = ()  # words for train.py's --set, before the user's own

    def __post_init__(self):
        guidance = self.guidance_scale
        require(
            self,
            ("scheduler", self.scheduler[1:] in (("HeliosScheduler",), ("HeliosDMDScheduler",)),
             "a library, and HeliosScheduler or HeliosDMDScheduler"),
            ("num_inference_steps", 0 <= self.num_inference_steps <= 1000, "at most 1000"),
            ("guidance_scale", guidance is None or 0 <= guidance <= 1000, "from 0 to 1000"),
            ("max_sequence_length", 1 <= self.max_sequence_length <= 4096, "from 1 to 4096"),
            ("height", 16 <= self.height <= 8192, "from 16 to 8192"),
            ("width", 16 <= self.width <= 8192, "from 16 to 8192"),
            ("samples", 1 <= self.samples <= 16, "from 1 to 16"),
            ("keyframes", 1 <= self.keyframes <= 1000, "from 1 to 1000"),
            ("train", all(isinstance(word, str) for word in self.train), "words like rank=32"),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the model was made for."""
        return self.height, self.width


def read_index(weights: Path) -> ModelIndex:
    """Of a folder in the official layout. Raises OSError if there is none, ValueError naming what is wrong in it."""
    return read_config(ModelIndex, weights / "model_index.json")


def check_weights(weights: Path) -> Path:
    """The folder in the official layout that is meant (`snapshot`). Raises ValueError if there is none."""
    weights = snapshot(weights, "model_index.json")
    if not (weights / "model_index.json").is_file():
        raise ValueError(f"--weights {weights}: no model_index.json there; weights/README.md says what to download")
    return weights
