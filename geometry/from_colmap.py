"""Camera paths in folders: COLMAP models, text or binary, and folders of one file a frame."""

import struct
from pathlib import Path

import numpy as np

from files.checkpoint import read_json_value
from files.media import natural_order
from geometry.from_json import from_json, polycam
from geometry.from_text import floats, from_text, read_lines
from geometry.recording import Recording, refuse_lens, rigid_rows

MODELS = {  # number in binary files -> name, parameters; the simple ones have one focal length
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12),
}  # fmt: skip
Cameras = dict[str, tuple[list[float], tuple[float, float]]]  # number -> fx, fy, cx, cy; width, height
Images = list[tuple[str, str, list[float]]]  # name, number of the camera, quaternion w x y z and translation


def add_camera(cameras: Cameras, number: object, model: str, size: list[float], parameters: list[float],
               where: str) -> None:
    refuse_lens(model, where)
    single = model.startswith(("SIMPLE", "RADIAL"))
    if len(parameters) < 4 - single or not all(1 <= side <= 1e6 for side in size):
        raise ValueError(f"{where}: {model}: size {size}, {len(parameters)} parameters, expected at least"
                         f" {4 - single}, and sides from 1 to 1000000")
    fx, fy, cx, cy = parameters[:1] * single + parameters[: 4 - single]
    cameras[str(number)] = [fx, fy, cx, cy], (size[0], size[1])


def text_model(folder: Path) -> tuple[Images, Cameras]:
    """images.txt, two lines an image, of which the second may be empty; blank lines before an image are passed over."""
    images, cameras, lines = [], {}, iter(read_lines(folder / "images.txt"))
    for where, words in lines:
        if not words:
            continue
        _, points = next(lines, ("", []))
        if len(words) < 10 or len(points) % 3:
            raise ValueError(f"{where}: expected ID, quaternion, translation, camera, NAME, and a line of points next")
        images.append((" ".join(words[9:]), words[8], floats(words[1:8], where)))
    file = folder / "cameras.txt"
    for where, words in read_lines(file) if file.is_file() else []:
        if words and len(words) < 7:
            raise ValueError(f"{where}: expected ID, MODEL, WIDTH, HEIGHT and parameters")
        if words:
            add_camera(cameras, words[0], words[1], floats(words[2:4], where), floats(words[4:], where), where)
    return images, cameras


def binary_model(folder: Path) -> tuple[Images, Cameras]:
    """images.bin and cameras.bin, little-endian: a count, then records."""
    images, cameras, file = [], {}, folder / "cameras.bin"
    try:
        data, at = file.read_bytes(), 8
        for _ in range(struct.unpack_from("<Q", data)[0]):
            number, model, width, height = struct.unpack_from("<iiQQ", data, at)
            name, length = MODELS.get(model, (f"MODEL {model}", 4))
            parameters = list(struct.unpack_from(f"<{length}d", data, at + 24))
            add_camera(cameras, number, name, [width, height], parameters, str(file))
            at += 24 + 8 * length
        file = folder / "images.bin"
        data, at = file.read_bytes(), 8
        for _ in range(struct.unpack_from("<Q", data)[0]):
            _, *pose, camera = struct.unpack_from("<i7di", data, at)
            end = data.index(b"\0", at + 64)
            images.append((data[at + 64 : end].decode(errors="replace"), str(camera), pose))
            (points,) = struct.unpack_from("<Q", data, end + 1)
            at = end + 9 + 24 * points
    except (struct.error, ValueError, OverflowError) as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file}: not a readable COLMAP file ({error})") from None
    return images, cameras


def colmap(folder: Path) -> Recording:
    """World-to-camera, in the order of the images' names."""
    text = (folder / "images.txt").is_file()
    images, cameras = (text_model if text else binary_model)(folder)
    where = str(folder / ("images.txt" if text else "images.bin"))
    places = sorted({name.rpartition("/")[0] for name, _, _ in images})
    if len(places) > 1:
        raise ValueError(f"{where}: images of several cameras, in {', '.join(places[:5])}: expected those of one")
    rows = np.array([row for *_, row in images]).reshape(-1, 7)
    found = Recording(where, rigid_rows(rows[:, :4], rows[:, 4:]), "w2c", names=[name for name, _, _ in images])
    missing = sorted({camera for _, camera, _ in images} - cameras.keys())
    if cameras and missing:
        raise ValueError(f"{where}: camera {missing[0]} is not in cameras.{'txt' if text else 'bin'}")
    if cameras and images:
        views = [cameras[camera] for _, camera, _ in images]
        _, first = views[0]  # all in its pixels
        found.lens = np.array([np.array(lens) * np.tile([first[0] / w, first[1] / h], 2) for lens, (w, h) in views])
        found.size = first
    return found


def one_a_frame(folder: Path, files: list[Path]) -> Recording:
    """A folder with a file of one matrix for each frame: 7-Scenes, ScanNet (camera-to-world), or Polycam's json."""
    names = [file.stem for file in files]
    if files[0].suffix == ".json":
        frames = [read_json_value(file) for file in files]
        return polycam([frame if isinstance(frame, dict) else {} for frame in frames], str(folder), names)
    parts = [from_text(file).poses for file in files]
    for file, part in zip(files, parts):
        if len(part) != 1:
            raise ValueError(f"{file}: {len(part)} poses, expected one")
    return Recording(str(folder), np.concatenate([part[:, :3] for part in parts]), names=names)


BELOW = ("sparse/0", "sparse", "0", "colmap/sparse/0", "keyframes/corrected_cameras", "corrected_cameras",
         "keyframes/cameras", "cameras", "pose", "poses", "dslr")  # fmt: skip


def from_folder(folder: Path) -> Recording:
    """A COLMAP model, one file a frame, or transforms.json; also where such a project keeps it below."""
    for place in (folder, *(folder / name for name in BELOW)):
        if (place / "images.txt").is_file() or (place / "images.bin").is_file():
            return colmap(place)
        files = sorted((file for kind in ("*.pose.txt", "[0-9]*.txt", "[0-9]*.json") for file in place.glob(kind)),
                       key=natural_order)
        if len(files) > 1:
            return one_a_frame(place, files)
        if (place / "transforms.json").is_file():
            return from_json(place / "transforms.json")
    raise ValueError(f"{folder}: a folder without images.txt, expected a COLMAP model (images.txt or images.bin, here"
                     " or in sparse/0), or a file of one pose for each frame")
