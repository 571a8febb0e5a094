"""sample.py as a user runs it: every way in, lengths, what is left behind, and bad input."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from random import Random

import goldens
import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS, check
from known import load_video
from PIL import Image
from safetensors.torch import load_file, save_file

import files
from files.checkpoint import open_safetensors
from files.output import Output
from geometry import surface
from geometry.pi3x import load_pi3x
from helios.load import load_models
from job import start_video
from mini.world import STILLS, caption, make_scene
from render import Warp
from sample import main, parse, pictures
from wah import Chunk, Rollout

RUNS = goldens.tensors(HELIOS / "pipeline_runs.safetensors")
CASES = goldens.cases(HELIOS / "pipeline_cases.json")
SIZE = CASES["_common"]["height"], CASES["_common"]["width"]
SIZED = "x".join(map(str, SIZE))
with np.load(HELIOS / "pipeline_inputs.npz") as file:
    INPUTS = dict(file)
LONG = len(INPUTS["warp"])  # frames


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with the official runs' inputs as files; geometry is coarse, to be fast."""
    monkeypatch.chdir(tmp_path)
    small = surface.geometry_size
    monkeypatch.setattr(surface, "map_size", lambda height, width, *limit: small(height, width, 11_760))
    Image.fromarray(INPUTS["image"]).save("image.png")
    np.save("warp.npy", INPUTS["warp"])
    np.save("mask.npy", INPUTS["mask"])
    c2w = np.tile(np.eye(4), (33, 1, 1))
    c2w[:, 2, 3] = np.linspace(0, 1, 33)
    (tmp_path / "poses.json").write_text(json.dumps({"c2w": c2w.tolist(), "fps": 12}))
    np.save("depth.npy", np.linspace(3, 1, SIZE[0], dtype=np.float32)[:, None].repeat(SIZE[1], 1))
    return tmp_path


def sample(*words: str, weights=DISTILLED) -> int:
    return main(["--weights", str(weights), "--size", SIZED, "--set", "device=cpu", *words])


def read(path: str) -> np.ndarray:
    return load_video(path)


@pytest.mark.parametrize("case, extra", [
    ("wah_2c", []), ("wah_2c_lora", ["--lora", str(HELIOS / "lora_noprefix.safetensors")]),
    ("wah_1c_norope", ["--set", "align=false"]), ("wah_1c_nodrop", ["--set", "drop=false"]),
    ("wah_1c_nowarpnoise", ["--set", "warp_noise=false"]),
])
def test_official_latents(place, case, extra):
    """From files to the official latents of the same seed."""
    desc = CASES[case]["desc"]
    words = ["--image", "image.png", "--warp", "warp.npy", "mask.npy", "--prompt", CASES["_common"]["prompt"]]
    words += ["--frames", str(desc["num_frames_arg"]), "--set", f"seed={desc['seed']}"]
    assert sample(*words, "--set", "latents=x.safetensors", *extra) == 0
    latents = load_file("x.safetensors")["latents"]
    full = f"{case}.latents" in RUNS
    actual, expected = (latents, RUNS[f"{case}.latents"]) if full else (latents[:, 1::5], RUNS[f"{case}.latents_ch"])
    check("sample.py, latents, max", actual, expected, 3e-4)


def test_frames_cut_the_output_alone(place):
    """Of the official run of 99 frames, asked for 90, the latents are the same; along poses the first frames too."""
    common = ["--image", "image.png", "--prompt", CASES["_common"]["prompt"], "--set", f"seed={CASES['wah_3c']['desc']['seed']}"]
    words = [*common, "--warp", "warp.npy", "mask.npy", "--frames", "90", "--set", "latents=x.safetensors"]
    assert sample(*words) == 0
    check("sample.py, latents, max", load_file("x.safetensors")["latents"][:, 1::5], RUNS["wah_3c.latents_ch"], 3e-4)
    assert len(read("out.mp4")) == 90
    poses = ["--image", "image.png", "--poses", "poses.json", "--depth", "depth.npy", "--set", "latents=x.safetensors"]
    assert sample(*poses) == 0
    whole = load_file("x.safetensors")["latents"]
    assert sample(*poses, "--frames", "7") == 0
    assert torch.equal(load_file("x.safetensors")["latents"], whole) and len(read("out.mp4")) == 7


@pytest.mark.parametrize("words", [["--frames", "2"], ["--frames", "2", "--set", "fps=24", "--out", "a b.mp4"]])
def test_the_encoder_is_tried_before_the_networks_are_loaded(place, monkeypatch, capsys, words):
    monkeypatch.setattr("av.codecs_available", {"h264"})
    monkeypatch.setattr("sample.encode_each", None)  # would be called first
    before = set(place.iterdir())
    assert sample(*words) == 2
    assert "no encoder libx264" in capsys.readouterr().err and set(place.iterdir()) == before


def test_a_video_to_continue_is_resized_as_it_is_read(monkeypatch):
    """Never more than one frame at its own size in memory, the rest as 8 bit."""
    alive = []

    def read_frames(path):
        for index in range(40):
            frame = np.full((400, 640, 3), index, np.uint8)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(each() is not None for each in alive) <= 1

    monkeypatch.setattr("job.read_frames", read_frames)
    video = start_video(Path("v.mp4"), SIZE).video
    assert video.shape == (1, 3, 40, *SIZE) and video.dtype == torch.uint8 and len(alive) == 40
    assert (video[0, 0, :, 0, 0] == torch.arange(40)).all()


@pytest.mark.parametrize("words, length, led", [
    (["--image", "image.png", "--poses", "poses.json", "--depth", "depth.npy"], 33, True),
    (["--image", "image.png", "--poses", "poses.json", "--frames", "40"], 40, True),  # the last pose holds
    (["--image", "image.png", "--move", "forward 1, yaw -20"], 66, True),
    (["--image", "image.png", "--warp", "warp.npy", "--frames", "10"], 10, True),
    (["--image", "image.png", "--frames", "5"], 5, False),
    (["--video", "warp.npy", "--frames", "5"], 5, False),  # a video is continued
    ([], 33, False),
])
def test_lengths_and_files(place, words, length, led):
    assert sample("--out", "out.mp4", *words) == 0
    assert read("out.mp4").shape == (length, *SIZE, 3)
    made = {"out.mp4", "out_sheet.png"} | ({"out_warp.mp4"} if led else set())
    given = {"image.png", "warp.npy", "mask.npy", "poses.json", "depth.npy"}
    assert {path.name for path in place.iterdir()} == made | given
    if led:
        assert read("out_warp.mp4").shape == (length, *SIZE, 3)


def test_warp_goes_with_the_poses(place):
    """The warp video starts with the picture, and moving forward enlarges what is in the middle: a white square
    grows."""
    picture = np.full((*SIZE, 3), 60, np.uint8)
    row, column = SIZE[0] // 2, SIZE[1] // 2
    picture[row - 8:row + 8, column - 8:column + 8] = 220
    Image.fromarray(picture).save("square.png")
    np.save("flat.npy", np.full((8, 16), 2.0))
    assert sample("--image", "square.png", "--move", "forward 5", "--depth", "flat.npy") == 0
    areas = (read("out_warp.mp4")[..., 0] > 140).sum((1, 2))
    assert abs(areas[0] - 256) < 40 and abs(areas[-1] - 4 * 256) < 160  # half the way to a plane doubles its size


WEIGHTS = goldens.GEOMETRY / "pi3x_weights.safetensors"
PI3X = ["--set", f"geometry={WEIGHTS}"]


def test_geometry_from_the_picture_alone(place, capsys):
    """Nothing but weights: Pi3X beside the checkpoint is found, later chunks are estimated anew, the check is
    written."""
    weights = place / "weights" / "model"
    shutil.copytree(DISTILLED, weights)
    (place / "weights" / "Pi3X").mkdir()
    shutil.copy(WEIGHTS, place / "weights" / "Pi3X" / "model.safetensors")
    words = ["--image", "image.png", "--move", "forward 1, right 1", "--frames", "40", "--set", "check=true"]
    assert sample(*words, weights=weights) == 0
    out = capsys.readouterr().out
    assert "Pi3X of" in out and "check: color_drift" in out and "frames 10" in out
    error = json.loads((place / "out_check.json").read_text())
    assert error["seam"] > 0 and error["frames"] == 10 and 0 <= error["rotation_degrees"] <= 180 and error["translation"] >= 0
    assert len(read("out.mp4")) == len(read("out_warp.mp4")) == 40


def test_the_check_of_a_short_video_has_no_camera(place):
    """Every fourth frame is looked at, and one alone has no path."""
    words = ["--image", "image.png", *PI3X, "--move", "forward 1", "--frames", "4", "--set", "check=true", "steps=1,1,1"]
    assert sample(*words) == 0
    measured = json.loads((place / "out_check.json").read_text())
    assert measured["sharpness"] > 0 and "rotation_degrees" not in measured


def test_keyframes_are_the_weights_own(place, monkeypatch):
    """8, or what model_index.json says, or what the user says."""
    weights, seen = place / "weights", []
    shutil.copytree(DISTILLED, weights)

    def remember(*arguments, keyframes, **options):
        seen.append(keyframes)
        raise ValueError("enough")

    monkeypatch.setattr("job.Memory", remember)
    words = [*LED, *PI3X]
    assert sample(*words, weights=weights) == 2
    index = weights / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"keyframes": 3}))
    assert sample(*words, weights=weights) == sample(*words, "--set", "keyframes=2", weights=weights) == 2
    assert seen == [8, 3, 2]


@pytest.mark.parametrize("free, kept", [(2**60, True), (0, False)])
def test_pi3x_makes_room_for_the_transformer(place, monkeypatch, free, kept):
    """It is let go before the other networks are loaded and read again for each later chunk, unless all fit at once;
    one chunk needs it once in any case. The video is the same."""
    loaded, alive, made = [], [], []

    def load(*arguments):
        network = load_pi3x(*arguments)
        loaded.append(weakref.ref(network))
        return network

    def noticing(function):
        def wrapped(*arguments):
            gc.collect()
            alive.append(any(network() is not None for network in loaded))
            return function(*arguments)
        return wrapped

    monkeypatch.setattr("geometry.pi3x.free_memory", lambda device: free)
    monkeypatch.setattr("geometry.pi3x.load_pi3x", load)
    monkeypatch.setattr("sample.load_models", noticing(load_models))
    monkeypatch.setattr(Rollout, "finish", noticing(Rollout.finish))
    for count, estimates in (("33", 1), ("99", 1 if kept else 3)):
        loaded.clear()
        words = ["--image", "image.png", "--move", "forward 1, right 1, up 1", "--frames", count]
        assert sample(*words, "--set", "latents=x.safetensors", *PI3X) == 0
        made.append(load_file("x.safetensors")["latents"])
        assert len(loaded) == estimates
    assert alive == [False] * 2 + [kept] * 4
    assert made[0].shape[2] == 10 and torch.equal(made[0], made[1][:, :, :10])


def test_meters_and_resampling(place, capsys):
    data = json.loads((place / "poses.json").read_text())
    (place / "meter.json").write_text(json.dumps(data | {"unit": "meter"}))
    assert sample("--image", "image.png", "--poses", "meter.json", "--depth", "depth.npy", "--frames", "3", "--set", "resample=true") == 0
    out = capsys.readouterr().out
    assert "3 poses, 1 meters travelled" in out and "one unit of it is 1 of" in out and len(read("out.mp4")) == 3


def test_later_warps_are_written_in_step(tmp_path):
    """A warp of 34 frames begins with the frame before the chunk, which the warp video leaves out."""
    levels = torch.arange(34.0).div(33).mul(2).sub(1).view(1, 1, 34, 1, 1).expand(1, 3, 34, 64, 64)
    with Output(tmp_path / "v.mp4", resume=False) as output:
        output.begin({}, frames=33, fps=16, led=True)
        chunk = Chunk(torch.zeros(1, 3, 33, 64, 64), torch.zeros(1), Warp(levels, levels[:, :1] / 2 + 0.5))
        output.add(pictures(chunk), chunk.latents, {})
        output.join("_warp.mp4", tmp_path / "w.mp4")
        output.finish()
    seen = read(tmp_path / "w.mp4").mean((1, 2, 3))
    assert abs(seen[0] - 255 / 33) < 4 and abs(seen[-1] - 255) < 4 and len(seen) == 33
    assert [path.name for path in tmp_path.iterdir()] == ["w.mp4"]


def test_contact_sheet_shows_the_frames(place):
    assert sample("--image", "image.png", "--warp", "warp.npy", "mask.npy", "--frames", "20") == 0
    sheet, warp = np.asarray(Image.open("out_sheet.png")).astype(float), np.load("warp.npy")[:20]
    tile = np.asarray(Image.fromarray(warp[-1]).resize((256, 128), Image.Resampling.LANCZOS))
    assert abs(sheet[18:18 + 128, -260:-4] - tile).mean() < 1.5  # the last of the first row


def test_lora_auto(place, capsys):
    """The file in the weights' folder comes first, then the released one beside it; plain Helios takes none."""
    weights = place / "weights" / "model"
    shutil.copytree(DISTILLED, weights)
    words = ["--image", "image.png", "--warp", "warp.npy", "--frames", "2"]

    def chosen(*words) -> str:
        assert sample(*words, weights=weights) == 0
        return capsys.readouterr().out.split("LoRA ")[1].split(",")[0]

    released = place / "weights" / "warp-as-history" / "visible_lora_state_step1000.safetensors"
    assert chosen(*words) == "none"
    released.parent.mkdir()
    shutil.copy(HELIOS / "lora_prefix.safetensors", released)
    assert chosen(*words) == str(released)
    shutil.copy(HELIOS / "lora_noprefix.safetensors", weights / "lora.safetensors")
    assert chosen(*words) == str(weights / "lora.safetensors")
    assert chosen(*words, "--lora", "off") == "none" and chosen("--frames", "2") == "none"


def stop_in_chunk(monkeypatch, count: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """The chunk of that number (from 1 on) of the next run raises an error."""
    original = Rollout.next

    def next_chunk(self, *control):
        if self.chunk == count - 1:
            monkeypatch.setattr(Rollout, "next", original)
            raise error
        return original(self, *control)

    monkeypatch.setattr(Rollout, "next", next_chunk)


def test_stopping_keeps_what_is_done(place, capsys, monkeypatch):
    """Ctrl-C in the third chunk leaves two whole ones, and says how to go on; in the first, nothing."""
    stop_in_chunk(monkeypatch, 3)
    words = ["--image", "image.png", "--warp", "warp.npy"]
    assert sample(*words) == 0
    assert len(read("out.mp4")) == 66 and len(read("out_warp.mp4")) == 66
    said = capsys.readouterr().out
    assert "66 frames" in said and "--image image.png --warp warp.npy --continue" in said
    refused(capsys, place, words, "out_parts", "--continue")  # it would be lost
    assert sample(*words, "--continue") == 0
    assert len(read("out.mp4")) == 99 and not (place / "out_parts").exists()
    stop_in_chunk(monkeypatch, 1)
    before = sorted(path.name for path in place.iterdir())
    assert sample(*words, "--out", "other.mp4") == 130
    assert sorted(path.name for path in place.iterdir()) == before


WAYS = {
    "Pi3X": ["--image", "image.png", "--move", "forward 1, right 1, up 1", "--frames", "80", "--set", "keyframes=2", *PI3X],
    "depth": ["--image", "image.png", "--poses", "poses.json", "--depth", "depth.npy", "--frames", "80"],
    "warp": ["--image", "image.png", "--warp", "warp.npy", "mask.npy", "--frames", "80"],
    "image": ["--image", "image.png", "--frames", "80"],
    "text": ["--frames", "80"],
    "video": ["--video", "warp.npy", "--frames", "80"],
}


@pytest.mark.parametrize("way", WAYS)
def test_continued_equals_uninterrupted(place, monkeypatch, way):
    """Everything that is left of a run: video, warp, sheet and latents, after a failure in the second and the third chunk."""

    def run(name: str, *more: str) -> int:
        (place / name).mkdir(exist_ok=True)
        return sample(*WAYS[way], "--out", f"{name}/out.mp4", "--set", f"latents={name}/x.safetensors", *more)

    assert run("whole") == 0
    for chunk in (2, 3):
        stop_in_chunk(monkeypatch, chunk, RuntimeError)
        with pytest.raises(RuntimeError):
            run("parts", *(["--continue"] if chunk == 3 else []))
        assert [path.name for path in (place / "parts").iterdir()] == ["out_parts"]
    assert run("parts", "--continue", "--memory", "stream") == 0
    made = {path.name: path.read_bytes() for path in (place / "whole").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (place / "parts").iterdir()}
    assert {"out.mp4", "out_sheet.png", "x.safetensors"} <= made.keys() and len(read("parts/out.mp4")) == 80


def test_a_killed_run_goes_on(place):
    """The system ends a run at once, wherever it is; nothing is lost but the chunk that was being made."""
    words = ["--weights", str(DISTILLED), "--size", SIZED, "--set", "device=cpu", "--image", "image.png", "--warp", "warp.npy"]
    run = subprocess.Popen([sys.executable, Path(files.__file__).parents[1] / "sample.py", *words], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = place / "out_parts" / "state.safetensors"
    while run.poll() is None and not state.exists():
        time.sleep(0.01)
    run.kill()
    run.wait()
    done = json.loads(open_safetensors(state).metadata()["counts"])
    assert 0 < len(done) < 3 and not (place / "out.mp4").exists()
    assert main([*words, "--continue", "--set", "latents=x.safetensors"]) == 0 and not state.parent.exists()
    assert main([*words, "--set", "latents=y.safetensors", "--out", "whole.mp4"]) == 0
    assert torch.equal(load_file("x.safetensors")["latents"], load_file("y.safetensors")["latents"])
    assert np.array_equal(read("out.mp4"), read("whole.mp4"))


def test_another_video_is_not_continued(capsys, place, monkeypatch):
    """What made the first chunks has to be the same, by content; what only says how to compute may change."""
    words = ["--image", "image.png", "--move", "forward 1, up 1", "--depth", "depth.npy"]
    refused(capsys, place, [*words, "--continue"], "out_parts/state.safetensors", "no such file")
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words) == 0
    np.save("depth2.npy", np.load("depth.npy") + 1)
    Image.open("image.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("flipped.png")
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    capsys.readouterr()

    def differs(name: str, *more: str, weights=DISTILLED):
        refused(capsys, place, [*words, *more, "--continue"], "state.safetensors", f": {name} was ", weights=weights)

    differs("seed", "--set", "seed=1")
    differs("prompt", "--prompt", "a car")
    differs("image", "--image", "flipped.png")
    differs("depth", "--depth", "depth2.npy")
    differs("move", "--move", "forward 2, up 1")
    differs("frames", "--frames", "60")
    differs("size", "--size", "64x64")
    differs("fp8", "--memory", "fp8")
    differs("lora", "--lora", str(HELIOS / "lora_prefix.safetensors"))
    edited = load_file(weights / "vae" / "diffusion_pytorch_model.safetensors")
    edited["decoder.conv_out.bias"] += 0.1
    save_file(edited, weights / "vae" / "diffusion_pytorch_model.safetensors")
    differs("weights", weights=weights)
    state = place / "out_parts" / "state.safetensors"
    whole = state.read_bytes()
    save_file({"x": torch.zeros(1)}, state)
    refused(capsys, place, [*words, "--continue"], "not a state")
    state.write_bytes(whole[:-9])
    refused(capsys, place, [*words, "--continue"], "not a complete")
    state.write_bytes(whole)
    shutil.move("image.png", "moved.png")
    assert sample(*words, "--image", "moved.png", "--continue", "--set", "latents=x.safetensors") == 0


def test_settings_beside_a_lora_are_part_of_it(capsys, place, monkeypatch):
    """PEFT's adapter_config.json scales the LoRA: a run that it changed under is not continued."""
    shutil.copyfile(HELIOS / "lora_noprefix.safetensors", "adapter_model.safetensors")
    with open("adapter_config.json", "w") as file:
        json.dump({"r": 4, "lora_alpha": 4}, file)
    words = ["--image", "image.png", "--move", "forward 1, up 1", "--depth", "depth.npy", "--lora", "adapter_model.safetensors"]
    stop_in_chunk(monkeypatch, 2)
    assert sample(*words) == 0
    with open("adapter_config.json", "w") as file:
        json.dump({"r": 4, "lora_alpha": 8}, file)
    capsys.readouterr()
    refused(capsys, place, [*words, "--continue"], "state.safetensors", ": lora was ")


def test_joining_alone_needs_no_networks(place, monkeypatch):
    """A run that died after its last chunk is finished without loading any."""
    words = ["--image", "image.png", "--move", "forward 1", "--depth", "depth.npy"]
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(Output, "join", lambda *arguments: [][0])
        sample(*words, "--set", "latents=x.safetensors")
    with monkeypatch.context() as patch:
        for name in ("load_models", "encode_each"):
            patch.setattr(f"sample.{name}", lambda *arguments: pytest.fail("loaded"))
        assert sample(*words, "--set", "latents=x.safetensors", "--continue") == 0
    assert sample(*words, "--set", "latents=y.safetensors", "--out", "whole.mp4") == 0
    assert np.array_equal(read("out.mp4"), read("whole.mp4"))
    assert torch.equal(load_file("x.safetensors")["latents"], load_file("y.safetensors")["latents"])


def test_a_folder_of_that_name_is_left_alone(place, capsys):
    (place / "out_parts").mkdir()
    (place / "out_parts" / "0000_video.mp4").write_text("mine")
    refused(capsys, place, ["--frames", "2"], "out_parts", "did not make")


@pytest.mark.parametrize("mode", ["fp8", "stream"])
def test_memory_modes(place, mode):
    """Streamed weights give the same latents, quantized ones nearly so."""
    words = ["--image", "image.png", "--move", "up 1", "--lora", str(HELIOS / "lora_noprefix.safetensors")]
    assert sample(*words, "--set", "latents=full.safetensors") == 0
    assert sample(*words, "--set", "latents=other.safetensors", "--memory", mode) == 0
    full, other = (load_file(f"{name}.safetensors")["latents"] for name in ("full", "other"))
    if mode == "stream":
        assert torch.equal(full, other)
    else:
        check("fp8, latents, relative rms", (other - full).norm() / full.norm(), torch.tensor(0.0), 0.1)
        assert not torch.equal(full, other)


def test_a_prompt_for_each_chunk(place):
    """Up to the switch the video is that of the first prompt alone; a slow switch comes a chunk later."""
    made = {}
    for name, words in {"one": ["--prompt", "a street"], "two": ["--prompt", "a street | a street at night"],
                        "slow": ["--prompt", "a street|a street at night", "--set", "prompt_blend=3"]}.items():
        assert sample("--frames", "99", "--set", "steps=1,1,1", f"latents={name}.safetensors", *words) == 0
        made[name] = load_file(f"{name}.safetensors")["latents"].split(9, dim=2)
    one, two, slow = made.values()
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
    assert torch.equal(one[1], slow[1]) and not torch.equal(one[2], slow[2])


def test_same_seed_same_video(place):
    words = ["--image", "image.png", "--move", "up 1", "--set", "latents=x.safetensors"]
    made = []
    for seed in ("1", "1", "2"):
        assert sample(*words, f"seed={seed}") == 0
        made.append(load_file("x.safetensors")["latents"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_pictures_of_other_kinds(place, mode):
    picture = Image.open("image.png")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    picture.save("other.png")
    assert sample("--image", "other.png", "--frames", "2") == 0


# ---------------------------------------------------------------------------------------------------------- bad input


def everything(place) -> dict:
    """All files and what is in them, and all folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def refused(capsys, place, words: list[str], *parts: str, weights=DISTILLED) -> None:
    """Exit status 2, one line on stderr that says `parts`, and no file made or changed."""
    before = everything(place)
    assert sample(*words, weights=weights) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: error: ") and all(part in error for part in parts), error
    assert everything(place) == before


def poses_with(change) -> None:
    c2w = np.tile(np.eye(4), (33, 1, 1))
    change(c2w)
    with open("bad.json", "w") as file:
        json.dump({"c2w": c2w.tolist()}, file)


LORA = HELIOS / "lora_prefix.safetensors"
LED = ["--image", "image.png", "--move", "forward 1"]


@pytest.mark.parametrize("words, parts", [
    (["--image", "none.png"], ["none.png"]),
    (["--image", "poses.json", "--move", "hold"], ["poses.json"]),
    (["--move", "hold"], ["--image"]),
    (LED + ["--size", "64x100"], ["64x100", "64"]),
    (LED + ["--size", "64"], ["--size"]),
    (LED + ["--frames", "0"], ["--frames"]),
    (LED + ["--set", "nosuch=1"], ["nosuch", "threshold"]),
    (LED + ["--lora", "none.safetensors"], ["none.safetensors"]),
    (LED + ["--depth", "none.npy"], ["none.npy"]),
    (LED + ["--set", "keyframes=2", "--depth", "depth.npy"], ["keyframes", "Pi3X"]),
    (["--image", "image.png", "--depth", "depth.npy"], ["--depth"]),
    (["--image", "image.png", "--lora", str(HELIOS / "lora_prefix.safetensors")], ["--lora"]),
    (["--image", "image.png", "--move", "fly 3"], ["fly"]),
    (["--image", "image.png", "--poses", "none.json"], ["none.json"]),
    (["--image", "image.png", "--warp", "warp.npy", "--frames", str(LONG + 1)], ["warp.npy", str(LONG), str(LONG + 1)]),
    (["--image", "image.png", "--warp", "mask.npy"], ["mask.npy"]),
    (LED + ["--out", "no/such/folder/out.mp4"], ["no/such/folder"]),
    (LED + ["--out", "out.txt"], ["out.txt", ".mp4"]),
    (LED + ["--set", "latents=no/folder/x.safetensors"], ["no/folder"]),
    (LED + ["--set", "latents=out.mp4"], ["out.mp4", ".safetensors"]),
    (["--image", "image.png", "--warp", "warp.npy", "out.mp4", "--out", "out.mp4"], ["out.mp4"]),
    (["--image", "image.png", "--move", ""], ["verb"]),
    (LED + ["--set", "fov=0"], ["--set", "fov is 0.0"]),
    (["--image", "image.png", "--set", "fov=50"], ["fov"]),
    (LED + ["--set", "seed=-1"], ["seed"]),
    (LED + ["--set", "fps=0"], ["fps"]),
    (LED + ["--set", "device=abacus"], ["abacus"]),
    (LED + ["--set", "geometry=none.safetensors"], ["none.safetensors"]),
    (LED + ["--set", f"geometry={LORA}"], ["lora_prefix", "missing"]),
    (LED + PI3X + ["--set", "keyframes=0"], ["keyframes"]),
    (["--image", "image.png", "--poses", "mask.npy"], ["mask.npy", "expected [T,4,4]"]),
    (LED + ["--set", "device=cuda:77"], ["cuda:77"]),
])
def test_bad_words(capsys, place, words, parts):
    refused(capsys, place, words, *parts)


PATH_ALONE = {"geometry": WEIGHTS, "keyframes": 2, "fov": 50, "resample": "true", "samples": 2, "geometry_pixels": 2000}
LED_ALONE = {"align": "false", "drop": "false", "threshold": 0.5, "warp_noise": "false", "warp_sigma": "0.1,0.2",
             "warp_band": "mid", "warp_fill": "smooth", "previous": "0,0,0", "mask_lag": "false"}


@pytest.mark.parametrize("name, value", [*PATH_ALONE.items(), *LED_ALONE.items()])
def test_settings_that_would_do_nothing_are_refused(capsys, place, name, value):
    """Without a camera; and those of a path beside a finished warp."""
    words = ["--set", f"{name}={value}"]
    refused(capsys, place, ["--image", "image.png", *words], f"--set {name}: needs a camera")
    if name in PATH_ALONE:
        refused(capsys, place, ["--image", "image.png", "--warp", "warp.npy", *words], f"--set {name}: needs a camera path")


def test_bad_poses(capsys, place):
    words = ["--image", "image.png", "--poses", "bad.json"]
    poses_with(lambda c2w: c2w[7].__setitem__((0, 3), np.nan))
    refused(capsys, place, words, "bad.json", "7")
    poses_with(lambda c2w: c2w[3].__setitem__((0, 0), -1))
    refused(capsys, place, words, "bad.json", "3")
    poses_with(lambda c2w: c2w[5].__imul__(2))
    refused(capsys, place, words, "bad.json", "5")


def test_bad_masks(capsys, place):
    np.save("short.npy", INPUTS["mask"][:-1])
    words = ["--image", "image.png", "--warp", "warp.npy"]
    refused(capsys, place, words + ["short.npy"], str(LONG - 1), str(LONG))
    shutil.copy("warp.npy", "out_warp.mp4")
    refused(capsys, place, ["--image", "image.png", "--warp", "out_warp.mp4"], "out_warp.mp4")
    refused(capsys, place, words + ["warp.npy"], "warp.npy")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_bad_checkpoints(capsys, place, part):
    """A truncated file, a missing one, and one of the wrong shapes."""
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    file = sorted((weights / part).glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(capsys, place, LED, file.name, weights=weights)
    file.unlink()
    refused(capsys, place, LED, part, weights=weights)
    file.write_bytes(whole)
    config = json.loads((weights / part / "config.json").read_text())
    key = {"transformer": "ffn_dim", "vae": "base_dim", "text_encoder": "d_ff"}[part]
    (weights / part / "config.json").write_text(json.dumps(config | {key: config[key] * 2}))
    refused(capsys, place, LED, "shape", weights=weights)


def test_missing_checkpoint(capsys, place):
    refused(capsys, place, LED, "nowhere", "weights/README.md", weights="nowhere")
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    (weights / "tokenizer" / "spiece.model").unlink()
    refused(capsys, place, LED, "spiece.model", weights=weights)


def test_without_any_argument_it_is_the_demo():
    """Shipped files, and the words of the scene that they show; with any argument nothing is made up."""
    args = parse([])
    assert args.image.is_file() and args.depth.is_file() and args.poses.is_file()
    assert args.prompt == caption(make_scene(Random(STILLS[args.image.stem][0])))
    for words in (["--image", "x.png"], ["--prompt", "a car"], ["--move", "pan 5"], ["--frames", "2"]):
        args = parse(words)
        assert args.depth is None and args.poses is None and args.prompt in ("", "a car")
