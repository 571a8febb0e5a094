"""How near a video is to the true one, by torchmetrics: over all pixels, and apart where a mask says visible or not.

Videos are [T, H, W, 3] uint8, masks [T, H, W] bool. PSNR is that of all the pixels of a video together, at most 100;
SSIM (Gaussian window of 1.5 pixels) and LPIPS (AlexNet) are means over frames, of a region the means of their maps.
"""

import sys
from importlib.metadata import version

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

try:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
except ModuleNotFoundError:
    sys.exit('measuring needs the extra "eval": pip install -e ".[eval]"')

from files.measure import flicker, steadiness


def unit(frame: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [1, 3, H, W] in 0..1."""
    return rearrange(torch.from_numpy(frame.copy()), "h w c -> 1 c h w") / 255


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """In dB, of any two equal shapes of uint8."""
    a, b = (torch.from_numpy(each.astype(np.float32)) for each in (frames, truth))
    return min(peak_signal_noise_ratio(a, b, data_range=255.0).item(), 100.0)


def ssim_map(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[T, H, W]."""
    maps = [structural_similarity_index_measure(unit(a), unit(b), data_range=1.0, return_full_image=True)[1]
            for a, b in zip(frames, truth)]
    return torch.cat(maps).mean(1).numpy()


class Perceptual:
    """LPIPS, whose network is loaded once. torchvision fetches AlexNet's weights (233 MB) at first use."""

    def __init__(self):
        """Raises ValueError if the network can't be had."""
        try:
            self.net = LearnedPerceptualImagePatchSimilarity("alex").net
        except (ModuleNotFoundError, OSError, RuntimeError) as error:
            raise ValueError("LPIPS needs torchvision and, at first use, its AlexNet weights from download.pytorch.org"
                             f" ({error}); without them: --lpips off") from None

    @torch.no_grad()
    def map(self, frames: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each frame [T], and where [T, H, W]."""
        means, maps = [], []
        for a, b in zip(frames, truth):
            for spatial, found in ((False, means), (True, maps)):
                self.net.spatial = spatial
                found.append(self.net(unit(a), unit(b), normalize=True)[0, 0])
        return torch.stack(means).flatten().numpy(), torch.stack(maps).numpy()


def measure(frames: np.ndarray, truth: np.ndarray, visible: np.ndarray | None = None,
            perceptual: Perceptual | None = None) -> dict[str, float]:
    """All numbers of a video beside the true one; of visible and other pixels apart if `visible` says which."""
    similar = ssim_map(frames, truth)
    found = {"psnr": psnr(frames, truth), "ssim": float(similar.mean())}
    mean, apart = (None, None) if perceptual is None else perceptual.map(frames, truth)
    if mean is not None:
        found["lpips"] = float(mean.mean())
    for name, mask in {} if visible is None else {"visible": visible, "not visible": ~visible}.items():
        if mask.any():
            found[f"psnr {name}"] = psnr(frames[mask], truth[mask])
            found[f"ssim {name}"] = float(similar[mask].mean())
            if apart is not None and name == "visible":
                found["lpips visible"] = float(apart[mask].mean())
    return found


def steady(frames: np.ndarray) -> dict[str, float]:
    """What needs no truth: drift, jumps between chunks, flicker."""
    return steadiness(frames) | {"flicker": flicker(frames)}


def libraries(perceptual: bool) -> str:
    """What measured, with versions."""
    names = ["torch", "torchmetrics", *(["torchvision"] if perceptual else [])]
    return ", ".join(f"{name} {version(name)}" for name in names)
