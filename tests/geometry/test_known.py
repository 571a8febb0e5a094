"""What Pi3X is told besides pictures, against numbers that the public code gave once at a small size."""

from dataclasses import replace

import pytest
import torch
from goldens import GEOMETRY, check, prefixed, tensors
from safetensors.torch import save_file
from told import CONFIG, small_pi3x

from geometry.known import Known
from geometry.pi3x import Pi3X, load_pi3x

GOLDEN = tensors(GEOMETRY / "pi3x_known.safetensors")
CASES = sorted({key.split("/")[0] for key in GOLDEN if "/out/" in key})


@pytest.fixture(scope="module")
def network() -> Pi3X:
    return small_pi3x()


def known_of(case: str) -> Known:
    given = {key: value.bool() if key.startswith("has") else value for key, value in
             prefixed(GOLDEN, f"{case}/in/").items()}
    return Known(**given)


@pytest.mark.parametrize("case", CASES)
def test_golden(network, case):
    prediction = network(GOLDEN["images"], known_of(case))
    for name, expected in prefixed(GOLDEN, f"{case}/out/").items():
        check("Pi3X told poses, rays, depth", getattr(prediction, name), expected, 2e-5, relative=True)


def test_poses_are_relative_and_have_no_unit(network):
    known = known_of("poses")
    moved = torch.eye(4)
    moved[:3, :3], moved[:3, 3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), torch.tensor([3.0, 1, -2])
    c2w = moved @ known.c2w
    c2w[..., :3, 3] *= 7
    same, other = (network(GOLDEN["images"], each).c2w for each in (known, replace(known, c2w=c2w)))
    assert torch.allclose(same, other, atol=1e-5)
    assert not torch.allclose(same, network(GOLDEN["images"]).c2w, atol=1e-3)


def test_one_pose_says_nothing(network):
    alone = replace(known_of("poses"), has_pose=torch.tensor([[False, True, False]]))
    assert torch.equal(network(GOLDEN["images"], alone).points, network(GOLDEN["images"]).points)


def test_only_what_is_asked_for_is_read(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    full, poses, plain = (load_pi3x(tmp_path / "model.safetensors", given=given)
                          for given in (CONFIG.given, ("poses",), ()))
    assert torch.equal(full(GOLDEN["images"], known_of("all")).points, network(GOLDEN["images"], known_of("all")).points)
    assert not any(key.startswith(("depth_e", "ray_e")) for key in poses.state_dict())
    assert torch.equal(poses(GOLDEN["images"], known_of("poses")).c2w, full(GOLDEN["images"], known_of("poses")).c2w)
    with pytest.raises(ValueError, match="loaded without what it takes to be told poses"):
        plain(GOLDEN["images"], known_of("poses"))
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"no pose_inject_blk\.\* tensors: this network cannot be told poses"):
        load_pi3x(tmp_path / "plain.safetensors", given=("poses",))
    broken = {key: value for key, value in network.state_dict().items() if key != "pose_inject_blk.1.norm1.bias"}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="missing pose_inject_blk.1.norm1.bias"):
        load_pi3x(tmp_path / "broken.safetensors", given=("poses",))
