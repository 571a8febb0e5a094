"""Bad command lines: exit status 2, one line that names what is wrong, no file made or changed, no network loaded.

The table is compact: an option, and what is bad for it; files are bad in every way for every option that reads one.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from goldens import DISTILLED
from PIL import Image

import render
import sample
import train

SMALL = {"--weights": [str(DISTILLED)], "--size": ["64x64"]}
BASES = {  # program -> options that are good, so that one bad option stands out
    "sample": {"--image": ["image.png"], "--move": ["hold"], "--depth": ["depth.npy"], **SMALL, "--set": ["device=cpu"]},
    "native": {**SMALL, "--set": ["device=cpu"]},
    "warp": {"--image": ["image.png"], "--warp": ["warp.npy", "mask.npy"], **SMALL, "--set": ["device=cpu"]},
    "render": {"--image": ["image.png"], "--move": ["hold"], "--depth": ["depth.npy"], "--size": ["64x64"]},
    "train": {"--video": ["clip.npy"], "--poses": ["poses.json"], "--depth": ["depths.npz"], "--device": ["cpu"], **SMALL},
}
INSTEAD = {"--poses": {"--move"}, "--warp": {"--move", "--depth"}, "--geometry": {"--depth", "--poses"}}  # what an option stands for
MAINS = {"sample": sample.main, "native": sample.main, "warp": sample.main, "render": render.main, "train": train.main}

# Ways in which a file that is to be read is bad: its name, without a suffix.
FILES = {"missing": "none", "empty": "empty", "rubbish": "rubbish", "folder": "folder", "pipe": "pipe", "loop": "loop",
         "below a file": "image.png/x", "too long": "n" * 300, "dangling": "dangling", "device": "/dev/null", "words": "words"}
READERS = {  # program, option, suffix of the file
    ("sample", "--image", ".png"), ("sample", "--poses", ".json"), ("sample", "--poses", ".txt"), ("sample", "--poses", ".npz"),
    ("sample", "--depth", ".npy"), ("sample", "--depth", ".npz"), ("sample", "--depth", ".png"), ("warp", "--warp", ".mp4"),
    ("warp", "--warp", ".npy"), ("sample", "--lora", ".safetensors"), ("sample", "--lora", ".pt"), ("native", "--video", ".mp4"),
    ("sample", "--weights", ""), ("train", "--weights", ""), ("train", "--video", ".mp4"), ("train", "--video", ".npy"),
    ("train", "--video", ".csv"), ("train", "--poses", ".json"), ("train", "--depth", ".npz"), ("render", "--image", ".jpg"),
    ("render", "--poses", ".json"), ("render", "--depth", ".png"), ("train", "--geometry", ".safetensors"),
}

SIZES = ["64", "64x", "x64", "64x65", "-64x64", "0x0", "8x8", "99999x64", "64x64x64", "axb", "64 x64", "1e2x64"]
FRAMES = ["0", "-1", "1.5", "many", "1" + "0" * 30, "1000001", "nan"]
RATES = ["0", "-1", "nan", "inf", "241", "fast", "1e30"]
OUTS = ["o.txt", "o", "no/such/o.mp4", ".mp4", "folder/.mp4", "/proc/o.mp4", "image.png/o.mp4", "n" * 300 + ".mp4", "image.mp4", "/dev/null"]
MOVES = ["", "fly 3", "forward", "forward one", "forward 1 2", "forward nan", "yaw inf", "forward 1,, yaw 2", "+", "forward 1 +",
         "hold 3 forward", "forward 1e400"]
MORE = {  # program, option -> bad values
    ("sample", "--size"): [*SIZES, "64x100"], ("render", "--size"): SIZES, ("train", "--size"): [*SIZES, "64x32"],
    ("sample", "--frames"): FRAMES, ("render", "--frames"): FRAMES, ("native", "--frames"): FRAMES,
    ("render", "--fps"): RATES, ("sample", "--fps"): RATES,
    ("sample", "--out"): OUTS, ("render", "--out"): OUTS,
    ("train", "--out"): ["image.png", "clip.npy/run", "foreign", "link", ".", "n" * 300, "/proc/run", "/dev/null"],
    ("sample", "--move"): MOVES, ("render", "--move"): MOVES,
    ("sample", "--seed"): ["-1", "x"], ("sample", "--memory"): ["half", "FULL", ""],
    ("train", "--memory"): ["half", ""], ("train", "--device"): ["tpu", "cuda:x", "cuda:77", "", "CPU"],
    ("sample", "--nonsense"): ["1"], ("render", "--nonsense"): ["1"], ("train", "--nonsense"): ["1"],
    ("sample", "--unit"): ["mile", ""], ("sample", "--steps"): ["x"], ("train", "--rank"): ["0"],
    ("render", "--fov"): ["0", "180", "nan", "wide", "1,2,3", "-5"], ("render", "--unit"): ["mile", "-1", "nan", "0"],
    ("train", "--prompt"): [["a", "--prompt", "b"]], ("train", "--poses"): [["poses.json", "--poses", "poses.json"]],
    ("sample", "--continue"): [["--image", "image.png"]],
}
WHOLE = ["0", "-1", "1.5", "x", "1" + "0" * 30]
SHARE = ["-0.1", "1.1", "nan", "inf", "x"]
SETTINGS = {  # program, setting -> bad values
    ("sample", "steps"): ["0", "0,1,1", "2,2", "2,2,2,2", "x", "1.5,1,1", "-1,1,1", "", "1,1,1000000000"],
    ("sample", "seed"): ["-1", "1.5", "x", str(2**63), ""], ("sample", "split"): ["heads", "", "tokens"], ("sample", "part"): ["0/1", "3/2", "x", "", "1/2"],
    ("sample", "guidance"): ["-1", "1001", "nan", "x", "inf"], ("sample", "threshold"): SHARE, ("sample", "align"): ["yes", "1", "True", ""],
    ("sample", "zero_steps"): ["-1", "x", "1.5"], ("sample", "warp_sigma"): ["0.2,0.1", "0.1", "x,y", "-1,0", "0,2", "0,nan"],
    ("sample", "previous"): ["-1,2,3", "1,2", "x", "1,2,3,4"], ("sample", "keyframes"): WHOLE[:4] + ["3"],
    ("sample", "keyframe_choice"): ["covering", "best", ""], ("sample", "known_poses"): ["true", "1"],
    ("sample", "fov"): ["0", "180", "nan", "wide"], ("sample", "latents"): ["x", "x.txt", "no/such/x.safetensors", "image.png", ""],
    ("sample", "device"): ["tpu", "cuda:77", ""], ("sample", "preset"): ["fast", ""], ("sample", "samples"): ["0", "-1", "1000", "x"],
    ("sample", "unit"): ["mile", "-1", "nan", ""], ("sample", "warp_fill"): ["white"], ("sample", "warp_band"): ["long", "far"],
    ("sample", "fps"): RATES, ("sample", "relative"): ["clip"], ("sample", "poses_of_clip"): ["poses.json", ""],
    ("sample", "geometry"): ["none.safetensors", ""], ("sample", "prompt_blend"): ["0", "x", "101"],
    ("sample", "nosuch"): ["1", ""], ("sample", ""): ["", "1"], ("native", "threshold"): ["0.5"], ("native", "fov"): ["60"],
    ("native", "check"): ["maybe"], ("sample", "geometry_pixels"): ["-1", "x"],
    ("train", "steps"): WHOLE, ("train", "rank"): WHOLE, ("train", "draws"): WHOLE, ("train", "save_every"): WHOLE[:4],
    ("train", "lr"): ["0", "-1", "nan", "inf", "x"], ("train", "warmup"): ["-1", "x"], ("train", "decay"): ["slow", ""],
    ("train", "stages"): ["3", "-1", "", "x", "0,9"], ("train", "history"): ["-1,2,1", "1,2"], ("train", "threshold"): SHARE,
    ("train", "reverse"): SHARE, ("train", "future_count"): ["2", "3,2", "0,1", "1,99"], ("train", "forms"): ["0", "13", "x"],
    ("train", "seed"): ["-1", str(2**63), "x"], ("train", "warp_sigma"): ["0.2,0.1", "0.1"], ("train", "position"): ["left"], ("train", "density"): ["thick"],
    ("train", "levels"): ["high"], ("train", "nosuch"): ["1"], ("train", "drop"): ["maybe"], ("train", "clip"): ["0", "nan"],
}
PAIRS = [  # program, words in place of the base's, what the line names
    ("sample", ["--move", "hold"], "--image"), ("sample", ["--image", "image.png", "--depth", "depth.npy"], "--depth"),
    ("sample", ["--image", "image.png", "--move", "hold", "--poses", "poses.json"], "--poses"),
    ("sample", ["--image", "image.png", "--warp", "warp.npy", "--move", "hold"], "--move"),
    ("sample", ["--image", "image.png", "--warp", "warp.npy", "--frames", "99"], "warp.npy"),
    ("sample", ["--image", "image.png", "--warp", "warp.npy", "short.npy"], "short.npy"),
    ("sample", ["--image", "image.png", "--warp", "warp.npy", "mask.npy", "mask.npy"], "--warp"),
    ("sample", ["--image", "image.png", "--warp", "mask.npy"], "mask.npy"), ("sample", ["--warp", "warp.npy"], "--image"),
    ("sample", ["--image", "image.png", "--lora", "x.safetensors"], "--lora"),
    ("sample", ["--video", "short_clip.npy"], "short_clip.npy"), ("sample", ["--continue"], "--continue"),
    ("sample", ["--image", "clip.npy"], "--video clip.npy"), ("sample", ["--video", "clip.npy", "--warp", "warp.npy"], "--image"),
    ("sample", ["--video", "clip.npy", "--image", "image.png"], "--image"), ("sample", ["--video", "clip.npy", "--move", "hold", "--frames", "35"], "clip.npy"),
    ("sample", ["image.png"], "image.png"), ("sample", ["--image"], "--image"), ("sample", ["--set"], "--set"),
    ("sample", ["--set", "steps"], "steps"), ("sample", ["--set", "=1"], "=1"),
    ("render", ["--move", "hold"], "--image"), ("render", ["--image", "image.png"], "--poses"),
    ("render", ["--image", "image.png", "--move", "hold", "--poses", "poses.json"], "--poses"),
    ("render", ["--image", "image.png", "--move", "hold", "--depth", "depth.npy", "--geometry", "x"], "--geometry"),
    ("render", ["--image", "image.png", "--move", "hold", "--inverse-depth"], "--inverse-depth"),
    ("train", [], "--video"), ("train", ["--video", "clip.npy"], "--geometry"), ("train", ["--video", "short_clip.npy", "--poses", "poses.json", "--depth", "depths.npz"], "short_clip.npy"),
    ("train", ["--video", "clip.npy", "--poses", "poses.json"], "--poses"), ("train", ["--video", "clip.npy", "--depth", "depths.npz"], "--depth"),
    ("train", ["--video", "clip.npy", "--resume", "--overwrite"], "--overwrite"), ("train", ["--video", "clip.npy", "--resume"], "--resume"),
    ("train", ["--video", "clip.npy", "--poses", "two.json", "--depth", "depths.npz"], "two.json"),
    ("train", ["--video", "none", "--poses", "poses.json", "--depth", "depths.npz"], "none"),
    ("train", ["--video", "folder", "--poses", "poses.json", "--depth", "depths.npz"], "folder"),
    ("train", ["--video", "list.csv", "--prompt", "a"], "list.csv"),
]


def bad_file(name: str, suffix: str) -> str:
    return name if name.startswith("/") else name + suffix


def command(program: str, option: str, *values: str) -> list[str]:
    """Good words, but for one option."""
    base = {name: words for name, words in BASES[program].items()
            if name not in {option, *(INSTEAD.get(option, ()) if program != "train" or option == "--geometry" else ())}}
    words = [word for name, given in base.items() for word in (name, *given)]
    return [*words, *([f"{option}={values[0]}"] if len(values) == 1 else [option, *values])]


def lines() -> list[tuple[str, list[str], str]]:
    """Program, words, and what the one line names."""
    found = []
    for program, option, suffix in sorted(READERS):
        for name in {**FILES, "nothing": ""}.values():
            file = bad_file(name, suffix) if name else ""
            good = {(".txt", "words"), ("", "folder")}  # a folder is no bad name for one that is to be a folder
            if (suffix, name) not in good and not (option == "--lora" and not name):  # an empty word is "off" there
                found.append((program, command(program, option, file), file[:200] or option))
    for (program, option), values in MORE.items():
        for value in values:
            given = value if isinstance(value, list) else [value]
            culprit = given[0][:30] if option == "--out" else "move" if option == "--move" else option[2:]
            found.append((program, command(program, option, *given), culprit))
    for (program, name), values in SETTINGS.items():
        more = [] if program == "train" else ["device=cpu"]
        for value in values:
            culprit = value if name == "latents" and "." in value else name or f"={value}"
            found.append((program, command(program, "--set", *more, f"{name}={value}"), culprit))
    for program, words, culprit in PAIRS:
        more = {} if program == "render" else SMALL
        found.append((program, [*words, *(word for name, given in more.items() for word in (name, *given))], culprit))
    return found


LINES = lines()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    before = Path.cwd()
    os.chdir(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save("image.png")
    np.save("depth.npy", np.full((64, 64), 2, np.float32))
    np.savez("depths.npz", np.full((34, 64, 64), 2, np.float32))
    for name, count in (("clip", 34), ("short_clip", 5)):
        np.save(f"{name}.npy", np.zeros((count, 64, 64, 3), np.uint8))
    np.save("warp.npy", np.zeros((40, 64, 64, 3), np.uint8))
    np.save("mask.npy", np.ones((40, 64, 64), np.uint8))
    np.save("short.npy", np.ones((39, 64, 64), np.uint8))
    for name, count in (("poses", 34), ("two", 2)):
        Path(f"{name}.json").write_text(json.dumps({"c2w": [np.eye(4).tolist()] * count}))
    Path("list.csv").write_text("video,prompt\nclip.npy,a\n")
    Path("foreign").mkdir()
    Path("foreign/notes.txt").write_text("mine")
    Path("link").symlink_to("foreign")
    Path("image.mp4").mkdir()
    suffixes = {suffix for _, _, suffix in READERS}
    for suffix in suffixes:
        Path("empty" + suffix).write_bytes(b"")
        Path("rubbish" + suffix).write_bytes(rng.bytes(500))
        Path("words" + suffix).write_text("no file of that kind\nat all\n")
        Path("folder" + suffix).mkdir()
        os.mkfifo("pipe" + suffix)
        Path("loop" + suffix).symlink_to("loop" + suffix)
        Path("dangling" + suffix).symlink_to("nowhere")
    yield folder
    os.chdir(before)


def everything(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def too_long(number, frame):
    raise AssertionError("it hangs")


def test_the_table_is_large():
    assert len({(MAINS[program], *words) for program, words, _ in LINES}) >= 500


@pytest.mark.parametrize("part", range(8))
def test_bad_command_lines(place, capsys, monkeypatch, part):
    for name in ("sample.encode_each", "sample.load_models", "train.embed_prompts", "train.load_models", "render.render_frames"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("accepted"))
    before, wrong = everything(place), []
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        for program, words, culprit in LINES[part::8]:
            capsys.readouterr()
            signal.alarm(20)
            try:
                status = MAINS[program](words)
            except SystemExit as end:  # argparse
                status = end.code
            except (Exception, pytest.fail.Exception) as error:
                status = f"{type(error).__name__}: {error}"
            finally:
                signal.alarm(0)
            error = capsys.readouterr().err.strip()
            if status != 2 or "\n" in error or culprit not in error or ": error: " not in error:
                wrong.append((program, words, culprit, status, error[-300:]))
            if everything(place) != before:
                wrong.append((program, words, "changes files"))
                break
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert not wrong, "\n".join(map(str, wrong))
