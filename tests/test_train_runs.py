"""train.py as a user runs it: files, resuming, stopping, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import goldens
import numpy as np
import peers
import pytest
import torch
from goldens import DISTILLED, GEOMETRY, HELIOS, INPUTS, check, tensors
from PIL import Image
from safetensors.torch import save_file
from training import metrics, read, refused, train_on

import clips
import train
from clips import Choices, draw_case, find_video, item_order
from files.checkpoint import load
from files.draw import draw_curve, save_png
from geometry.pi3x import load_pi3x
from helios.load import add_trigger, embed_prompts
from helios.lora import load_lora
from helios.vae import VAE
from model import Helios
from sample import main as sample_main
from train import Recipe, Trainer, main


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """A run folder with the Pi3X geometry of the video in `place`, so that only one test waits for it."""
    folder = tmp_path_factory.mktemp("geometry")
    np.save(folder / "clip.npy", INPUTS["warp"][:36])
    assert train_on(folder / "clip.npy", "--out", folder / "run", "--set", "steps=1") == 0
    for name in ("state.safetensors", "lora.safetensors", "metrics.jsonl", "loss.png"):
        (folder / "run" / name).unlink()
    return folder / "run"


@pytest.fixture
def place(tmp_path, monkeypatch, estimated):
    """An empty folder with a short video, and a run folder with its geometry."""
    monkeypatch.chdir(tmp_path)
    np.save("clip.npy", INPUTS["warp"][:36])
    shutil.copytree(estimated, "run")
    return tmp_path


def test_what_a_run_leaves(place, capsys):
    assert train_on("clip.npy", "--out", "run", "--prompt", " a car ", "--set", "steps=3", "save_every=2", "lr=0.01",
                    "scale=0.5", "sample_every=2") == 0
    names = {path.name for path in Path("run").iterdir() if not path.name.startswith("geometry")}
    assert names == {"state.safetensors", "lora.safetensors", "metrics.jsonl", "loss.png", "sample_000002.png", "manifest.txt"}
    lines = metrics("run")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(math.isfinite(line["loss"]) for line in lines)
    assert Image.open("run/loss.png").size == (640, 360) and Image.open("run/sample_000002.png").height > 2 * 256
    tensors, header = read("run/lora.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in goldens.tensors(HELIOS / "lora_noprefix.safetensors").items()}
    about = json.loads(header["run"])
    assert header["step"] == "3" and about["base"] == "distilled" and about["recipe"]["lr"] == 0.01
    assert about["clips"][0]["video"] == "clip.npy" and about["clips"][0]["prompt"] == " a car "
    out = capsys.readouterr().out
    for part in ("s/step", "data", "forward", "backward", "optimiser", "tokens/step", "TFLOP/s", "peak"):
        assert part in out
    Image.fromarray(INPUTS["image"]).save("image.png")
    words = ["--image", "image.png", "--move", "forward 1", "--size", "64x64", "--frames", "2", "--set", "device=cpu"]
    assert sample_main([*words, "--weights", str(DISTILLED), "--lora", "run/lora.safetensors"]) == 0
    assert {scale for _, _, scale in load_lora("run/lora.safetensors").adapters.values()} == {0.5}


def test_sheets_have_the_warp_in_the_lora_band(place, monkeypatch):
    bands = []
    monkeypatch.setattr("train.Rollout", lambda *_, options, **__: bands.append(options.warp_band) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_on("clip.npy", "--out", "run", "--set", "steps=1", "sample_every=1", "warp_band=mid")
    assert bands == ["mid"]


def test_diffusers_and_peft_load_it(place):
    """The file in diffusers' LoRA loader, after the official pipeline's prefix, and in PEFT: the same forward."""
    from diffusers.loaders.lora_pipeline import HeliosLoraLoaderMixin
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from test_model import CASES as DIT
    from test_model import INPUTS as GIVEN
    from test_model import run

    transformer = load(Helios, DISTILLED / "transformer")
    assert train_on("clip.npy", "--out", "run", "--set", "steps=3", "lr=0.1", "scale=0.5") == 0
    plain = run(transformer, "all_bands")
    transformer.set_lora(load_lora("run/lora.safetensors"))
    ours = run(transformer, "all_bands")
    transformer.set_lora(None)
    assert (ours - plain).abs().max() > 1e-2
    state, metadata = HeliosLoraLoaderMixin.lora_state_dict("run/lora.safetensors", return_lora_metadata=True)
    given = {name: GIVEN[key] for name, key in DIT["all_bands"]["inputs"].items()}
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in metadata.items()})
    for loader in ("diffusers", "peft"):
        peer = peers.twin(transformer)
        if loader == "diffusers":
            prefixed = {f"transformer.{key}": value for key, value in state.items()}
            HeliosLoraLoaderMixin.load_lora_into_transformer(prefixed, peer, metadata=metadata)
        else:
            inject_adapter_in_model(config, peer)
            assert not set_peft_model_state_dict(peer, state).unexpected_keys
        with torch.no_grad():
            theirs = peer(**given, return_dict=False)[0]
        check("trained LoRA in diffusers and PEFT", ours, theirs, 5e-5)


def test_resume_is_exact(place, capsys):
    """Six steps, and three with three more: the same lines, state and LoRA, bit by bit."""
    shutil.copytree("run", "parts")
    assert train_on("clip.npy", "--out", "run", "--set", "steps=6", "save_every=4") == 0
    assert train_on("clip.npy", "--out", "parts", "--set", "steps=3") == 0
    with open("parts/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 9')  # the program died while step 4 was on its way
    assert train_on("clip.npy", "--out", "parts", "--resume", "--set", "steps=6") == 0
    for name in ("metrics.jsonl", "loss.png"):
        assert Path("run", name).read_bytes() == Path("parts", name).read_bytes()
    for name in ("state.safetensors", "lora.safetensors"):
        (one, header), (other, again) = read(f"run/{name}"), read(f"parts/{name}")
        assert header["step"] == again["step"] == "6" and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({line["loss"] for line in metrics("run")}) == 6


def interrupt_at(monkeypatch, count: int, act) -> None:
    """Do `act(trainer)` when `count` steps are done and the next begins."""
    original = Trainer.step

    def step(self, *arguments):
        if self.steps == count:
            act(self)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "step", step)


def test_ctrl_c_saves(place, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 1, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    assert train_on("clip.npy", "--out", "run", "--set", "steps=4") == 130
    said = capsys.readouterr()
    assert "to go on: python train.py --video clip.npy" in said.out and "stopped, run: step 2 is safe" in said.err
    assert len(metrics("run")) == 2 and read("run/state.safetensors")[1]["step"] == "2"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume", "--set", "steps=4") == 0
    assert [line["step"] for line in metrics("run")] == [1, 2, 3, 4]


def test_nan_stops(place, capsys, monkeypatch):
    interrupt_at(monkeypatch, 1, lambda trainer: next(iter(trainer.tensors.values())).data.fill_(math.nan))
    refused(capsys, "clip.npy", ["--set", "save_every=1"], "step 2", "nan", "step 1 is safe")
    tensors, header = read("run/state.safetensors")
    assert header["step"] == "1" and all(value.isfinite().all() for value in tensors.values())
    assert read("run/lora.safetensors")[1]["step"] == "1"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume") == 0


@pytest.mark.parametrize("name", ["state", "lora", "loss"])
def test_disk_full(place, capsys, monkeypatch, name):
    """Whichever file has no room, those of the save before stay, and nothing half-written."""
    calls, write, draw = [], Path.write_bytes, save_png

    def full(path, write, content):
        calls.append(path.name)
        if name in path.name and sum(name in call for call in calls) == 2:
            write(path, content[:len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", lambda path, content: full(path, write, content))
    monkeypatch.setattr("files.run.save_png", lambda path, image: full(path, draw, image))
    refused(capsys, "clip.npy", ["--set", "save_every=1"], "run", "step 2", "no room is left", "step 1 is safe")
    assert {read(f"run/{each}.safetensors")[1]["step"] for each in ("state", "lora")} == {"1"}
    assert not [path for path in Path("run").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert train_on("clip.npy", "--out", "run", "--resume") == 0


def test_geometry_and_latents_are_made_once(place, monkeypatch):
    """The run folder's geometry serves again, without Pi3X; a window is encoded once however often it is drawn."""
    def never(*arguments):
        raise AssertionError("Pi3X is not needed")

    encoded, encode = [], VAE.encode

    def count(self, video):
        encoded.append(video.shape[2])
        return encode(self, video)

    monkeypatch.setattr(clips, "load_pi3x", never)
    monkeypatch.setattr(VAE, "encode", count)
    np.save("short.npy", INPUTS["warp"][:33])  # two cases alone: forward and reversed
    assert train_on("clip.npy", "--out", "run", "--set", "steps=1") == 0
    encoded.clear()
    monkeypatch.setattr(clips, "load_pi3x", load_pi3x)
    assert train_on("short.npy", "--out", "other", "--set", "steps=8") == 0
    assert sorted(encoded) == [1, 1] + [33] * 6  # image, fake, warp, target for each


def test_one_stage(place):
    """A model without a pyramid is trained on the full grid; --size is by default the model's own."""
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    own = {"height": 64, "width": 64, "max_sequence_length": 16, "train": ["rank=3", "steps=7"]}
    for file, entries in (("model_index.json", own),
                          ("scheduler/scheduler_config.json", {"stages": 1, "stage_range": [0, 1]})):
        (weights / file).write_text(json.dumps(json.loads((weights / file).read_text()) | entries))
    files = ["--geometry", GEOMETRY / "pi3x_weights.safetensors", "--weights", weights, "--out", "run"]
    words = ["--video", "clip.npy", "--device", "cpu", "--set", "steps=1", "geometry_pixels=2000", "sample_every=1"]
    assert main([str(word) for word in files + words]) == 0
    assert Path("run/sample_000001.png").is_file()
    assert len(metrics("run")) == 1  # --set comes after the model's own recipe
    assert {min(tensor.shape) for tensor in read("run/lora.safetensors")[0].values()} == {3}


def test_several_videos(place, capsys):
    """Repeated --video and a csv give the same run; every video has its turn."""
    np.save("other.npy", INPUTS["warp"][40:75])
    words = ["--video", "other.npy", "--prompt", "a car", "--prompt", "a wall"]
    assert train_on("clip.npy", "--out", "run", *words) == 0
    Path("list.csv").write_text("prompt,video,more\na car,clip.npy,1\na wall,other.npy,2\n")
    shutil.copytree("run", "listed", ignore=shutil.ignore_patterns("[!gm]*", "metrics*"))
    assert train_on("list.csv", "--out", "listed") == 0
    assert Path("run/metrics.jsonl").read_bytes() == Path("listed/metrics.jsonl").read_bytes()
    order = item_order(2, Recipe().seed)
    assert [line["video"] for line in metrics("run")] == [next(order) for _ in range(2)]
    for text, parts in (("video,words\nclip.npy,a\n", ("prompt", "words")), ("video,prompt\n", ("at least one row",)),
                        ("video,prompt\nclip.npy\n", ("row 1",)), ("video,prompt\nno.npy,a\n", ("row 1", "no.npy")),
                        ("video,prompt\nclip.npy,a\nclip.npy,a car, fast\n", ("row 2", "3 fields", "quotes")),
                        ('video,prompt\nclip.npy,a\nclip.npy,"a 5" screen, red"\n', ("row 2", "expected after"))):
        Path("list.csv").write_text(text)
        refused(capsys, "list.csv", [], "list.csv", *parts)
    Path("list.csv").write_bytes(b"\xff\x00\xfe")
    refused(capsys, "list.csv", [], "list.csv", "not a readable csv")


def test_curve():
    """Every point is drawn: the line falls from the upper left to the lower right; one step is enough."""
    picture = draw_curve(np.linspace(2, 0.1, 200).tolist())
    dark = (picture[..., 2] > 100) & (picture[..., 0] < 60)
    rows = [np.nonzero(dark[40:320, x])[0].mean() for x in (150, 350, 550)]
    assert rows == sorted(rows) and rows[-1] - rows[0] > 100
    assert draw_curve([1.0]).shape == picture.shape == (360, 640, 3)


@pytest.mark.parametrize("words, parts", [
    (["--set", "rank=0"], ["rank is 0", "at least 1"]),
    (["--set", "rank=big"], ["rank=big", "32", "int"]),
    (["--set", "future_count=2"], ["future_count=2", "1,2"]),
    (["--set", "stages=3"], ["stages", "0 to 2"]),
    (["--size", "64x32"], ["64x32", "64"]),
    (["--prompt", "a", "--prompt", "b"], ["--prompt", "2 times"]),
])
def test_bad_words(capsys, place, words, parts):
    """What the line says beyond the name; all else that is bad is in faults/test_bad_words.py."""
    refused(capsys, "clip.npy", words, *parts)


def test_bad_videos(capsys, place):
    np.save("short.npy", INPUTS["warp"][:32])
    refused(capsys, "short.npy", [], "short.npy", "32 frames", "33")
    Path("broken.mp4").write_bytes(b"no video")
    refused(capsys, "broken.mp4", [], "broken.mp4", "not a readable video")
    refused(capsys, "no-such-clip", [], "no-such-clip", "DAVIS")
    assert find_video("car-roundabout").is_file()  # one is in data/
    Path("empty").mkdir()
    refused(capsys, "empty", [], "empty", "no frames")


def test_an_existing_run_is_kept(capsys, place):
    assert train_on("clip.npy", "--out", "run") == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    refused(capsys, "clip.npy", [], "run", "--resume", "--overwrite")
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    assert train_on("clip.npy", "--out", "run", "--overwrite", "--set", "steps=1") == 0
    assert len(metrics("run")) == 1


def test_resume_of_another_run(capsys, place, monkeypatch):
    """Another recipe, prompt, video or base is refused by name before networks are read; so is a broken state."""
    assert train_on("clip.npy", "--out", "run", "--set", "steps=1") == 0
    shutil.copytree(DISTILLED, "renamed")
    assert train_on("clip.npy", "--out", "run", "--resume", weights="renamed") == 0  # the same content
    for name in ("embed_prompts", "load_models"):
        monkeypatch.setattr(train, name, None)
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3", "lr=0.5"], "lr was 0.0001, now it is 0.5")
    refused(capsys, "clip.npy", ["--resume", "--prompt", "a tree"], "clips", "a tree")
    np.save("clip.npy", INPUTS["warp"][1:37])
    refused(capsys, "clip.npy", ["--resume"], "clips")
    np.save("clip.npy", INPUTS["warp"][:36])
    whole = Path("run/state.safetensors").read_bytes()
    state, header = read("run/state.safetensors")
    save_file(state, "run/state.safetensors")
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "not a state")
    save_file({**state, "rng": torch.zeros(3)}, "run/state.safetensors", header)
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "changed since it was written")
    Path("run/state.safetensors").write_bytes(whole[:-50])
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "state.safetensors", "not a complete")


def test_resume_needs_the_same_weights(capsys, place):
    """Their folder's name is not enough; what is not read may change."""
    weights = place / "weights"
    shutil.copytree(DISTILLED, weights)
    assert train_on("clip.npy", "--out", "run", weights=weights) == 0
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    whole, edited = file.read_bytes(), tensors(file)
    edited["decoder.conv_out.bias"] += 0.1
    save_file(edited, file)
    refused(capsys, "clip.npy", ["--resume", "--set", "steps=3"], "weights was", "now it is", weights=weights)
    file.write_bytes(whole)
    (weights / "notes.txt").write_text("mine")
    assert train_on("clip.npy", "--out", "run", "--resume", "--set", "steps=3", weights=weights) == 0


def test_recoloured_forms_have_the_bare_trigger(place, monkeypatch):
    """In other colours the clip's own words would be wrong: every step is told what its form allows."""
    told, step = [], Trainer.step

    def watch(self, history, clean, text):
        told.append(text[0][0])
        return step(self, history, clean, text)

    monkeypatch.setattr(Trainer, "step", watch)
    words = ["--prompt", "a red car", "--set", "steps=12", "forms=12", "rank=1", "checkpointing=false"]
    assert train_on("clip.npy", "--out", "run", *words) == 0
    own, bare = add_trigger("a red car"), add_trigger("")
    embeddings, network = embed_prompts(DISTILLED, {own, bare}, "cpu"), load(Helios, DISTILLED / "transformer")
    keys = {prompt: network.text(embeddings[prompt])[0][0] for prompt in (own, bare)}
    cases = [draw_case(Choices(forms=12), 36, "online_000000", index) for index in range(1, 13)]
    expected = [bare if case.form > 1 else own for case in cases]  # 0 is the clip itself, 1 its mirror image
    assert set(expected) == {own, bare}
    for actual, prompt in zip(told, expected, strict=True):
        assert torch.equal(actual, keys[prompt])


def test_as_a_program(place):
    """The real command line, without any geometry: one line that says where it could come from, and no folder."""
    program = [sys.executable, train.__file__, "--weights", str(DISTILLED), "--device", "cpu", "--size", "64x64"]
    bad = subprocess.run([*program, "--video", "clip.npy", "--out", "new"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and not Path("new").exists()
    assert all(option in bad.stderr for option in ("--geometry", "--poses", "--depth"))


def test_memory_modes(place, capsys):
    """Streamed weights give the same losses, quantized ones nearly so; a run goes on with the kind that it began with."""
    losses = {}
    for mode in ("full", "stream", "fp8"):
        words = ["--out", "run", "--prompt", "a car", "--memory", mode, "--overwrite", "--set", "lr=0.01"]
        assert train_on("clip.npy", *words) == 0
        losses[mode] = [(each["loss"], each["grad_norm"]) for each in metrics("run")]
    assert losses["stream"] == losses["full"] != losses["fp8"]
    np.testing.assert_allclose(losses["fp8"], losses["full"], rtol=0.1)
    capsys.readouterr()
    for words, message in ((["--resume", "--set", "steps=3"], "fp8 was True, now it is False"),
                           (["--overwrite", "--memory", "stream", "--set", "checkpointing=false"], "checkpointing=true")):
        assert train_on("clip.npy", "--out", "run", "--prompt", "a car", *words) == 2
        assert message in capsys.readouterr().err
