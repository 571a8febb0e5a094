"""Pi3X against the official numbers, its symmetries, its bf16 form, and strict loading by shapes alone."""

from math import isqrt, prod

import pytest
import torch
import torch.nn.functional as F
from goldens import GEOMETRY, check, prefixed, tensors
from safetensors.torch import save_file

from geometry.heads import append_view_plane, nearest_rotation
from geometry.pi3x import (
    Block,
    Branch,
    Pi3X,
    Pi3XConfig,
    load_pi3x,
    resize_positions,
)
from geometry.rotary import rope_table, rotate
from geometry.surface import focal_from_rays

WEIGHTS = GEOMETRY / "pi3x_weights.safetensors"
UNITS = tensors(GEOMETRY / "pi3x_units.safetensors")
COMPARED = ("points", "local_points", "rays", "confidence", "c2w", "metric")


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def network() -> Pi3X:
    return load_pi3x(WEIGHTS)


def pictures(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return (golden["imgs_u8"].float() / 255).permute(0, 3, 1, 2)[None]


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state.items()}


# -------------------------------------------------------------------------------------------------- recorded numbers


@pytest.mark.parametrize("name", ["pi3x_n1", "pi3x_n3"])
def test_golden(network, name):
    golden, seen = tensors(GEOMETRY / f"{name}.safetensors"), {}

    def keep(key):
        return lambda module, inputs, output: seen.update({key: (inputs, output)})

    modules = {**dict(network.named_children()), **{f"block{i}": block for i, block in enumerate(network.decoder)}}
    hooks = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    prediction = network(pictures(golden))
    for hook in hooks:
        hook.remove()

    maps, (rotation, translation) = seen["point_head"][1].movedim(-1, 1), seen["camera_head"][1]
    inner = {
        "encoder_patch_tokens": seen["encoder"][1],
        **{f"decoder_block{i}_out": seen[f"block{i}"][1] for i in range(len(network.decoder))},
        "decoder_concat": seen["point_decoder"][0][0],
        **{f"{branch}_decoder_out": seen[f"{branch}_decoder"][1] for branch in ("point", "conf", "camera", "metric")},
        "head_xy_raw": maps[:, :2, ::4, ::4],
        "head_logz_raw": maps[:, 2:],
        "camera_rot9_raw": rotation,
        "camera_t_raw": translation,
    }
    outer = {
        "out/points": prediction.points,
        "out/local_points": prediction.local_points,
        "out/rays": prediction.rays,
        "out/conf": prediction.confidence[..., None],
        "out/camera_poses": prediction.c2w,
        "out/metric": prediction.metric,
        "post/intrinsics_centered": focal_from_rays(prediction.local_points[0]),
    }
    assert golden.keys() - {"imgs_u8"} <= {f"inter/{key}" for key in inner} | outer.keys()
    for key, actual in inner.items():
        if f"inter/{key}" in golden:
            expected = golden[f"inter/{key}"]
            if "block" in key and actual.shape != expected.shape:  # a block over all pictures has them in one row
                assert actual.shape[:2] == (1, expected.shape[0] * expected.shape[1])
                actual = actual.view(expected.shape)
            check("Pi3X tokens and raw heads", actual, expected, 1e-5, relative=True)
    names = {"out/conf": "confidence", "post/intrinsics_centered": "intrinsics"}
    for key, actual in outer.items():
        component = f"Pi3X {names.get(key, 'outputs')}"
        check(component, actual, golden[key], 2e-5 if key == "out/conf" else 1e-5, relative=True)


def test_rope():
    positions, x = UNITS["rope/pos_yx"], UNITS["rope/q"]
    table = rope_table(positions, torch.float32)[:, :, None]  # the same for all heads
    check("Pi3X RoPE", rotate(x, table), UNITS["rope/out"], 1e-6, relative=True)
    coarse = rotate(x.bfloat16(), rope_table(positions, torch.bfloat16)[:, :, None])
    assert coarse.dtype == torch.bfloat16
    check("Pi3X RoPE in bf16", coarse.float(), UNITS["rope/out_bf16_as_fp32"], 1e-2)


def test_position_resize():
    table = UNITS["posinterp/pos_embed"]
    for size, expected in prefixed(UNITS, "posinterp/out_").items():
        height, width = map(int, size.split("x"))
        check("Pi3X position resize", resize_positions(table, height // 14, width // 14), expected, 1e-6, relative=True)
    grid = isqrt(table.shape[1] - 1)
    assert torch.equal(resize_positions(table, grid, grid), table)  # bit by bit at the table's own size


def test_rotation():
    rotations = nearest_rotation(UNITS["svd/in9"])
    check("Pi3X nearest rotation", rotations, UNITS["svd/out"], 5e-6, relative=True)
    assert torch.allclose(torch.linalg.det(rotations), torch.ones(len(rotations)), atol=1e-5)


@pytest.mark.parametrize("name", prefixed(UNITS, "uv/"))
def test_view_plane(name):
    size, _, aspect = name.partition("_aspect")
    height, width = map(int, size.split("x"))
    aspect = width / height if f"{width / height:.4f}" == aspect else float(aspect)
    maps = append_view_plane(torch.full((2, 3, height, width), 7.0), aspect)
    assert torch.equal(maps[:, :3], torch.full((2, 3, height, width), 7.0)) and torch.equal(maps[0], maps[1])
    check("Pi3X view plane", maps[0, 3:].permute(1, 2, 0), UNITS[f"uv/{name}"], 1e-6, relative=True)


def test_norm_eps():
    """A block on small activations, where 1e-5 in the place of 1e-6 or the reverse would show."""
    weights = prefixed(UNITS, "blockeps/w/")
    hidden, dim = weights["mlp.fc1.weight"].shape
    block = Block(dim, hidden, scale=True, qk_norm=True)
    block.load_state_dict(weights)
    table = rope_table(UNITS["blockeps/pos_yx"], torch.float32)[:, :, None]
    check("Pi3X block, tiny activations", block(UNITS["blockeps/x"], table), UNITS["blockeps/out"], 1e-5, relative=True)


def test_intrinsics():
    """The free principal point (intr/K_free) is left out of pi3x.py."""
    check("Pi3X intrinsics", focal_from_rays(UNITS["intr/rays_d"]), UNITS["intr/K_centered"], 5e-6, relative=True)
    intrinsics = torch.tensor([[[50.0, 0, 20.5], [0, 40, 9.5], [0, 0, 1]], [[30.0, 0, 20.5], [0, 90, 9.5], [0, 0, 1]]])
    v, u = torch.meshgrid(torch.arange(20.0), torch.arange(42.0), indexing="ij")
    depth = 1 + torch.rand(2, 20, 42, 1, generator=torch.Generator().manual_seed(0))
    points = depth * (torch.stack([u, v, torch.ones_like(u)], dim=-1) @ intrinsics.inverse().mT[:, None])
    check("Pi3X intrinsics", focal_from_rays(points), intrinsics, 5e-6, relative=True)  # those of a pinhole come back


# --------------------------------------------------------------------------------------------------------- properties


def test_pictures_have_no_order(network):
    images = pictures(tensors(GEOMETRY / "pi3x_n3.safetensors"))
    order = torch.arange(images.shape[1]).roll(1)
    straight, mixed = network(images), network(images[:, order])
    for name in COMPARED:
        expected = getattr(straight, name)
        expected = expected if name == "metric" else expected[:, order]
        check("Pi3X reordered pictures", getattr(mixed, name), expected, 1e-5, relative=True)
    alone = network(images[:, :1]).local_points
    assert (alone - straight.local_points[:, :1]).abs().max() > 1e-3  # the pictures do see each other


def test_sets_do_not_mix(network):
    first = pictures(tensors(GEOMETRY / "pi3x_n3.safetensors"))
    second = first.flip(-1).roll(1, dims=1)
    second[:, 0] = second[:, 1]
    both, apart = network(torch.cat([first, second])), [network(first), network(second)]
    for name in COMPARED:
        expected = torch.cat([getattr(prediction, name) for prediction in apart])
        check("Pi3X two sets at once", getattr(both, name), expected, 1e-5, relative=True)


def test_outputs_agree(network):
    """World points are the local ones moved by the pose, rays point at them, and depth can't overflow."""
    images = pictures(tensors(GEOMETRY / "pi3x_n3.safetensors"))
    prediction = network(images)
    local = F.pad(prediction.local_points, (0, 1), value=1.0)
    world = torch.einsum("bnij,bnhwj->bnhwi", prediction.c2w, local)
    check("Pi3X points by pose", world, F.pad(prediction.points, (0, 1), value=1.0), 5e-6, relative=True)
    check("Pi3X rays by points", F.normalize(prediction.local_points, dim=-1), prediction.rays, 1e-6)

    other = load_pi3x(WEIGHTS)
    other.point_head.output_block[1][2].bias += 1000
    far = other(images)
    expected = far.metric.double() * torch.tensor(15.0).exp().double()
    check("Pi3X largest depth", far.local_points[..., 2].double() / expected, torch.ones(far.rays.shape[:-1]), 1e-6)


def test_bf16(network):
    """Products in bf16 with fp32 norms, residuals and heads: fp32 outputs, near those of the fp32 network."""
    images = pictures(tensors(GEOMETRY / "pi3x_n1.safetensors"))
    coarse = load_pi3x(WEIGHTS, dtype=torch.bfloat16)
    kept = {name for name, tensor in coarse.state_dict().items() if tensor.dtype == torch.float32}
    assert {"image_std", "register_token", "encoder.norm.weight", "decoder.0.ls1.gamma", "decoder.0.attn.q_norm.bias",
            "point_head.upsample_blocks.0.0.0.weight", "metric_head.bias", "camera_head.fc_t.weight"} <= kept
    assert not any(part in name for name in kept for part in ("qkv", "proj", "fc1", "fc2", "linear_out"))
    expected, actual = network(images), coarse(images)
    for name in COMPARED:
        reference, result = getattr(expected, name), getattr(actual, name)
        assert result.dtype == torch.float32
        assert 0 < (result - reference).abs().max() < 0.05 * reference.abs().max(), name


@pytest.mark.parametrize(
    "shape", [(3, 28, 28), (1, 3, 28, 28), (1, 1, 4, 28, 28), (1, 0, 3, 28, 28), (1, 1, 3, 30, 28), (1, 1, 3, 28, 0)]
)
def test_wrong_pictures_are_named(network, shape):
    with pytest.raises(ValueError, match="images are .*multiples of 14"):
        network(torch.zeros(shape))


# ------------------------------------------------------------------------------------------------- names and loading

FULL = {  # prefix -> numbers, of the released model
    "register_token": 5_120, "metric_token": 2_048, "image_": 6, "encoder.": 304_371_712, "decoder.": 453_547_008,
    "point_decoder.": 66_128_896, "conf_decoder.": 66_128_896, "camera_decoder.": 65_604_096,
    "metric_decoder.": 18_127_872, "metric_head.": 513, "camera_head.": 2_107_404,
    "point_head.": 8_230_435, "conf_head.": 8_211_329,
}


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        shapes = shapes_of(Pi3X(Pi3XConfig()).state_dict())
    assert len(shapes) == 1437 and sum(map(prod, shapes.values())) == 992_465_335
    for prefix, numbers in FULL.items():
        assert sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) == numbers, prefix
    for name, shape in {
        "image_mean": [1, 3, 1, 1],
        "encoder.pos_embed": [1, 1370, 1024],
        "encoder.register_tokens": [1, 4, 1024],
        "encoder.blocks.23.ls2.gamma": [1024],
        "decoder.35.attn.k_norm.bias": [64],
        "camera_decoder.linear_out.weight": [512, 1024],
        "metric_decoder.blocks.4.cross_attn.v_proj.weight": [512, 512],
        "metric_decoder.projects_y.weight": [512, 2048],
        "camera_head.res_conv.1.res_conv3.weight": [512, 512],
        "camera_head.more_mlps.2.weight": [512, 512],
        "point_head.upsample_blocks.0.0.0.weight": [1026, 256, 2, 2],
        "point_head.upsample_blocks.2.2.layers.2.weight": [128, 64, 3, 3],
        "point_head.output_block.1.2.weight": [1, 32, 1, 1],
        "conf_head.output_block.0.0.weight": [32, 66, 3, 3],
    }.items():
        assert shapes[name] == shape
    assert Pi3XConfig.from_shapes(shapes) == Pi3XConfig()


def test_sizes_come_from_the_shapes(network):
    """No two sizes alike: each is found again, and the network built with them runs on any mixture."""
    config = Pi3XConfig(
        dim=192, grid=5, registers=3, specials=2,
        encoder_blocks=1, encoder_hidden=48, decoder_blocks=3, decoder_hidden=80,
        point=Branch(64, 2, 32, 24), conf=Branch(128, 3, 16, 40),
        camera=Branch(192, 4, 56, 72), metric=Branch(128, 1, 96, 8),
        point_head=((48, 1), (32, 0), (16, 3)), conf_head=((16, 2), (64, 1), (32, 1)),
    )
    other = Pi3X(config)
    assert Pi3XConfig.from_shapes(shapes_of(other.state_dict())) == config
    prediction = other(torch.rand(2, 2, 3, 42, 28))
    assert prediction.points.shape == (2, 2, 42, 28, 3) and prediction.points.isfinite().all()
    assert prediction.confidence.shape == (2, 2, 42, 28) and prediction.c2w.shape == (2, 2, 4, 4)
    assert Pi3XConfig.from_shapes(shapes_of(network.state_dict())) == network.config


def test_multimodal_tensors_are_skipped(network, tmp_path):
    images = pictures(tensors(GEOMETRY / "pi3x_n3.safetensors"))
    keys = ("depth_encoder.blocks.0.norm1.weight", "depth_emb", "ray_embed.proj.bias", "pose_inject_blk.0.norm.bias")
    save_file(tensors(WEIGHTS) | {key: torch.zeros(2) for key in keys}, tmp_path / "with.safetensors")
    assert torch.equal(load_pi3x(tmp_path / "with.safetensors")(images).points, network(images).points)


DIM, PLACES = tensors(WEIGHTS)["encoder.norm.weight"].numel(), tensors(WEIGHTS)["encoder.pos_embed"].shape[1]
LAST = max(int(key.split(".")[1]) for key in tensors(WEIGHTS) if key.startswith("decoder."))


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        ("encoder.mask_token", torch.zeros(2), "unexpected encoder.mask_token"),
        (f"decoder.{LAST + 1}.norm1.weight", torch.zeros(DIM), f"missing decoder.{LAST + 1}.norm1.bias"),
        ("camera_head.fc_t.bias", None, "missing camera_head.fc_t.bias"),
        ("image_std", torch.ones(3), r"image_std has shape \[3\], expected \[1, 3, 1, 1\]"),
        ("encoder.pos_embed", torch.zeros(1, PLACES + 1, DIM),
         rf"encoder.pos_embed has shape \[1, {PLACES + 1}, {DIM}\], expected \[1"),
        ("encoder.pos_embed", None, "encoder.pos_embed is missing"),
        ("encoder.norm.weight", torch.zeros(96), r"encoder.norm.weight has shape \[96\], expected a .* multiple of 64"),
        ("register_token", torch.zeros(DIM), rf"register_token has shape \[{DIM}\]"),
        ("decoder.1.mlp.fc1.weight", None, "decoder.1.mlp.fc1.weight is missing"),
        ("metric_decoder.blocks.0.mlp.fc1.weight", torch.zeros(DIM, 0), "metric_decoder.*fc1.weight has shape"),
        ("conf_head.upsample_blocks.1.0.0.weight", torch.zeros(34, 8, 2, 2), "conf_head.*1.0.0.weight has shape"),
        ("conf_head.upsample_blocks.7.0.0.weight", torch.zeros(34, 8, 2, 2), "conf_head.*3.0.0.weight is missing"),
        ("point_head.upsample_blocks.x", torch.zeros(1), "point_head.*3.0.0.weight is missing"),
        ("encoder.register_tokens", torch.zeros(1, 4, 64), "encoder.register_tokens has shape"),
    ],
)
def test_misfits_are_named(tmp_path, key, tensor, message):
    state = tensors(WEIGHTS)
    if tensor is None:
        del state[key]
    else:
        state[key] = tensor
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_pi3x(tmp_path / "model.safetensors")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_broken_files_are_named(tmp_path):
    whole = WEIGHTS.read_bytes()
    for name, content in (("short", whole[:-1000]), ("header", whole[:500]), ("empty", b""), ("other", b"no tensors")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors: not a complete safetensors file"):
            load_pi3x(path)
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load_pi3x(tmp_path / "gone.safetensors")
