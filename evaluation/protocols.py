"""Data sets that others measure on, as a user's copy lies on the disk, read as cases: a video to be made, its truth.

    davis33     DAVIS: JPEGImages/480p/NAME/00000.jpg, ...; the camera is what Pi3X sees in the first 33 frames
    re10k33     RealEstate10K: NAME.txt, as released, beside NAME.mp4 or frames in NAME/; its scale is Pi3X's
    wbench-nav  WBench: cases/case_ID.json and images/case_ID.jpg, or images/PERSPECTIVE/case_ID.jpg; a chunk a turn

DAVIS and RealEstate10K have no captions: prompts.csv in the folder gives them (columns name, prompt), else DAVIS's
names are the prompts. Which of their videos the paper took is not known: `--names` chooses.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.compare import STRIDE, cameras
from evaluation.navigation import read_keys, wanted_path
from files.cli import note
from files.media import is_picture, natural_order
from files.table import read_table
from files.writing import fingerprint, replacing
from geometry.camera import DEPTH, WINDOW, normalize, path_error
from geometry.paths import load_path
from geometry.pi3x import Pi3X
from geometry.scene import see

TURN = {"step": 2.0, "degrees": 30.0, "radius": float(DEPTH)}  # what a turn of WBench goes, in tenths of the depth


@dataclass(frozen=True)
class Case:
    name: str
    prompt: str
    video: Path | None = None  # the truth: a video, or a folder of frames
    image: Path | None = None  # the first picture, where there is no truth
    poses: Path | None = None  # the data set's own path, in a unit that nobody knows
    actions: tuple[str, ...] = ()  # a turn each
    perspective: str = ""


def read_prompts(data: Path) -> dict[str, str]:
    """Name -> prompt, where the folder has them."""
    file = data / "prompts.csv"
    rows = read_table(file, ("name", "prompt"), dict) if file.is_file() else []
    return {row["name"]: row["prompt"] or "" for row in rows}


def davis(data: Path) -> list[Case]:
    places = (data / "JPEGImages" / "480p", data / "JPEGImages" / "Full-Resolution", data)
    root, prompts = next(place for place in places if place.is_dir()), read_prompts(data)
    cases, short = [], []
    for folder in sorted((each for each in root.iterdir() if each.is_dir()), key=natural_order):
        count = sum(each.is_file() and is_picture(each) for each in folder.iterdir())
        if count >= WINDOW:
            cases.append(Case(folder.name, prompts.get(folder.name, folder.name.replace("-", " ")), folder))
        elif count:
            short.append(folder.name)
    if short:
        note(f"{root}: {len(short)} of its videos have fewer than {WINDOW} frames, and are left out: {short[0]}")
    return cases


def realestate(data: Path) -> list[Case]:
    cases, lacking, prompts = [], [], read_prompts(data)
    for file in sorted(data.glob("*.txt"), key=natural_order):
        video = next((path for path in (file.with_suffix(".mp4"), file.with_suffix("")) if path.exists()), None)
        if video is None:
            lacking.append(file.name)
        else:
            cases.append(Case(file.stem, prompts.get(file.stem, ""), video, poses=file))
    if lacking:
        note(f"{data}: {len(lacking)} clips have no {Path(lacking[0]).stem}.mp4 or folder of frames, and are left out")
    return cases


def wbench(data: Path) -> list[Case]:
    """The cases that begin with turns of navigation, up to the first other turn."""
    cases = []
    for file in sorted((data / "cases").glob("case_*.json"), key=natural_order):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            perspective = str(told.get("settings", {}).get("perspective", "third_person"))
            actions = [str(turn["action"]) for turn in told["interactions"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: expected a case with 'settings' and 'interactions', each of these with an"
                             " 'action'") from None
        other = [index for index, action in enumerate(actions) if read_keys(action) is None]
        actions = actions[: min(other, default=len(actions))]
        places = [data / "images" / f"{file.stem}.jpg", data / "images" / perspective / f"{file.stem}.jpg"]
        image = next((path for path in places if path.is_file()), None)
        if actions and image is None:
            raise ValueError(f"{places[0]}: no such picture, which {file} needs")
        if actions:
            parts = ("environment", "character", "perspective")
            words = [str(told.get(f"{part}_prompt", "")).strip() for part in parts]
            cases.append(Case(file.stem, " ".join(filter(None, words)), None, image, None, (*actions,), perspective))
    return cases


PROTOCOLS: dict[str, Callable[[Path], list[Case]]] = {"davis33": davis, "re10k33": realestate, "wbench-nav": wbench}


def read_cases(protocol: str, data: Path, names: list[str] | None) -> list[Case]:
    """Raises ValueError if there are none, or not those of the `names`."""
    if not data.is_dir():
        raise ValueError(f"--data {data}: no such folder")
    cases = PROTOCOLS[protocol](data)
    lost = {*(names or [])} - {case.name for case in cases}
    if lost or not cases:
        missing = f"no video {sorted(lost)[0]!r}" if lost else "none"
        raise ValueError(f"--data {data}: {missing} in the layout of {protocol} (docs/evaluate.md)")
    return [case for case in cases if names is None or case.name in names]


# -------------------------------------------------------------------------------------------------------------- paths


def write_poses(file: Path, c2w: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = c2w[:, :3].double().numpy().round(6).tolist()
    with replacing({"poses": file}) as files:
        files["poses"].write_text(json.dumps({"c2w": rows}) + "\n", encoding="utf-8")


def known_unit(pi3x: Pi3X, frames: np.ndarray, poses: Path) -> str:
    """The unit of a path in the first frame's median depth: what makes it fit the way that Pi3X sees."""
    found, wanted = cameras(pi3x, frames), normalize(load_path(poses).c2w, len(frames))[::STRIDE]
    scale = path_error(found, wanted)["scale"]
    if scale <= 0:
        raise ValueError(f"{poses}: Pi3X sees no such way in its video, so its unit can't be known")
    return f"{1 / scale / see(pi3x, frames[:1]).depth:.6g}depth"


def check_path(case: Case, given: Path | None, pi3x: Callable[[], Pi3X] | None) -> None:
    """Raises ValueError if a case's path is none, or not known and not to be found."""
    file = given or case.poses
    if file is not None:
        load_path(file)
    elif not case.actions and pi3x is None:
        raise ValueError(f"{case.name}: its camera is not known, and there is no Pi3X that could see it: give --poses"
                         " or --geometry")


def describe_case(case: Case, given: Path | None) -> list:
    """What its videos depend on: words, and what is in the files that are read."""
    shown, path = case.video or case.image, given or case.poses
    assert shown is not None
    # of a folder the first frames, which are all that counts of it
    frames = sorted(filter(is_picture, shown.iterdir()), key=natural_order)[:WINDOW] if shown.is_dir() else None
    return [case.prompt, [*case.actions], case.perspective, fingerprint(shown, frames), path and fingerprint(path)]


def find_path(case: Case, given: Path | None, folder: Path, pi3x: Callable[[], Pi3X] | None,
              frames: Callable[[], np.ndarray]) -> tuple[Path, list[str]]:
    """The file of a case's path, which may be made in `folder`, and words for sample.py's --set. `given` is the
    user's."""
    if given is not None:
        return given, []
    file = folder / f"{case.name}.json"
    if case.actions:
        write_poses(file, wanted_path([*case.actions], case.perspective != "first_person", WINDOW, **TURN))
        return file, []
    if case.poses is not None:
        return case.poses, [] if pi3x is None else [f"unit={known_unit(pi3x(), frames(), case.poses)}"]
    assert pi3x is not None  # `check_path`
    if not file.is_file():
        write_poses(file, see(pi3x(), frames()).path())
    return file, []
