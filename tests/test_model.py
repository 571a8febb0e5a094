"""The DiT, its LoRA and the loader against the recorded official numbers, diffusers, and the released model's
tables."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import goldens
import peers
import pytest
import torch
from goldens import DISTILLED, HELIOS, check
from safetensors.torch import load_file, save_file

from files.checkpoint import load
from helios.lora import Lora, load_lora
from model import Band, Helios, HeliosConfig, History, rotate

INPUTS = goldens.tensors(HELIOS / "dit.safetensors")
CASES = goldens.cases(HELIOS / "dit_cases.json")


@pytest.fixture(scope="module")
def helios():
    return load(Helios, DISTILLED / "transformer")


def variant(model: Helios, case: str) -> Helios:
    """The same weights under a case's config, with the extra parameters that the case brings."""
    override = CASES[case]["config_override"]
    if not override:
        return model
    with torch.device("meta"):
        other = Helios(replace(model.config, **override))
    prefix = f"{case}.extra_param."
    extra = {key.removeprefix(prefix): value for key, value in INPUTS.items() if key.startswith(prefix)}
    other.load_state_dict(model.state_dict() | extra, assign=True)
    return other.requires_grad_(False)


def arguments(case: str):
    """latents, timestep, text embeddings and History of a recorded case."""
    given = {name: INPUTS[key] for name, key in CASES[case]["inputs"].items()}

    def band(name: str) -> Band | None:
        latents = given.get(f"latents_history_{name}")
        return None if latents is None else Band(latents, given[f"indices_latents_history_{name}"][0],
                                                 given.get(f"history_visible_mask_{name}"))

    indices = given.get("indices_hidden_states")
    threshold = CASES[case]["attention_kwargs"].get("history_visible_token_threshold", 0.5)
    history = History(band("short"), band("mid"), band("long"), None if indices is None else indices[0], threshold)
    return given["hidden_states"], given["timestep"], given["encoder_hidden_states"], history


def run(model: Helios, case: str) -> torch.Tensor:
    latents, timestep, embeddings, history = arguments(case)
    return model(latents, timestep, model.text(embeddings), model.context(history, latents.shape[2:]))


@pytest.mark.parametrize("case", CASES)
def test_forward(helios, case):
    check(f"DiT forward ({len(CASES)} cases)", run(variant(helios, case), case), INPUTS[f"{case}.out"], 5e-5)


def test_probes(helios):
    case = "wah_masks_thr0.1"
    latents, timestep, embeddings, history = arguments(case)
    probe = {key.removeprefix(f"{case}.probe.block0."): value for key, value in INPUTS.items() if ".probe." in key}
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: (inputs, output)})

    block = helios.blocks[0]
    modules = {"block": block, "attn1": block.attn1.to_out[0], "attn2": block.attn2.to_out[0], "k": block.attn2.to_k}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    context = helios.context(history, latents.shape[2:])
    helios(latents, timestep, helios.text(embeddings), context)
    for hook in hooks:
        hook.remove()
    history_tokens, target_tokens, history_time, target_time = seen["block"][0][:4]
    rope = torch.view_as_real(context.rope[:, 0]).repeat_interleave(2, dim=1)  # [N, head_dim, (cos, sin)]
    actual = {
        "in.hidden_states": torch.cat([history_tokens, target_tokens], dim=1),
        "in.rotary_emb": torch.cat([rope[..., 0], rope[..., 1]], dim=-1)[None],
        "in.text": seen["k"][0][0],
        "in.timestep_proj_first_and_last_token": torch.stack([history_time, target_time], dim=1),
        "attn1.out": seen["attn1"][1],
        "attn2.out": seen["attn2"][1],
        "out": torch.cat(seen["block"][1], dim=1),
    }
    assert actual.keys() == probe.keys()
    for name, value in actual.items():
        check("DiT probes", value, probe[name], 5e-5)


def test_kept_tokens(helios):
    """The drop keeps exactly the recorded number of tokens at both thresholds."""
    case = "wah_masks_thr0.1"
    latents, _, _, history = arguments(case)
    recorded = CASES[case]["kept(thr .1), kept(thr .5), total per band"]
    for name, counts in recorded.items():
        band = getattr(history, name)
        for count, threshold, visible in zip(counts, (0.1, 0.5, 0.0), (band.visible, band.visible, None)):
            changed = replace(history, mid=None, long=None, threshold=threshold)
            if name == "short":
                changed = replace(changed, short=replace(band, visible=visible))
                assert helios.context(changed, latents.shape[2:]).tokens.shape[1] == count
            else:
                alone = helios.context(changed, latents.shape[2:]).tokens.shape[1]
                both = replace(changed, **{name: replace(band, visible=visible)})
                assert helios.context(both, latents.shape[2:]).tokens.shape[1] - alone == count


def test_batch_and_fractional_timesteps(helios):
    """A batch gives what its members give alone, each at its own (fractional) timestep."""
    latents, _, embeddings, history = arguments("all_bands")
    latents = torch.cat([latents, latents.flip(-1)])
    timestep = torch.tensor([871.25, 3.5])
    text, context = helios.text(embeddings), helios.context(history, latents.shape[2:])
    alone = [helios(latents[i:i + 1], timestep[i:i + 1], text, context) for i in range(2)]
    text = [(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)) for k, v in text]
    torch.testing.assert_close(helios(latents, timestep, text, context), torch.cat(alone), atol=2e-5, rtol=0)


def test_bf16_keeps_its_islands():
    """In a bf16 model the named parameters stay fp32, and the output stays near the fp32 one."""
    model = load(Helios, DISTILLED / "transformer", dtype=torch.bfloat16)
    islands = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    parts = ("time_embedder", "scale_shift_table", "norm2")
    assert islands == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    expected = INPUTS["all_bands.out"]
    error = (run(model, "all_bands") - expected).abs().mean() / expected.abs().mean()
    assert error < 0.05, f"bf16 is {error:.3f} away"


@pytest.mark.parametrize("case", ["all_bands", "no_history", "no_guidance_cross_attn"])
def test_counted_flops(helios, case):
    """The formula equals torch's own counter on the blocks."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    model = variant(helios, case)
    latents, timestep, embeddings, history = arguments(case)
    text, context = model.text(embeddings), model.context(history, latents.shape[2:])
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # absent from torch's own table
              lambda q, k, v, *rest, out_shape, **options: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        model(latents, timestep, text, context)
    counts = counter.get_flop_counts()
    counted = sum(sum(counts[f"Helios.blocks.{i}"].values()) for i in range(len(model.blocks)))
    assert model.flops(context, embeddings.shape[1]) == counted


def loss_of(model: Helios, case: str, lora: Lora) -> torch.Tensor:
    """A scalar that depends on every output, with the LoRA's gradients cleared."""
    model.set_lora(lora)
    for matrix in matrices(lora):
        matrix.requires_grad_().grad = None
    return (run(model, case) * INPUTS[f"{case}.out"]).sum()


def matrices(lora: Lora) -> list[torch.Tensor]:
    return [matrix for down, up, _ in lora.adapters.values() for matrix in (down, up)]


@pytest.fixture
def checkpointing(helios):
    helios.checkpointing = True
    yield helios
    helios.checkpointing = helios.keep_attention = False
    helios.set_lora(None)


@pytest.mark.parametrize("case", ["wah_masks_thr0.1", "no_history", "no_guidance_cross_attn"])
def test_checkpointing(checkpointing, case):
    """Gradients are bit-equal with and without it, each is there, and the frozen weights get none."""
    model, lora, gradients = variant(checkpointing, case), load_lora(HELIOS / "lora_noprefix.safetensors"), []
    for model.checkpointing, model.keep_attention in ((True, False), (True, True), (False, False)):
        loss_of(model, case, lora).backward()
        gradients.append([matrix.grad.clone() for matrix in matrices(lora)])
    assert all(torch.equal(a, b) and torch.equal(b, c) and a.any() for a, b, c in zip(*gradients))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_keeps_little(checkpointing):
    """Of every block but the last only the inputs stay until the backward pass; without a LoRA, nothing at all."""
    case, lora = "wah_masks_thr0.1", load_lora(HELIOS / "lora_noprefix.safetensors")
    weights = {parameter.untyped_storage().data_ptr() for parameter in checkpointing.parameters()}

    def kept(model: Helios, lora: Lora) -> int:
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, case, lora)
        assert loss.requires_grad == bool(lora.adapters)
        return sum(sizes.values())

    deep = replace(checkpointing.config, num_layers=checkpointing.config.num_layers + 4)
    with torch.device("meta"):
        deeper = Helios(deep)
    state = checkpointing.state_dict()
    for name in [name for name in deeper.state_dict() if name not in state]:
        state[name] = state[re.sub(r"blocks\.\d+", "blocks.0", name)]
    deeper.load_state_dict(state, assign=True)
    deeper.requires_grad_(False)
    sizes = {}
    for deeper.checkpointing in (True, False):
        sizes[deeper.checkpointing] = kept(deeper, lora)
    assert sizes[True] < sizes[False] / 3
    assert kept(deeper, replace(lora, adapters={})) == 0


@pytest.mark.parametrize("case", ["all_bands", "no_history", "no_guidance_cross_attn"])
@pytest.mark.parametrize("again, keep", [(True, False), (True, True), (False, False)])
def test_counted_training_flops(checkpointing, case, again, keep):
    """As torch counts them in forward and backward, but for the adapters' own products and what is outside the
    blocks."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    model, lora = variant(checkpointing, case), load_lora(HELIOS / "lora_noprefix.safetensors")
    model.checkpointing, model.keep_attention = again, keep
    latents, timestep, embeddings, history = arguments(case)
    context, text = model.context(history, latents.shape[2:]), model.text(embeddings)
    loss_of(model, case, lora)
    on_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *rest, out_shape, **options: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *rest, out_shape, **options: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        model(latents, timestep, text, context).square().sum().backward()
    outside = counter.get_total_flops() - model.flops(context, embeddings.shape[1], training=True)
    total, target = len(context.rope), len(context.rope) - context.tokens.shape[1]
    dim, freq, layers = model.config.dim, model.config.freq_dim, len(model.blocks)
    adapters = 0
    for index in range(layers):
        tokens = target if index == layers - 1 else total
        for count, leaves in ((2 * total + tokens, index > 0), (tokens, True)):  # k, v, q; out
            product = 2 * len(lora.adapters["blocks.0.attn1.to_q"][0]) * dim * count
            adapters += product * (5 + leaves + 2 * (again and index < layers - 1))
    times = 2 if model.config.zero_history_timestep else 1
    ends = 3 * 2 * target * dim * 64 + times * 2 * (freq * dim + dim * dim + 6 * dim * dim)  # patches, projection, time
    assert outside == adapters + ends


@pytest.mark.parametrize("case", ["all_bands", "only_short", "no_history", "odd_sizes", "amplify_scalar",
                                  "no_guidance_cross_attn", "no_zero_history_timestep"])
def test_against_diffusers(helios, case):
    """The same weights in diffusers' own class, on all that it supports (it has no visibility drop)."""
    model = variant(helios, case)
    peer = peers.twin(model)
    with torch.no_grad():
        expected = peer(**{name: INPUTS[key] for name, key in CASES[case]["inputs"].items()}, return_dict=False)[0]
    check("DiT against diffusers", run(model, case), expected, 5e-5)


# --------------------------------------------------------------------------------------------------------------- LoRA

LORA = goldens.tensors(HELIOS / "lora_forward.safetensors")
RANK = goldens.cases(HELIOS / "lora_cases.json")["rank"]


@pytest.mark.parametrize("name, expected", [
    ("lora_noprefix.safetensors", "fused"), ("lora_noprefix.safetensors", "active_unfused"),
    ("lora_prefix.safetensors", "fused"), ("visible_lora_state.pt", "fused"),
    ("lora_prefix_alpha_meta.safetensors", "alpha_meta"),
])
def test_lora(helios, name, expected):
    before = {key: value.clone() for key, value in helios.state_dict().items()}
    helios.set_lora(load_lora(HELIOS / name))
    check("LoRA forward", run(helios, "wah_masks_thr0.1"), LORA[expected], 5e-5)
    helios.set_lora(None)
    check("LoRA forward", run(helios, "wah_masks_thr0.1"), LORA["base"], 5e-5)
    assert all(torch.equal(value, before[key]) for key, value in helios.state_dict().items())


def test_lora_flat_pt_and_alpha_pattern(tmp_path, helios):
    tensors = load_file(HELIOS / "lora_noprefix.safetensors")
    torch.save(tensors, tmp_path / "flat.pt")
    assert load_lora(tmp_path / "flat.pt").adapters.keys() == load_lora(HELIOS / "lora_noprefix.safetensors").adapters.keys()
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK,
                "transformer.alpha_pattern": {"blocks.0.attn1.to_q": RANK / 2}}
    save_file(tensors, tmp_path / "pattern.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    scales = {name: adapter[2] for name, adapter in load_lora(tmp_path / "pattern.safetensors").adapters.items()}
    assert scales.pop("blocks.0.attn1.to_q") == 0.5 and set(scales.values()) == {2.0}


def test_bad_loras_name_what_is_wrong(tmp_path, helios):
    good = load_file(HELIOS / "lora_noprefix.safetensors")

    def complaint(tensors, name="bad.safetensors"):
        (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
        with pytest.raises(ValueError) as error:
            helios.set_lora(load_lora(tmp_path / name))
        return str(error.value)

    key = "blocks.0.attn1.to_q.lora_A.weight"
    assert key in complaint(good | {key: torch.zeros(RANK)})
    assert "blocks.0.attn1.to_q" in complaint(good | {key: torch.zeros(RANK, helios.config.dim + 1)})
    other = f".{helios.config.num_layers}."
    assert f"blocks{other}attn1.to_q" in complaint({name.replace(".0.", other, 1): x for name, x in good.items()})
    assert "blocks.0.attn1.to_q" in complaint({name: value for name, value in good.items() if name != key})
    assert "alpha" in complaint(good | {"blocks.0.attn1.to_q.alpha": torch.ones(2)})
    assert "bad.pt" in complaint({"peft": [1, 2]}, "bad.pt")
    assert "bad.pt" in complaint(helios.config, "bad.pt")  # a pickled object is refused, not run
    assert helios.blocks[0].attn1.to_q.adapter is None, "a refused LoRA must not stay attached"
    with pytest.raises(ValueError, match=".safetensors or .pt"):
        load_lora(tmp_path / "lora.bin")


# ------------------------------------------------------------------------------------------------------------ loading


def test_full_size_tables():
    """The released 14B model: 1101 tensors, 14,312,427,584 numbers, the shapes of the specification."""
    with torch.device("meta"):
        state = Helios(HeliosConfig()).state_dict()
    dim = 5120
    table = {"patch_embedding": (dim, 16, 1, 2, 2), "patch_short": (dim, 16, 1, 2, 2), "patch_mid": (dim, 16, 2, 4, 4),
             "patch_long": (dim, 16, 4, 8, 8), "condition_embedder.time_embedder.linear_1": (dim, 256),
             "condition_embedder.time_embedder.linear_2": (dim, dim), "condition_embedder.time_proj": (6 * dim, dim),
             "condition_embedder.text_embedder.linear_1": (dim, 4096),
             "condition_embedder.text_embedder.linear_2": (dim, dim), "proj_out": (64, dim)}
    plain = {"norm_out.scale_shift_table": (1, 2, dim)}
    for i in range(40):
        block = f"blocks.{i}"
        plain[f"{block}.scale_shift_table"] = (1, 6, dim)
        table |= {f"{block}.ffn.net.0.proj": (13824, dim), f"{block}.ffn.net.2": (dim, 13824)}
        plain |= {f"{block}.norm2.weight": (dim,), f"{block}.norm2.bias": (dim,)}
        for attention in ("attn1", "attn2"):
            table |= {f"{block}.{attention}.{layer}": (dim, dim) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
            plain |= {f"{block}.{attention}.{norm}.weight": (dim,) for norm in ("norm_q", "norm_k")}
    expected = plain | {f"{name}.weight": shape for name, shape in table.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in table.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert len(state) == 1101 and sum(value.numel() for value in state.values()) == 14_312_427_584


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DISTILLED / "transformer", tmp_path / "transformer")
    return tmp_path / "transformer"


def complaint(folder) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load(Helios, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def shard_of(folder, name: str = "proj_out.bias"):
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit_shard(folder, change, name: str = "proj_out.bias") -> None:
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def test_loading_is_strict(folder):
    width = len(load_file(shard_of(folder))["proj_out.bias"])
    edit_shard(folder, lambda tensors: tensors.pop("proj_out.bias"))
    assert "missing proj_out.bias" in complaint(folder)
    edit_shard(folder, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3), "extra.weight": torch.zeros(1)}))
    message = complaint(folder)
    assert "unexpected extra.weight" in message and f"proj_out.bias has shape [3], expected [{width}]" in message


def test_unreadable_files_are_named(folder):
    shard = shard_of(folder)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole) // 2])
    assert shard.name in complaint(folder)
    shard.unlink()
    assert shard.name in complaint(folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in complaint(folder)


def test_unsupported_configs_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"qk_norm": "layer_norm"}))
    assert "qk_norm" in complaint(folder)


def test_an_index_without_files_is_named(folder):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert "weight_map" in complaint(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory from /proc")
def test_loading_makes_no_second_copy(tmp_path):
    """The private memory of a process that loads bf16 files as fp32 grows by the fp32 size, and never beyond."""
    config = {"num_attention_heads": 8, "attention_head_dim": 48, "rope_dim": [16, 16, 16], "num_layers": 8, "ffn_dim": 1536}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Helios(HeliosConfig(**config)).state_dict().items()}
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = """if True:
        import sys, threading, time
        from files.checkpoint import load
        from model import Helios
        def private():
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            return int(line.split()[1]) * 1024
        peak, start = [0], private()
        def watch():
            while True:
                peak[0] = max(peak[0], private())
                time.sleep(0.001)
        threading.Thread(target=watch, daemon=True).start()
        model = load(Helios, sys.argv[1])
        size = sum(value.numel() * 4 for value in model.parameters())
        print((max(peak[0], private()) - start) / size)
    """
    ratio = float(subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True,
                                 cwd=goldens.GOLDEN.parent.parent).stdout)
    assert 0.9 < ratio < 1.25, f"loading took {ratio:.2f} times the size of the model"


def test_older_name_of_the_output_table(folder):
    def rename(tensors):
        tensors["scale_shift_table"] = tensors.pop("norm_out.scale_shift_table")
    edit_shard(folder, rename, "norm_out.scale_shift_table")
    check(f"DiT forward ({len(CASES)} cases)", run(load(Helios, folder), "all_bands"), INPUTS["all_bands.out"], 5e-5)


def test_rotation_keeps_lengths():
    x = torch.randn(1, 5, 2, 8)
    angle = torch.rand(5, 1, 4) * 6
    turned = rotate(x, torch.polar(torch.ones_like(angle), angle))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, torch.polar(torch.ones_like(angle), -angle)), x)
