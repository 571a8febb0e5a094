"""Small folders of ours in the layouts of DAVIS, RealEstate10K and WBench, with the tiny checkpoint."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import DISTILLED, HELIOS
from known import load_video
from PIL import Image

import evaluate
from evaluation import compare, make, protocols
from evaluation.protocols import find_path, known_unit, read_cases
from files.cli import note
from files.video import write_video
from geometry import scene
from geometry.camera import DEPTH, WINDOW, inverse, move_path, normalize
from geometry.paths import load_path
from geometry.scene import Seen
from geometry.surface import place
from reshoot import filmed_path

PATH = move_path("forward 1 + yaw 4")


def pictures(seed: int, count: int = 34) -> np.ndarray:
    y, x = np.mgrid[:72, :128] / 11
    time = np.arange(count)[:, None, None, None] / 20
    return (127 + 100 * np.sin(x[..., None] + y[..., None] * [1, 0.6, 0.3] + time + seed)).astype(np.uint8)


@pytest.fixture
def davis(tmp_path):
    """Two videos and one that is too short; known paths."""
    for seed, (name, count) in enumerate((("red-car", 34), ("cat", 33), ("short", 5))):
        folder = tmp_path / "DAVIS" / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for index, frame in enumerate(pictures(seed, count)):
            Image.fromarray(frame).save(folder / f"{index:05d}.jpg", quality=95)
        (tmp_path / "paths").mkdir(exist_ok=True)
        np.save(tmp_path / "paths" / f"{name}.npy", PATH.numpy())
    return tmp_path


def words(folder, protocol, data, *more):
    return ["--protocol", protocol, "--data", str(folder / data), "--weights", str(DISTILLED), "--size", "64x64",
            "--lpips", "off", "--out", str(folder / "table.md"), *more, "--set", "steps=1,1,1",
            "amplify_first_chunk=false"]


def test_davis_stopped_and_continued(davis, monkeypatch, capsys):
    """Two rows, stopped after the first video: the same words make the rest, with the same table as without a stop."""
    mine = words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths"))
    made, once = [], make.Maker.make

    def stop(self, case, *rest):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(case.name)
        once(self, case, *rest)

    monkeypatch.setattr(make.Maker, "make", stop)
    note.cache_clear()
    assert evaluate.main(mine) == 130 and made == ["cat"] and not (davis / "table.md").exists()
    noted = capsys.readouterr().err
    monkeypatch.setattr(make.Maker, "make", lambda self, case, *rest: made.append(case.name) or once(self, case, *rest))
    assert evaluate.main(mine) == 0 and made == ["cat", "red-car"]
    assert "1 of its videos have fewer than 33 frames" in noted
    table = (davis / "table.md").read_text()
    assert "davis33: 2 videos" in table and "seed 0" in table and "PSNR visible" in table
    found = json.loads((davis / "table.json").read_text())["rows"]["full, mean filling"]
    frames = load_video(davis / "table" / "full-mean-filling" / "cat.mp4")
    assert frames.shape == (WINDOW, 64, 64, 3) and (davis / "table" / "full-mean-filling" / "cat_warp.mp4").is_file()
    true = np.stack([compare.fit(np.asarray(Image.open(each)), (64, 64), True)
                     for each in sorted((davis / "DAVIS/JPEGImages/480p/cat").iterdir())])
    assert found["cat"]["psnr"] == pytest.approx(-10 * np.log10(((frames / 255 - true / 255) ** 2).mean()), abs=1e-3)
    whole = mine.copy()
    whole[whole.index("--out") + 1] = str(davis / "other.md")
    assert evaluate.main([*whole[:2], "--part", "2/2", *whole[2:]]) == 0 and not (davis / "other.md").exists()
    assert evaluate.main([*whole[:2], "--part", "1/2", *whole[2:]]) == 0
    assert (davis / "other.md").read_text() == table
    assert evaluate.main([*whole[:2], "--seed", "5", *whole[2:]]) == 2
    assert "differs in words; choose another --out" in capsys.readouterr().err


def test_another_input_is_refused(davis, monkeypatch, capsys):
    """Videos, paths and prompts, by what is in them; a later frame does not count, nor which part is made."""
    monkeypatch.setattr(make.Maker, "make", lambda *given: None)
    mine, frames = words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths")), davis / "DAVIS/JPEGImages/480p/cat"

    def differs(*more):
        code = evaluate.main([*mine[:2], *more, *mine[2:]])
        error = capsys.readouterr().err.partition("differs in ")[2]
        assert (code, bool(error)) in ((0, False), (2, True))
        return error.partition(";")[0]

    assert differs("--part", "1/2") == "" == differs("--part", "2/2")
    shutil.copy(frames / "00000.jpg", frames / "00033.jpg")
    assert differs() == ""
    np.save(davis / "paths" / "cat.npy", move_path("forward 2").numpy())
    assert differs() == "case cat"
    np.save(davis / "paths" / "cat.npy", PATH.numpy())
    (davis / "DAVIS" / "prompts.csv").write_text("name,prompt\nred-car,a bus\n")
    assert differs() == "case red-car"
    (davis / "DAVIS" / "prompts.csv").unlink()
    shutil.copy(frames / "00000.jpg", frames / "00009.jpg")
    assert differs() == "case cat" and differs("--names", "red-car") == "names, case cat"


@pytest.mark.parametrize("more, message", [
    (("stepz=1",), "--set stepz=1: expected"), (("seed=3",), "--set seed=3: expected --seed 3"),
    (("device=cuda",), "--set device=cuda: expected --device cuda"), (("check=true",), "--set check=true: does nothing"),
    (("warp_fill=black",), "--set warp_fill=black: expected smooth or mean"),
    (("warp_fill=mean", "--ablation"), "--set warp_fill=mean: does nothing"), (("tf32=true", "--size", "65x64"), "--size"),
    (("warp_band=mid", "--lora", str(HELIOS / "lora_noprefix.safetensors")), "trained with the warp in the short band"),
    (("tf32=true", "--part", "3/2"), "--part '3/2'"), (("tf32=true", "--poses", "{damaged}"), "cat.npy"),
])
def test_bad_words_leave_nothing(davis, capsys, more, message):
    shutil.copytree(davis / "paths", davis / "damaged")
    (davis / "damaged" / "cat.npy").write_text("x")
    more = [word.format(damaged=davis / "damaged") for word in more]
    assert evaluate.main([*words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths")), *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (davis / "table").exists()


@pytest.mark.parametrize("name, content, message", [
    ("about.json", "{", "about.json: not valid JSON"), ("about.json", "[]", "about.json: found a list"),
    ("about.json", '{"mine": 1}', "about.json: what is there was made with other words"),
    ("mine.txt", "", "holds files, and no about.json"),
])
def test_a_folder_of_others(davis, capsys, name, content, message):
    (davis / "table").mkdir()
    (davis / "table" / name).write_text(content)
    assert evaluate.main(words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths"))) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and len([*(davis / "table").iterdir()]) == 1


@pytest.mark.parametrize("more, row", [((), "full, mean filling"), (("preset=realtime",), "full, smooth filling"),
                                       (("warp_fill=smooth",), "full, smooth filling")])
def test_the_row_has_the_filling_of_its_settings(davis, monkeypatch, more, row):
    rows = []
    monkeypatch.setattr(make.Maker, "make", lambda self, case, path, settings, row: rows.append(row))
    assert evaluate.main([*words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths")), *more]) == 0
    assert {*rows} == {row}


def test_a_unit_that_is_set_stays(realestate):
    """Whatever Pi3X sees."""
    case, settings = protocols.read_cases("re10k33", realestate / "re10k", None)[0], ["unit=0.5depth"]
    maker = make.Maker(realestate, ("--weights", str(DISTILLED), "--size", "64x64"), ("unit=2.0",), {}, ())
    assert maker.read(case, case.poses, settings, make.Way())[1].unit == "2.0"


def test_tf32_is_as_set(davis, monkeypatch):
    monkeypatch.setattr(make.Maker, "make", lambda *given: None)
    mine, cudnn = words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths")), torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    assert evaluate.main([*mine, "tf32=false"]) == 0
    assert not cudnn.allow_tf32 and cudnn.deterministic


def test_ablation(davis):
    """All rows but the LoRA's, each another video; the seed's noise is shared, so that what differs is the idea."""
    mine = words(davis, "davis33", "DAVIS", "--poses", str(davis / "paths"), "--ablation", "--names", "cat")
    assert evaluate.main(mine) == 0
    found = json.loads((davis / "table.json").read_text())["rows"]
    assert [*found] == ["no camera"] + [f"{idea}, {fill} filling" for fill in ("smooth", "mean")
                                        for idea in ("not aligned", "no drop", "full")]
    assert len({each["cat"]["psnr"] for each in found.values()}) == len(found)
    assert not (davis / "table" / "no-camera" / "cat_warp.mp4").exists()


def test_a_camera_that_is_not_known(davis, capsys):
    assert evaluate.main(words(davis, "davis33", "DAVIS")) == 2
    assert "cat: its camera is not known" in capsys.readouterr().err and not (davis / "table").exists()


def test_a_camera_that_pi3x_sees(davis, monkeypatch):
    """The path is the one that sample.py has of the same video, in tenths of the first frame's median depth; where
    nothing is sure enough to be valid, in those of what is surest, which is here the most distant."""
    frames = pictures(1, 4)
    depth = torch.linspace(1, 3, 72)[:, None].expand(72, 128)
    _, geometry = place(Image.fromarray(frames[0]), depth, 60.0, (72, 128), limit=5000)
    geometry = replace(geometry, valid=geometry.valid & False, confidence=geometry.depth / 100)
    seen = [replace(geometry, c2w=pose) for pose in PATH[5:9]]
    monkeypatch.setattr(scene, "estimate", lambda *given: seen)
    np.save(davis / "cat.npy", frames)
    (case,) = read_cases("davis33", davis / "DAVIS", ["cat"])
    file, _ = find_path(case, None, davis, lambda: None, lambda: frames)
    found, wanted = load_path(file).c2w, normalize(PATH[5:9], 4)
    wanted[:, :3, 3] *= 10 / 2.95
    assert torch.allclose(found, filmed_path(None, davis / "cat.npy")[0].c2w, atol=1e-5)
    assert torch.allclose(found, wanted, rtol=0.01, atol=1e-5)


@pytest.fixture
def realestate(tmp_path):
    folder = tmp_path / "re10k"
    folder.mkdir()
    w2c = inverse(PATH)[:, :3].reshape(WINDOW, 12)
    rows = [f"{33333 * (index + 1)} 0.5 0.9 0.5 0.5 0 0 " + " ".join(f"{value:.9f}" for value in row)
            for index, row in enumerate(w2c.tolist())]
    (folder / "abc123.txt").write_text("\n".join(["https://www.youtube.com/watch?v=x", *rows]) + "\n")
    (folder / "gone.txt").write_text("\n".join(["https://www.youtube.com/watch?v=y", *rows]) + "\n")
    write_video(folder / "abc123.mp4", pictures(2), 30)
    (folder / "prompts.csv").write_text('name,prompt\nabc123,"a hall, bright"\n')
    return tmp_path


def test_realestate(realestate):
    (case,) = read_cases("re10k33", realestate / "re10k", None)
    assert (case.name, case.prompt, case.video.name) == ("abc123", "a hall, bright", "abc123.mp4")
    assert evaluate.main(words(realestate, "re10k33", "re10k")) == 0
    assert "re10k33: 1 videos" in (realestate / "table.md").read_text()


def test_the_scale_of_realestate(realestate, monkeypatch):
    """Pi3X sees the way 3 times as long, at a median depth of 6: a unit of the file is half a depth."""
    far = PATH.clone()
    far[:, :3, 3] *= 3
    monkeypatch.setattr(protocols, "cameras", lambda pi3x, frames: far[::4])
    monkeypatch.setattr(protocols, "see", lambda pi3x, frames: Seen(far, 6.0, 1.0))
    assert known_unit(None, pictures(0, 33), realestate / "re10k" / "abc123.txt") == "0.5depth"


@pytest.fixture
def wbench(tmp_path):
    data = tmp_path / "wbench"
    for name in ("cases", "images/first_person"):
        (data / name).mkdir(parents=True)
    case = {"id": "1", "settings": {"perspective": "first_person"}, "environment_prompt": "a street.",
            "interactions": [{"action": "W", "type": "navigation"}, {"action": "left", "type": "navigation"},
                             {"action": "a dog appears", "type": "event_edit"}, {"action": "W", "type": "navigation"}]}
    (data / "cases" / "case_1.json").write_text(json.dumps(case))
    (data / "cases" / "case_2.json").write_text(json.dumps(case | {"interactions": case["interactions"][2:]}))
    Image.fromarray(pictures(1)[0]).save(data / "images" / "first_person" / "case_1.jpg")
    return tmp_path


def test_wbench(wbench, monkeypatch):
    """A chunk a turn, up to the first turn that is none of navigation; the score of a camera that obeys is near 1: of its
    17 poses, every fourth, one turn lies between frames 0 and 28, the other between 32 and 60."""
    def obey(pi3x, frames):
        return load_path(wbench / "table" / "paths" / "case_1.json").c2w[:: compare.STRIDE]

    monkeypatch.setattr(compare, "cameras", obey)
    monkeypatch.setattr(evaluate, "find_network", lambda args: (lambda: None, "cameras by a stub"))
    assert evaluate.main(words(wbench, "wbench-nav", "wbench")) == 0
    row = json.loads((wbench / "table.json").read_text())["rows"]["full, mean filling"]["case_1"]
    assert len(load_video(wbench / "table" / "full-mean-filling" / "case_1.mp4")) == 2 * WINDOW
    assert row["accuracy"] > 0.94 and row["R-Err"] < 0.1 and "consistency" not in row and "psnr" not in row
    path = load_path(wbench / "table" / "paths" / "case_1.json").c2w
    assert path[WINDOW - 1, 2, 3] == pytest.approx(2, abs=1e-4) and DEPTH == 10
    assert path[-1, 0, 2] < -0.4  # it looks to the left then


@pytest.mark.parametrize("protocol, more, message", [
    ("davis33", ("--data", "nowhere"), "no such folder"),
    ("davis33", ("--names", "dog"), "no video 'dog' in the layout of davis33"),
    ("re10k33", (), "none in the layout of re10k33"),
    ("wbench-nav", (), "none in the layout of wbench-nav"),
])
def test_other_layouts(davis, capsys, protocol, more, message):
    assert evaluate.main(words(davis, protocol, "DAVIS", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"interactions": [{}]}', '{"interactions": 5}', "x"])
def test_a_case_that_is_none(wbench, text, capsys):
    (wbench / "wbench" / "cases" / "case_3.json").write_text(text)
    assert evaluate.main(words(wbench, "wbench-nav", "wbench")) == 2
    assert "case_3.json: expected a case" in capsys.readouterr().err
