"""What sample.py refuses: one line, exit status 2, and no file made or changed."""

import json
import shutil

import numpy as np
import pytest
from goldens import DISTILLED, HELIOS, INPUTS
from sampling import LED, LONG, LORA, PI3X, WEIGHTS, refused


@pytest.mark.parametrize("words, parts", [
    (LED + ["--size", "64x100"], ["64x100", "64"]),
    (LED + ["--set", "keyframes=2", "--depth", "depth.npy"], ["keyframes", "Pi3X"]),
    (["--image", "image.png", "--lora", str(HELIOS / "lora_prefix.safetensors")], ["--lora", "needs a camera"]),
    (["--image", "image.png", "--warp", "warp.npy", "--frames", str(LONG + 1)], ["warp.npy", str(LONG), str(LONG + 1)]),
    (LED + ["--set", "latents=out.mp4"], ["out.mp4", ".safetensors"]),
    (["--image", "image.png", "--warp", "warp.npy", "out.mp4", "--out", "out.mp4"], ["out.mp4"]),
    (LED + ["--set", "fov=0"], ["--set", "fov is 0.0"]),
    (LED + ["--set", "geometry=none.safetensors"], ["none.safetensors"]),
    (LED + ["--set", f"geometry={LORA}"], ["lora_prefix", "missing"]),
    (LED + PI3X + ["--set", "keyframes=0"], ["keyframes"]),
    (LED + PI3X + ["--set", "known_poses=true"], ["pi3x_weights", "no pose_inject_blk.* tensors", "cannot be told poses"]),
    (LED + PI3X + ["--set", "known_poses=true", "keyframes=1"], ["--set known_poses", "keyframes=2 or more"]),
    (LED + PI3X + ["--set", "keyframe_choice=covering", "keyframes=2"], ["--set keyframe_choice", "keyframes=3 or more"]),
    (LED + PI3X + ["--set", "keyframe_choice=nearest"], ["keyframe_choice", "latest or covering"]),
    (LED + ["--set", "known_poses=true"], ["--set known_poses: there is no Pi3X here"]),
    (LED + ["--set", "keyframe_choice=covering", "--depth", "depth.npy"], ["--set keyframe_choice: Pi3X is not used"]),
    (["--video", "warp.npy", "--move", "hold", "--set", "known_poses=true"], ["--set known_poses: needs --image"]),
    (["--image", "image.png", "--poses", "mask.npy"], ["mask.npy", "expected [T,4,4]"]),
])
def test_bad_words(capsys, place, words, parts):
    """What the line says beyond the name; all else that is bad is in test_bad_words.py."""
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


@pytest.mark.parametrize("setting, needs", [
    ("zero_star=true", "guidance above 1"), ("zero_steps=2", "guidance above 1 and zero_star=true"),
])
def test_settings_without_what_they_work_on_are_refused(capsys, place, setting, needs):
    refused(capsys, place, ["--set", setting], f"--set {setting.partition('=')[0]}: needs {needs}")


@pytest.mark.parametrize("name", ["restart=true", "video_noise=false", "image_noise=true", "image_sigma=0.1,0.2"])
def test_settings_of_pictures_and_clips_are_refused_without_one(capsys, place, name):
    setting = f"--set {name.partition('=')[0]}: needs"
    refused(capsys, place, ["--set", name], setting)
    if name.startswith("image_sigma"):
        refused(capsys, place, ["--image", "image.png", "--set", name], setting, "image_noise=true")
    if name in ("restart=true", "video_noise=false"):
        refused(capsys, place, ["--video", "warp.npy", "--move", "hold", "--set", name], setting, "continued")


def test_bad_poses(capsys, place):
    """All that can be wrong with a path's file is in geometry/test_bad_paths.py."""
    c2w = np.tile(np.eye(4), (33, 1, 1))
    c2w[7, 0, 3] = np.nan
    (place / "bad.json").write_text(json.dumps({"c2w": c2w.tolist()}))
    refused(capsys, place, ["--image", "image.png", "--poses", "bad.json"], "bad.json", "frame 7")


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
