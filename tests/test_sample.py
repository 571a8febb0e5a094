"""sample.py as a user runs it: every way in, lengths, what is left behind."""

import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from random import Random

import goldens
import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS, SIZE, check
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling import LED, PI3X, WEIGHTS, read, sample
from told import small_pi3x

import job
from files.checkpoint import count_numbers, weight_files
from files.cli import note
from files.media import read_rate
from files.output import Output
from files.video import write_video
from geometry import scene
from geometry.pi3x import load_pi3x
from helios.load import load_models
from mini.world import STILLS, caption, make_scene
from render import Warp
from sample import DEMO, parse, pictures
from wah import Chunk, Rollout

RUNS = goldens.tensors(HELIOS / "pipeline_runs.safetensors")
CASES = goldens.cases(HELIOS / "pipeline_cases.json")


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
    video = job.start_video(Path("v.mp4"), SIZE).video
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


def test_the_check_is_as_small_as_the_run(place, monkeypatch):
    limits = []
    monkeypatch.setattr(scene, "estimate", lambda network, images, limit: limits.append(limit) or 1 / 0)
    words = ["--image", "image.png", *PI3X, "--move", "forward 1", "--frames", "5", "--set", "check=true", "steps=1,1,1"]
    with pytest.raises(ZeroDivisionError):
        sample(*words, "geometry_pixels=2000")
    assert limits == [2000]


def test_a_network_that_cannot_compare_frames_checks_no_camera(place):
    words = ["--image", "image.png", *PI3X, "--move", "forward 1", "--frames", "5", "--set", "check=true", "steps=1,1,1"]
    assert sample(*words, "keyframes=1") == 0
    assert "rotation_degrees" not in json.loads((place / "out_check.json").read_text())


def test_the_demo_goes_on_by_the_words_that_it_prints():
    assert parse(["--continue"]).image == parse([]).image == DEMO["image"]


def test_keyframes_are_the_weights_own(place, monkeypatch):
    """8, or what model_index.json says, or what the user says; told where they stand, and chosen, as the user says."""
    weights, seen = place / "weights", []
    shutil.copytree(DISTILLED, weights)

    def remember(load, *arguments, keyframes, known_poses, choice, **options):
        seen.append((keyframes, load().config.given, known_poses, choice))
        raise ValueError("enough")

    monkeypatch.setattr("job.Memory", remember)
    words = [*LED, *PI3X]
    assert sample(*words, weights=weights) == 2
    index = weights / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"keyframes": 3}))
    assert sample(*words, weights=weights) == sample(*words, "--set", "keyframes=2", weights=weights) == 2
    assert seen == [(count, (), False, "covering") for count in (8, 3, 2)]
    save_file(small_pi3x().state_dict(), "told.safetensors")
    told = ["geometry=told.safetensors", "known_poses=true", "keyframe_choice=latest"]
    assert sample(*LED, "--set", *told, weights=weights) == 2 and seen[-1] == (3, ("poses",), True, "latest")


def test_pi3x_is_told_the_lens(place, monkeypatch):
    lenses = []
    monkeypatch.setattr("job.Memory", lambda *_, K, **options: lenses.append(K) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(*LED, *PI3X, "fov=40")
    height, width = SIZE
    focal = width / 2 / math.tan(math.radians(20))
    expected = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    assert torch.allclose(lenses[0], expected)


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


@pytest.mark.parametrize("memory, width, kept", [("full", 4, True), ("fp8", 1, True), ("stream", 4, False)])
def test_pi3x_knows_how_the_transformer_is_held(place, monkeypatch, memory, width, kept):
    """In bytes a number; streamed weights are read in every call anyway, and leave no room to count on."""
    found = []
    monkeypatch.setattr(job, "pi3x_source", lambda file, device, beside, often, given: found.append((beside, often)))
    words = ["--weights", str(DISTILLED), "--image", "image.png", "--move", "hold", "--memory", memory, *PI3X, "device=cpu"]
    args = parse(words)
    job.open_pi3x(args, job.load_settings(args), 34)
    assert found == [(width * count_numbers(weight_files(DISTILLED / "transformer")), kept)]


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


def test_the_rate_of_a_warp(place):
    """A warp that is a film has a rate; the video keeps it, unless another one is asked for."""
    write_video(place / "warp.mp4", np.load("warp.npy")[:8], 12)
    for words, fps in (([], 12), (["--set", "fps=20"], 20)):
        assert sample("--image", "image.png", "--warp", "warp.mp4", "--frames", "2", *words) == 0
        assert read_rate(Path("out.mp4")) == fps


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


@pytest.mark.parametrize("words, said", [
    (["--move", "hold"], "cut off"), ([], "stretched to 3 times"), (["--warp", "warp.npy"], "stretched to 3 times"),
])  # fmt: skip
def test_another_shape_is_told(place, capsys, monkeypatch, words, said):
    """Before anything is made of it."""
    note.cache_clear()
    Image.new("RGB", (40, 60)).save("tall.png")
    monkeypatch.setattr("sample.generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample("--image", "tall.png", *words, "--frames", "2")
    assert f"tall.png: 40 wide and 60 high; for --size {SIZE[0]}x{SIZE[1]}" in (told := capsys.readouterr()).err
    assert said in told.err and f"--size {SIZE[0]}x{SIZE[1]}: the model was made for 384x640" in told.out


@pytest.mark.parametrize("words", [["--video", "tall.npy"], ["--image", "image.png", "--warp", "tall.npy"]])
def test_another_shape_of_a_clip_is_told(place, capsys, monkeypatch, words):
    note.cache_clear()
    np.save("tall.npy", np.zeros((33, 60, 40, 3), np.uint8))
    monkeypatch.setattr("sample.generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(*words)
    assert capsys.readouterr().err.count("tall.npy: 40 wide and 60 high") == 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "I;16"])
def test_pictures_of_other_kinds(place, mode):
    picture = Image.open("image.png")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    picture.save("other.png")
    assert sample("--image", "other.png", "--frames", "2") == 0


def test_without_any_argument_it_is_the_demo():
    """Shipped files, and the words of the scene that they show; with any argument nothing is made up."""
    args = parse([])
    assert args.image.is_file() and args.depth.is_file() and args.poses.is_file()
    assert args.prompt == caption(make_scene(Random(STILLS[args.image.stem][0])))
    for words in (["--image", "x.png"], ["--prompt", "a car"], ["--move", "pan 5"], ["--frames", "2"]):
        args = parse(words)
        assert args.depth is None and args.poses is None and args.prompt in ("", "a car")
