"""Camera paths in text: rows of numbers with blanks or commas between, told by how many there are, and by a header."""

import json
import re
from pathlib import Path

import numpy as np

from files.cli import note
from geometry.recording import Recording, rigid_rows

Lines = list[tuple[str, list[str]]]  # place, words
NUMBER = r"[-+]?\d+(?:,\d+)?(?:[eE][-+]?\d+)?"
DECIMAL_COMMAS = re.compile(rf"\s*(?:{NUMBER}\s+)+{NUMBER}\s*")


def read_text(file: Path) -> str:
    """Text in any Unicode, as Windows' own programs write UTF-16; what is no text is no number either."""
    content = file.read_bytes()
    return content.decode(json.detect_encoding(content), errors="replace")


def split(line: str) -> list[str]:
    """Words between blanks, commas or semicolons, perhaps in quotes; a comma that does not part them is a point."""
    line = line.replace('"', "").replace(";", " ")
    return line.replace(",", "." if DECIMAL_COMMAS.fullmatch(line) else " ").split()


def read_lines(file: Path) -> Lines:
    """The words of all lines but comments, each line with its place."""
    return [(f"{file}, line {index}", split(line)) for index, line in enumerate(read_text(file).splitlines(), 1)
            if not line.lstrip().startswith("#")]


def floats(words: list[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def header_columns(file: Path, columns: int) -> dict[str, int]:
    """Which column is which, where a line above the numbers says so: x, y, z of a position, and w, x, y, z that all
    have the same other letters in front. Raises ValueError for positions without such a quaternion."""
    for line in read_text(file).splitlines():
        line = re.sub(r'\[[^]]*\]|"', "", line).lstrip("# ").lower()
        names = [name.strip() for name in (re.split("[,;]", line) if re.search("[,;]", line) else line.split())]
        if names and is_number(names[0]):
            return {}
        triples = [name[:-1] for name in names if {name[:-1] + letter for letter in "xyz"} <= set(names)]
        place = [front for front in triples if front + "w" not in names]
        turn = [front for front in triples if front + "w" in names]
        if len(names) == columns and place:
            if not turn:
                raise ValueError(f"{file}: columns {', '.join(names)}, expected a quaternion among them, as in"
                                 " x, y, z, qx, qy, qz, qw")
            return ({letter: names.index(place[0] + letter) for letter in "xyz"}
                    | {f"q{letter}": names.index(turn[0] + letter) for letter in "wxyz"})
    return {}


def seconds(stamps: np.ndarray, file: Path) -> tuple[np.ndarray | None, bool]:
    """Time stamps in seconds, or in frames (then True); None if they don't tell the time. Whole numbers are frames if
    they are small, else micro- or nanoseconds."""
    steps = np.diff(np.sort(stamps)) if np.isfinite(stamps).all() else np.zeros(1)
    if not len(steps) or steps.min() <= 0:
        if len(steps) and steps.max() > 0:
            note(f"{file}: the same time stands in several lines, so the lines' order counts, and no rate is known")
        return None, False
    if (stamps % 1 == 0).all():
        step = np.median(steps)
        return (stamps, True) if step < 1000 else (stamps / (1e9 if step > 1e6 or stamps.max() > 1e14 else 1e6), False)
    return stamps, False


def placed(file: Path, rows: np.ndarray, first: int, usual: str = "x y z qx qy qz qw") -> np.ndarray:
    """Poses of positions and quaternions, in the columns that a header names, else from the `first` on as usual."""
    place = header_columns(file, rows.shape[1])
    if not place:
        place = {name: first + index for index, name in enumerate(usual.split())}
        q = rows[:, [place[name] for name in ("qx", "qy", "qz", "qw")]]
        if np.abs(q[0] - [1, 0, 0, 0]).max() < 1e-6 and np.abs(q - [0, 0, 0, 1]).max(1).min() > 0.1:
            raise ValueError(f"{file}: the first quaternion is 1 0 0 0, a half turn in the order x y z w. If w comes"
                             f" first, say so in a line above: # {'timestamp ' * first}tx ty tz qw qx qy qz")
    q, position = ([place[name] for name in names] for names in (("qw", "qx", "qy", "qz"), ("x", "y", "z")))
    return rigid_rows(rows[:, q], rows[:, position])


def tum(file: Path, rows: np.ndarray) -> Recording:
    """TUM's time, position, quaternion x y z w; another order, as EuRoC's 17 columns, by a header."""
    times, counted = seconds(rows[:, 0], file)
    usual = ("x y z qw qx qy qz",) * (rows.shape[1] > 8)
    return Recording(str(file), placed(file, rows, 1, *usual), "c2w", times=times, counted=counted)


def seven(file: Path, rows: np.ndarray) -> Recording:
    """Position and quaternion x y z w, or ARKitScenes' .traj: time, axis and angle, translation, world-to-camera."""
    if header_columns(file, 7) or np.abs(np.linalg.norm(rows[:, 3:], axis=1) - 1).max() < 0.02:
        return Recording(str(file), placed(file, rows, 0))
    angle = np.linalg.norm(rows[:, 1:4], axis=1, keepdims=True)
    q = np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * rows[:, 1:4] / angle.clip(1e-12)], axis=1)
    times, counted = seconds(rows[:, 0], file)
    return Recording(str(file), rigid_rows(q, rows[:, 4:]), "w2c", times=times, counted=counted)


def matrices(file: Path, rows: np.ndarray) -> Recording:
    """KITTI's 3x4 or a whole 4x4 in a row; KITTI-360 puts the number of the frame in front."""
    numbered = rows.shape[1] % 2 == 1
    poses = rows[:, numbered:].reshape(len(rows), -1, 4)
    times, counted = seconds(rows[:, 0], file) if numbered else (None, False)
    return Recording(str(file), poses, times=times, counted=counted)


def realestate(file: Path, rows: np.ndarray) -> Recording:
    """RealEstate10K, CameraCtrl: time, fx fy cx cy in shares of the picture, 0 0, 3x4 world-to-camera. The shares tell
    the shape of pictures with square pixels. Older files of 18 columns have no time."""
    times, counted = seconds(rows[:, 0], file) if rows.shape[1] == 19 else (None, False)
    rows = rows[:, -18:]
    with np.errstate(all="ignore"):
        width = rows[0, 1] / rows[0, 0]
    if not np.isfinite(rows[:, :4]).all() or not (rows[:, :2] > 0.004).all():
        raise ValueError(f"{file}: focal length {rows[0, 0]:g} of the width, expected a view of 1 to 179 degrees")
    lens = rows[:, :4] * [width, 1, width, 1]
    return Recording(str(file), rows[:, 6:].reshape(-1, 3, 4), "w2c", lens, (width, 1.0), times=times, counted=counted)


def blocks(file: Path, rows: np.ndarray) -> Recording:
    """A matrix of four columns below the other, 4x4 or 3x4."""
    whole = len(rows) % 4 == 0 and (np.abs(rows[3::4] - [0, 0, 0, 1]).max() < 1e-5)
    if not whole and len(rows) % 3:
        raise ValueError(f"{file}: {len(rows)} rows of 4 columns, expected blocks of 4 (ending in 0 0 0 1) or of 3")
    return Recording(str(file), rows.reshape(-1, 4 if whole else 3, 4))


COLUMNS = {4: blocks, 7: seven, 8: tum, 12: matrices, 13: matrices, 16: matrices, 17: matrices, 18: realestate,
           19: realestate}  # fmt: skip
EXPECTED = "8 columns (TUM), 12 (KITTI) or 19 (RealEstate10K), or 4 (blocks of 4x4), 7, 13, 16, 17, 18"


def from_text(file: Path) -> Recording:
    """Lines of text before the numbers (an address, a title, a header) are passed over."""
    lines = [(where, words) for where, words in read_lines(file) if words]
    while lines and not is_number(lines[0][1][0]):
        lines = lines[1:]
    widths = [len(words) for _, words in lines]
    if 4 in widths and set(widths) == {3, 4}:  # Open3D's .log: three numbers above each matrix
        lines = [(where, words) for where, words in lines if len(words) == 4]
    columns = len(lines[0][1]) if lines else 0
    if len(lines) == 3 and set(widths) == {columns} and not any(floats(words[:1], where)[0] for where, words in lines):
        raise ValueError(f"{file}: three lines that begin with 0, as ViewCrafter's angles and distances; they turn"
                         " about a point of its own reconstruction and are not read, expected poses or --move")
    if columns not in COLUMNS:
        raise ValueError(f"{file}: {f'{columns} columns' if columns else 'no line of numbers'}, expected {EXPECTED}")
    for where, words in lines:
        if len(words) != columns:
            raise ValueError(f"{where}: {len(words)} columns, expected {columns} as in the first pose")
    rows = np.array([floats(words, where) for where, words in lines])
    euroc = columns == 17 and abs(np.linalg.norm(rows[0, 4:8]) - 1) < 1e-3 and rows[0, 0] > 1e6
    return (tum if euroc else COLUMNS[columns])(file, rows)


# ---- keys, as other programs take them


KEYS = {  # dialect -> what a key does in a step: (forward, right, yaw, pitch), in units and degrees
    "worldplay": {"w": (0.08, 0, 0, 0), "s": (-0.08, 0, 0, 0), "a": (0, -0.08, 0, 0), "d": (0, 0.08, 0, 0),
                  "right": (0, 0, 3, 0), "left": (0, 0, -3, 0), "up": (0, 0, 0, 3), "down": (0, 0, 0, -3)},
    "sana": {"w": (0.025, 0, 0, 0), "s": (-0.025, 0, 0, 0), "l": (0, 0.025, 0, 0), "j": (0, -0.025, 0, 0),
             "d": (0, 0, 0.6, 0), "a": (0, 0, -0.6, 0), "i": (0, 0, 0, 0.6), "k": (0, 0, 0, -0.6),
             "none": (0, 0, 0, 0)},
}  # fmt: skip


def from_keys(text: str) -> Recording:
    """Key strings such as "worldplay:w-3,right-1" (steps are latent frames) or "sana:w-80,dw-40" (steps are frames; at
    once, without its gentle stops): keys held together, and for how many steps."""
    dialect, _, phrases = text.partition(":")
    keys = KEYS[dialect]
    pattern = "|".join(sorted(keys, key=len, reverse=True))
    pose, poses = np.eye(4), [np.eye(4)]
    for phrase in phrases.split(","):
        match = re.fullmatch(rf"\s*((?:{pattern})+)\s*-\s*([0-9]+)(?:\.[0-9]*)?\s*", phrase)
        if not match or not 0 < int(match[2]) < 10_000:
            raise ValueError(f"{text[:80]!r}: {phrase!r}, expected keys ({', '.join(keys)}) and a number of steps, as"
                             f" in '{next(iter(keys))}-3'")
        held = np.sum([keys[key] for key in set(re.findall(pattern, match[1]))], axis=0)
        forward, right, yaw, pitch = held * [1, 1, np.pi / 180, np.pi / 180]
        turn = np.eye(4)
        turn[:3, :3] = (np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
                        @ [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        for _ in range(int(match[2])):
            pose = pose @ turn
            pose[:3, 3] += pose[:3, :3] @ [right, 0, forward]
            poses.append(pose.copy())
    latents = dialect == "worldplay"
    return Recording(text[:80], np.stack(poses), latents=latents, fps=24 if latents else 16)
