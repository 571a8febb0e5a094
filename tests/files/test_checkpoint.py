"""Configs and safetensors of others: what is usable is used with a printed word, the rest is one line."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from files import checkpoint
from files.checkpoint import (
    Network,
    build,
    few,
    load,
    on_meta,
    parse_json,
    read_config,
    read_json,
    read_json_value,
    weight_files,
)  # fmt: skip
from files.cli import note
from geometry.pi3x import Pi3X
from helios.text import UMT5Encoder
from helios.vae import VAE
from model import Helios


@dataclass(frozen=True)
class SmallConfig:
    num_layers: int = 2
    dim: int = 4
    scale: float = 1.0
    ends: tuple[int, ...] = ()
    name: str = "a"
    flag: bool = True
    extra: int | None = None


class Small(Network):
    Config = SmallConfig

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.num_layers))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with its weights."""
    note.cache_clear()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    torch.manual_seed(0)
    save_file(Small(SmallConfig()).state_dict(), tmp_path / "m" / "model.safetensors")
    return tmp_path / "m"


def line(call, *words: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 700 and all(word in text for word in words), text


# ---------------------------------------------------------------------------------------------------------------- json


@pytest.mark.parametrize("text, words", {
    "nested": ("[" * 10**5, "not valid JSON"), "half": ('{"a": ', "not valid JSON"), "no text": ("\ud800", "not valid"),
    "twice": ('{"a": 1, "a": 2}', "'a' is there twice"), "digits": ("9" * 10000, "not valid JSON"),
    "list": ("[]", "found a list"), "empty": ("", "not valid JSON"),
}.values())
def test_bad_json(tmp_path, text, words):
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogatepass"))
    line(lambda: read_json(tmp_path / "x.json"), "x.json", words)


def test_json_that_is_no_file(tmp_path):
    line(lambda: read_json(tmp_path), "no such file")
    (tmp_path / "x.json").touch()


    os.truncate(tmp_path / "x.json", 2**31)
    line(lambda: read_json(tmp_path / "x.json"), "at most")


def test_json_of_windows(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n 1}\r\n')
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "y.json").write_text("[1]")
    assert read_json_value(tmp_path / "y.json") == [1]
    line(lambda: parse_json("{", "header of x"), "header of x: not valid JSON")


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name, value", [
    ("num_layers", 10**9), ("num_layers", 1001), ("num_layers", -1), ("num_layers", True), ("num_layers", 2.0),
    ("dim", 10**6), ("dim", None), ("dim", [4]), ("scale", math.nan), ("scale", math.inf), ("scale", 10**400),
    ("scale", "1"), ("ends", [1, "a"]), ("ends", 3), ("ends", [10**5]), ("name", 1), ("flag", "no"), ("extra", "x"),
])
def test_bad_configs(tmp_path, name, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value, "unknown": {}}))
    line(lambda: read_config(SmallConfig, path), "config.json", f"{name} is ", "expected")


def test_good_configs(tmp_path):
    path = tmp_path / "config.json"
    values = {"num_layers": 1000, "dim": 8192, "scale": 2, "ends": [0, 3], "flag": False, "extra": None, "other": [[]]}
    path.write_text(json.dumps(values))
    assert read_config(SmallConfig, path) == SmallConfig(1000, 8192, 2, (0, 3), "a", False, None)
    path.write_text('{"dim": 0}')
    line(lambda: build(Small, tmp_path), "dim is 0, expected at least 1")


# ------------------------------------------------------------------------------------------------------------- weights


def test_a_pointer_in_place_of_a_file(folder):
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(text)
        line(lambda: load(Small, folder), name, "a git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("index", (False, True))
def test_a_variant_alone_is_used(folder, index, capsys):
    if index:
        save_file(Small(SmallConfig()).state_dict(), folder / "model.fp16-00001-of-00001.safetensors")
        shards = {name: "model.fp16-00001-of-00001.safetensors" for name in Small(SmallConfig()).state_dict()}
        (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": shards}))
        assert weight_files(folder) == [folder / "model.safetensors"], "a variant beside the whole weights is not used"
        (folder / "model.safetensors").unlink()
    else:
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    load(Small, folder)
    load(Small, folder)
    assert capsys.readouterr().err == f"{folder}: only the variant fp16 of the weights is there, so it is used\n"


def test_pickled_weights_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    line(lambda: load(Small, folder), "pickled (pytorch_model.bin)", "convert")
    (folder / "pytorch_model.bin").rename(folder / "other.safetensors")
    line(lambda: load(Small, folder), "no model.safetensors", "found other.safetensors")
    line(lambda: load(Small, folder / "nowhere"), "no such file")


@pytest.mark.parametrize("prefix", ("model.diffusion_model.", "transformer.", "module.", "model."))
def test_a_common_prefix_is_left_out(folder, prefix, capsys):
    wanted = Small(SmallConfig()).state_dict()
    save_file({f"{prefix}{name}": value for name, value in wanted.items()}, folder / "model.safetensors")
    loaded = load(Small, folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    assert prefix in capsys.readouterr().err
    save_file({f"{prefix}{name}": value for name, value in wanted.items()} | {"other": torch.ones(1)},
              folder / "model.safetensors")
    line(lambda: load(Small, folder), "unexpected")


def test_long_lists_are_cut(folder):
    (folder / "config.json").write_text('{"num_layers": 900}')
    line(lambda: load(Small, folder), "missing layers.2.weight", "and 1791 more")
    assert few("abcde") == "a; b; c; d; e" and few("abcdef") == "a; b; c; d; e and 1 more"


@pytest.mark.parametrize("name", ["../m/model.safetensors", "/etc/passwd", ["x"], 5, "model.bin", "", "a\0.safetensors",
                                  "sub/model.safetensors", "..", "x" * 5000, "C:x.safetensors", "..\\x.safetensors"])
def test_shards_are_plain_names(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    line(lambda: weight_files(folder), "index.json", "plain name")


def shard(folder: Path, target: Path) -> None:
    """The weights as a shard that is a link."""
    (folder / "model.safetensors").rename(target)
    (folder / "one.safetensors").symlink_to(target)
    shards = dict.fromkeys(Small(SmallConfig()).state_dict(), "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_links_stay_inside(folder, tmp_path):
    shard(folder, tmp_path / "outside.safetensors")
    line(lambda: load(Small, folder), "one.safetensors is a link out of its folder")


def test_links_of_the_cache(folder, tmp_path):
    home = tmp_path / "models--A--B"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    folder = folder.rename(home / "snapshots" / "abc")
    shard(folder, home / "blobs" / "00ff")
    assert load(Small, folder).layers[0].weight.shape == (4, 4)


def test_the_same_tensor_in_two_files(folder):
    state = Small(SmallConfig()).state_dict()
    for name in ("one", "two"):
        save_file(state, folder / f"{name}.safetensors")
    shards = {name: ("one" if "0" in name else "two") + ".safetensors" for name in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    line(lambda: load(Small, folder), "layers.0.bias is in more than one file")


def test_a_tensor_under_both_of_its_names(folder):
    """Ours counts, whichever comes first in the file."""
    class Named(Small):
        aliases = {"a": "layers.0.bias", "z": "layers.1.bias"}

    state = Small(SmallConfig()).state_dict()
    save_file(state | {"a": torch.ones(4), "z": torch.ones(4)}, folder / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in load(Named, folder).state_dict().items())
    state["a"], state["z"] = (state.pop(f"layers.{index}.bias") for index in (0, 1))
    save_file(state, folder / "model.safetensors")
    assert torch.equal(load(Named, folder).layers[0].bias, state["a"])


@pytest.mark.parametrize("dim, takes", [(48, True), (36, False)])
def test_float8_products_of_what_the_kernel_takes(folder, monkeypatch, dim, takes):
    """Sides of whole 16s; of other layers the weight is cast back."""
    monkeypatch.setattr(checkpoint, "multiplies_float8", lambda device: True)
    (folder / "config.json").write_text(json.dumps({"dim": dim}))
    save_file(Small(SmallConfig(dim=dim)).state_dict(), folder / "model.safetensors")
    assert [layer.in_float8 for layer in load(Small, folder, fp8=(".weight",)).layers] == [takes, takes]


class Drawn(TorchDispatchMode):
    """How often random numbers are drawn, which is what takes an initialiser's time."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.count += any(part in name for part in ("uniform", "normal"))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("network", [Helios, VAE, UMT5Encoder, Pi3X], ids=lambda network: network.__name__)
def test_networks_are_built_without_initialisers(network):
    """On the meta device they would only take time; elsewhere they run as ever, also afterwards."""
    with Drawn() as built:
        module = on_meta(lambda: network(network.Config()))
    assert built.count == 0 and all(parameter.is_meta for parameter in module.parameters())
    with Drawn() as layer:
        assert nn.Linear(3, 4).weight.any()
    assert layer.count == 2
