"""LoRA files of every kind give PEFT's update of each layer; what is more than a LoRA, damaged or hostile is one line."""

import json
import math
import re
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from files.checkpoint import on_meta
from helios.lora import load_lora
from model import Helios, HeliosConfig

LAYERS = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.1.attn1.to_q", "blocks.1.attn1.to_out.0")
CONFIG = HeliosConfig(1, 8, 2, 32, 4, 4, 8, 8, rope_dim=(4, 2, 2))


def tensors(key="{layer}.lora_{half}.weight", halves=("A", "B"), rank=2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key.format(layer=layer, half=half): torch.randn((rank, 8) if half == halves[0] else (8, rank),
                                                            generator=generator) for layer in LAYERS for half in halves}


def saved(path, content, settings=None, **header: str):
    if settings is not None:
        header["lora_adapter_metadata"] = json.dumps(settings)
    save_file(content, path, metadata=header or None)
    return path


def update(adapter) -> torch.Tensor:
    down, up, scale = adapter
    return scale * up @ down


def line(path, *words: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load_lora(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 600, text
    assert all(word in text for word in words), text


# ---------------------------------------------------------------------------------------------------- names and scales


@pytest.mark.parametrize("key", [
    "{layer}.lora_{half}.weight", "transformer.{layer}.lora_{half}.weight", "module.{layer}.lora_{half}.weight",
    "diffusion_model.{layer}.lora_{half}.weight", "base_model.model.{layer}.lora_{half}.weight",
    "base_model.model.{layer}.lora_{half}.default.weight", "base_model.model.transformer.{layer}.lora_{half}.x.weight",
])
def test_names(tmp_path, key):
    wanted = load_lora(saved(tmp_path / "plain.safetensors", tensors()))
    found = load_lora(saved(tmp_path / "x.safetensors", tensors(key)))
    assert {*found.adapters} == {*LAYERS}
    for name, adapter in found.adapters.items():
        assert torch.equal(update(adapter), update(wanted.adapters[name])) and adapter[2] == 1


def test_kohya(tmp_path):
    """Names with underscores are found among the model's layers; each layer has its alpha."""
    content = tensors("{layer}.lora_{half}.weight", ("down", "up"))
    flat = {"lora_unet_" + key.partition(".lora")[0].replace(".", "_") + key[key.index(".lora"):]: value
            for key, value in content.items()}
    flat |= {f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(0.5) for layer in LAYERS}
    lora = load_lora(saved(tmp_path / "x.safetensors", flat))
    assert {scale for _, _, scale in lora.adapters.values()} == {0.25}
    model = on_meta(lambda: Helios(CONFIG))
    model.set_lora(lora)
    wanted = load_lora(saved(tmp_path / "plain.safetensors", tensors()))
    for layer in LAYERS:
        assert torch.equal(update(model.get_submodule(layer).adapter), update(wanted.adapters[layer]) / 4)


def test_eight_bits(tmp_path):
    content = {key: value.to(torch.float8_e4m3fn) for key, value in tensors().items()}
    lora = load_lora(saved(tmp_path / "x.safetensors", content))
    torch.save(content, tmp_path / "x.pt")
    for name, (down, up, _) in load_lora(tmp_path / "x.pt").adapters.items():
        assert torch.equal(down, content[f"{name}.lora_A.weight"].float())
        assert torch.equal(down, lora.adapters[name][0]) and torch.equal(up, lora.adapters[name][1])


PATTERNS = {
    "plain": {}, "stabilised": {"use_rslora": True},
    "suffix": {"alpha_pattern": {"to_out.0": 3}, "rank_pattern": {"attn1.to_q": 3}},
    "expression": {"alpha_pattern": {r"blocks\.1\..*": 6, "to_q": 1}, "rank_pattern": {"blocks.[0].attn1.to_q": 1}},
    "whole": {"alpha_pattern": {"blocks.0.attn1.to_q": 2, "q": 100}, "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
@pytest.mark.parametrize("name", PATTERNS)
def test_scales_of_peft(tmp_path, name):
    """Saved by PEFT: the folder, adapter_config.json with it, gives the updates that PEFT itself adds."""
    peft = pytest.importorskip("peft")
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"attn1": nn.ModuleDict({
        "to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})}) for _ in range(2))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False,
                             **PATTERNS[name])
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    lora = load_lora(tmp_path)
    assert {*lora.adapters} == {*LAYERS}
    for layer, adapter in lora.adapters.items():
        torch.testing.assert_close(update(adapter), model.get_submodule(layer).get_delta_weight("default"))


def test_settings_of_diffusers(tmp_path):
    """Saved by diffusers, whose header has the settings."""
    pytest.importorskip("peft")
    pytest.importorskip("diffusers")
    from peers import twin
    from peft import LoraConfig

    ours = Helios(CONFIG)
    peer = twin(ours)
    peer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["attn1.to_q", "attn1.to_out.0"], use_rslora=True,
                                alpha_pattern={"to_out.0": 3}, init_lora_weights=False))
    peer.save_lora_adapter(tmp_path)
    lora = load_lora(tmp_path)
    ours.set_lora(lora)
    assert {scale for _, _, scale in lora.adapters.values()} == {4 / math.sqrt(2), 3 / math.sqrt(2)}
    for layer, adapter in lora.adapters.items():
        torch.testing.assert_close(update(adapter), peer.get_submodule(layer).get_delta_weight("default"))


def test_the_band_of_the_warp(tmp_path):
    assert load_lora(saved(tmp_path / "x.safetensors", tensors())).warp_band == "short"
    assert load_lora(saved(tmp_path / "x_patchmid_1.safetensors", tensors())).warp_band == "mid"
    assert load_lora(saved(tmp_path / "y.safetensors", tensors(), wah_warp_band="mid")).warp_band == "mid"
    assert load_lora(saved(tmp_path / "patchmid.safetensors", tensors(), wah_warp_band="short")).warp_band == "short"
    line(saved(tmp_path / "z.safetensors", tensors(), wah_warp_band="long"), "wah_warp_band", "'long'")


# --------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("settings, word", [
    ({"use_dora": True}, "use_dora"), ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"bias": "all"}, "bias is all"),
    ({"lora_bias": True}, "lora_bias"), ({"new_kind": True}, "new_kind"), ({"modules_to_save": ["x"]}, "modules_to"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"peft_type": "LOHA"}, "peft_type is LOHA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"), ({"transformer.use_dora": True}, "use_dora"),
    ({"alpha_pattern": [1]}, "alpha_pattern"), ({"rank_pattern": {"to_q": 7}}, "rank of blocks.0.attn1.to_q is 2"),
    ({"r": 3}, "say '3'"), ({"lora_alpha": "x"}, "alpha of"), ({"lora_alpha": True}, "lora_alpha is True"),
    ({"lora_alpha": math.nan}, "nan"), ({"lora_alpha": math.inf}, "inf"), ({"lora_alpha": 10**400}, "alpha of"),
    ({"lora_alpha": 1e9}, "at most 2000"), ({"lora_alpha": -1}, "above 0"), ({"lora_alpha": 0}, "above 0"),
    ({"alpha_pattern": {"(": 1}}, "not an expression"), ({"alpha_pattern": {"(.*)*(.*)*x": 1}}, "not simple"),
    ({"alpha_pattern": {"a" * 999: 1}}, "not simple"), ([1], "not a JSON object"),
])
def test_settings_that_ask_for_more(tmp_path, settings, word):
    start = time.perf_counter()
    line(saved(tmp_path / "x.safetensors", tensors(), settings), word)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("text", ["{", "[" * 10**5, '{"r": 2, "r": 2}', ""])
def test_headers_that_are_no_settings(tmp_path, text):
    line(saved(tmp_path / "x.safetensors", tensors(), lora_adapter_metadata=text), "in its header: not valid JSON")


@pytest.mark.parametrize("key, kind", [
    ("blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"), ("blocks.0.attn1.to_q.dora_scale", "DoRA"),
    ("lora_unet_blocks_0_attn1_to_q.lokr_w1", "LoKr"), ("blocks.0.attn1.to_q.hada_w1_a", "LoHa"),
    ("blocks.0.attn1.to_q.lora_B.bias", "lora_bias"), ("blocks.0.attn1.to_q.diff_b", "difference"),
    ("blocks.0.attn1.to_q.oft_R.weight", "OFT"), ("blocks.0.attn1.to_q.weight", "not a key of a LoRA"),
    ("transformer.blocks.0.attn1.to_q.lora_A.weight", "there twice"),
])
def test_other_kinds_are_named(tmp_path, key, kind):
    line(saved(tmp_path / "x.safetensors", tensors() | {key: torch.ones(2, 8)}), key, kind)


@pytest.mark.parametrize("value", [torch.full((2, 8), math.nan), torch.ones(2, 8, dtype=torch.int32), torch.ones(0, 8),
                                   torch.ones(8), torch.ones(2, 8, 1)])
def test_tensors_that_are_none(tmp_path, value):
    line(saved(tmp_path / "x.safetensors", tensors() | {"blocks.0.attn1.to_q.lora_A.weight": value}),
         "blocks.0.attn1.to_q.lora_A.weight")


def test_alphas_that_are_none(tmp_path):
    for value in (math.nan, math.inf, 0.0, -1.0, 1e30):
        content = tensors() | {"blocks.0.attn1.to_q.alpha": torch.tensor(value)}
        line(saved(tmp_path / "x.safetensors", content), "blocks.0.attn1.to_q")


HOSTILE = {
    "sparse": lambda: torch.eye(8).to_sparse(), "meta": lambda: torch.empty(10**6, 10**6, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda: torch.ones(2, 8, dtype=torch.complex64), "stride 0": lambda: torch.ones(1, 1).expand(10**5, 10**5),
    "shared": lambda: torch.ones(10**4).expand(8, 10**4),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 8), 0.1, 0, torch.qint8),
    "module": lambda: nn.Linear(2, 2), "bytes": lambda: bytearray(8), "number": lambda: 5,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HOSTILE)
def test_pt_files_of_no_plain_tensors(tmp_path, kind):
    torch.save({"blocks.0.attn1.to_q.lora_A.weight": HOSTILE[kind](), "b": torch.ones(2)}, tmp_path / "x.pt")
    line(tmp_path / "x.pt", "x.pt: ")


def test_pt_files_that_unpack(tmp_path):
    torch.save(tensors(), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    line(tmp_path / "y.pt", "compressed")
    torch.save(tensors(), tmp_path / "z.pt", _use_new_zipfile_serialization=False)
    line(tmp_path / "z.pt", "not a readable .pt")
    (tmp_path / "v.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    line(tmp_path / "v.pt", "git-lfs pointer")


def test_a_lora_of_another_model(tmp_path):
    """Layers and shapes are compared with the network's config alone."""
    model = on_meta(lambda: Helios(CONFIG))
    content = {key.replace("blocks.0", f"blocks.{n}"): value for n in range(60) for key, value in tensors().items()}
    with pytest.raises(ValueError, match=r"no layer blocks.10.attn1.to_q; .* and 111 more"):
        model.set_lora(load_lora(saved(tmp_path / "x.safetensors", content)))
    content = {key: torch.ones(2, 16) if ".lora_A" in key else value for key, value in tensors().items()}
    with pytest.raises(ValueError, match=re.escape("blocks.0.attn1.to_q: A [2, 16] and B [8, 2] for a weight [8, 8]")):
        model.set_lora(load_lora(saved(tmp_path / "y.safetensors", content)))
    kohya = {f"lora_unet_blocks_0_attn1_to_q.lora_{half}.weight": torch.ones(2, 8) if half == "down" else torch.ones(8, 2)
             for half in ("down", "up")}
    with pytest.raises(ValueError, match="twice, in two spellings"):
        model.set_lora(load_lora(saved(tmp_path / "z.safetensors", tensors() | kohya)))
