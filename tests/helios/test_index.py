"""model_index.json and the folder around it."""

import json
import math

import pytest

from files.writing import fingerprint
from geometry.pi3x import find_pi3x
from helios.index import check_weights, read_index

GOOD = {"scheduler": ["diffusers", "HeliosScheduler"]}


@pytest.mark.parametrize("name, value", [
    ("max_sequence_length", "x"), ("max_sequence_length", None), ("max_sequence_length", -1), ("height", "64"),
    ("height", [64]), ("height", 10**6), ("width", 8), ("num_inference_steps", "4"), ("num_inference_steps", 1.5),
    ("num_inference_steps", 10**4), ("guidance_scale", "x"), ("guidance_scale", math.nan), ("guidance_scale", True),
    ("is_distilled", "no"), ("is_distilled", 1), ("keyframes", "x"), ("keyframes", 0), ("train", [1]), ("train", "x"),
    ("scheduler", "HeliosScheduler"), ("scheduler", [None, "HeliosScheduler"]), ("scheduler", ["a", "DDIMScheduler"]),
])
def test_bad_indices(tmp_path, name, value):
    (tmp_path / "model_index.json").write_text(json.dumps(GOOD | {name: value}))
    with pytest.raises(ValueError, match=f"model_index.json: {name} is .*expected"):
        read_index(tmp_path)


def test_the_root_of_a_cache_folder(tmp_path):
    home = tmp_path / "models--A--B"
    for name in ("abc", "def"):
        (home / "snapshots" / name).mkdir(parents=True)
        (home / "snapshots" / name / "model_index.json").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="2 snapshots there"):
        check_weights(home)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("def\n")
    assert check_weights(home) == home / "snapshots" / "def"
    assert check_weights(home / "snapshots" / "abc") == home / "snapshots" / "abc"
    with pytest.raises(ValueError, match="no model_index.json there"):
        check_weights(tmp_path)


def test_the_geometry_of_a_cache_folder(tmp_path):
    home = tmp_path / "models--A--Pi3X"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "snapshots" / "abc" / "model.safetensors").touch()
    assert find_pi3x(home, tmp_path) == find_pi3x(home / "snapshots" / "abc", tmp_path)
    assert find_pi3x(home, tmp_path) == home / "snapshots" / "abc" / "model.safetensors"
    assert find_pi3x(tmp_path / "x.safetensors", tmp_path) == tmp_path / "x.safetensors"


def test_hidden_files_are_no_part_of_a_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    for name in (".DS_Store", "a/.x.swp", ".cache/huggingface/x.lock"):
        (tmp_path / name).write_text("new")
    assert fingerprint(tmp_path) == before
    (tmp_path / "a" / "x.json").write_text("[]")
    assert fingerprint(tmp_path) != before
    read = [tmp_path / "a" / "x.json"]
    before = fingerprint(tmp_path, read)
    (tmp_path / "README.md").write_text("new")
    assert fingerprint(tmp_path, read) == before
