"""The splat renderer: first-frame geometry + camera poses -> warped frames + visibility.

The video model is conditioned on how the first frame would look from the new cameras (pseudo-history). Here are dense
samples of the surface that geometry/surface.py makes of Pi3X's points or a depth map, the z-buffer splat and the
filling of pinholes: the same 8-bit frames as the official CPU renderer, on CPU and CUDA, deterministic. As a program
it previews a camera path. Left out: several keyframes and their background, which are in memory.py. Conventions:
camera-to-world, OpenCV axes (x right, y down, z forward), pixel centres at integers, K in pixels.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from files.cli import check_frames, existing, given_path, parse_size, run_program
from files.draw import contact_sheet, evenly_spaced, plan, save_ply, save_png
from files.media import fit_image, load_image, resize_frame, tell_shape, to_frames, to_u8
from files.video import VideoWriter, try_encoder
from files.writing import beside, check_outputs, replacing
from geometry.camera import VERBS, CameraPath, describe, hold, inverse, normalize, product, retime, scale_translation
from geometry.pi3x import find_pi3x, load_pi3x
from geometry.scene import choose_unit, describe_visible, given_scene, known_lens, read_path
from geometry.surface import (
    MIN_CONFIDENCE,
    Geometry,
    NoSurface,
    ensure_valid,
    estimate,
    keep_confident,
    look_up,
    max_pool,
    mesh_break,
    resize,
    stretch,
    transform,
    unproject,
    with_lens,
    zoomed,
)

NEAR = 1e-4
NOTHING, LOW_32 = 2**63 - 1, 2**32 - 1  # z-buffer entry of a pixel without a sample; the bits of the index
FILLS = ("mean", "smooth", "black")  # of what a warp does not show
Backdrop = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # c2w, K -> rgb [H,W,3] uint8, where it is known [H,W]


@dataclass(frozen=True)
class Warp:
    frames: Tensor  # [1, 3, T, H, W] in [-1, 1], at video size
    visible: Tensor  # [1, 1, T, H, W] in [0, 1]


@dataclass(frozen=True)
class RenderSettings:
    samples: int = 4  # per quad axis
    mesh_break: bool = True  # tear the surface at depth edges
    hole_radius: int = 1  # 0: the plain splat
    min_neighbors: int = 4
    mean_fill: bool = True  # invisible pixels get the source's mean colour, else black


@dataclass(frozen=True)
class Samples:
    """Surface points to splat; of equally deep ones the last wins."""

    xyz: Tensor  # [3, N] world
    rgb: Tensor  # [N, 3] uint8
    xy: Tensor  # [N, 2] source pixel


def components(mask: Tensor) -> Tensor:
    """Label the 8-connected components of [H,W] with their first pixel's index; H*W outside.

    Each round joins every component to the lowest one it touches, then follows the links to their ends: few rounds,
    however long and winding a component is.
    """
    outside = mask.numel()
    index = torch.arange(outside + 1, device=mask.device)
    label = torch.where(mask, index[:-1].view_as(mask), outside)
    exact = torch.float32 if outside <= 2**24 else torch.float64  # there is no integer pooling on CUDA
    while True:
        lowest = -max_pool(-label.to(exact), 3).long()
        link = index.scatter_reduce(0, label.flatten(), lowest.flatten(), "amin")
        link[outside] = outside
        while not torch.equal(link, further := link[link]):
            link = further
        joined = link[label]
        if torch.equal(joined, label):
            return label
        label = joined


def fill_top(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Large unknown regions that reach the top row become a far plane -> points [H,W,3], valid, filled [H,W] bool.

    Kept for parity: validity is judged anew from confidence, so pixels that the edge filter removed are valid again.
    """
    points, depth = geometry.points.clone(), geometry.depth
    valid = (geometry.confidence > MIN_CONFIDENCE) & points.isfinite().all(-1) & geometry.has_depth()
    filled = torch.zeros_like(valid)
    if not valid.any():
        return points, valid, filled
    far = depth[valid].quantile(0.98)
    labels = components(~valid)
    areas = labels.flatten().bincount(minlength=labels.numel() + 1)
    top = labels[0].unique()
    for label in top[(areas[top] >= 1024) & (top < labels.numel())]:
        region = labels == label
        ring = depth[(max_pool(region.float(), 17) > 0) & ~region & valid]
        ring = ring[ring > 0]
        plane = torch.maximum(ring.quantile(0.95), far) if len(ring) >= 128 else far
        points = torch.where(region[..., None], unproject(plane.expand_as(depth), geometry.K, geometry.c2w), points)
        filled = filled | region
        valid = valid | region
    return points, valid, filled


def find_quads(points: Tensor, depth: Tensor, valid: Tensor, filled: Tensor, tear: bool) -> Tensor:
    """Top-left corners (flat indices [Q], row-major) of the 2x2 pixel quads that make up the surface.

    Kept for parity: under the far plane `depth` is still the unknown original, which may tear holes in it.
    """
    if tear:
        valid = valid & ~mesh_break(points, depth, valid)
    masks = torch.stack([valid, filled & valid]).unfold(1, 2, 1).unfold(2, 2, 1)
    whole, far = masks.flatten(-2)  # [H-1, W-1, 4]
    quads = whole.all(-1) & (far.all(-1) | ~far.any(-1))  # none between the scene and the far plane
    rows, columns = quads.nonzero(as_tuple=True)
    return rows * valid.shape[1] + columns


def sample_quads(points: Tensor, rgb: Tensor, quads: Tensor, samples: int) -> Samples:
    """Blend the corners of each quad at samples x samples places: place-major, quads row-major within.

    Kept for parity: colours are truncated to 8 bit, not rounded.
    """
    width = points.shape[1]
    values = torch.cat([points.flatten(0, 1), rgb.flatten(0, 1).float()], dim=1)  # [H*W, 6]
    steps = (torch.arange(samples, device=quads.device) + 0.5) / samples
    v, u = steps.repeat_interleave(samples)[:, None], steps.repeat(samples)[:, None]  # [S*S, 1]
    weights = ((1 - v) * (1 - u), v * (1 - u), v * u, (1 - v) * u)  # around the quad: the order decides the last bit
    corners = [values[quads + offset].T.contiguous() for offset in (0, width, width + 1, 1)]  # [6, Q]
    products = (weight * corner[:, None] for weight, corner in zip(weights, corners))  # [6, S*S, Q]
    xyz, color = sum(products, next(products)).split(3)
    xy = torch.stack([quads % width + u, quads // width + v], dim=-1)  # [S*S, Q, 2]
    return Samples(xyz.flatten(1), rearrange(color.to(torch.uint8), "c s q -> (s q) c").contiguous(), xy.flatten(0, 1))


def own_surface(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """What `fill_top` returns, of the valid pixels alone: nothing is filled."""
    valid = geometry.valid & geometry.points.isfinite().all(-1)
    return geometry.points, valid, torch.zeros_like(valid)


def surface_samples(geometry: Geometry, settings: RenderSettings, top_fill: bool = True) -> Samples:
    """Samples of the surface. If it has no quad, tries again with the most confident 20, 50, 100 % of the pixels, each
    as the settings say and then untorn, as the official renderer does. Raises NoSurface if nothing can be rendered."""
    for percent in (None, 20, 50, 100):
        candidate = geometry if percent is None else keep_confident(geometry, percent)
        points, valid, filled = fill_top(candidate) if top_fill else own_surface(candidate)
        for tear in (settings.mesh_break,) if percent is None else (settings.mesh_break, False):
            quads = find_quads(points, candidate.depth, valid, filled, tear)
            if len(quads):
                return sample_quads(points, geometry.rgb, quads, settings.samples)
    raise NoSurface("no surface to render: no 2x2 pixels of the source frame have positive finite depths")


def splat(samples: Samples, c2w: Tensor, K: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest sample of every pixel of a camera -> rgb [H,W,3] uint8, source xy [H,W,2], visible [H,W] bool.

    `c2w` and `K` are on the CPU. Pixels without a sample have colour 0 and xy -1. The z-buffer entry is (bits of z,
    inverted index), so one scatter-minimum gives the nearest sample and, at equal depth, the last one, on every device.
    """
    height, width = size
    (fx, _, cx), (_, fy, cy), _ = K.tolist()
    w2c = inverse(c2w)
    row = width + 2  # the picture has a margin of a pixel all around, where all goes that is not in it
    buffer = torch.full(((height + 2) * row,), NOTHING, device=samples.xyz.device)
    first, block = 0, 2**16 if buffer.device.type == "cpu" else 2**20  # that stay in the cache; elsewhere few launches
    for x, y, z in samples.xyz.split(block, dim=1):
        x, y, z = transform(w2c, x, y, z)
        u = x.div_(z).mul_(fx).add_(cx).round_().clamp_(-1, width)
        v = y.div_(z).mul_(fy).add_(cy).round_().clamp_(-1, height)
        pixel = v.mul_(row).add_(u).add_(row + 1)
        pixel = torch.where((z > NEAR) & (z < torch.inf), pixel, 0).long()
        rank = torch.arange(LOW_32 - first, LOW_32 - first - len(z), -1, device=z.device)
        buffer.scatter_reduce_(0, pixel, z.view(torch.int32).long().bitwise_left_shift_(32).add_(rank), "amin")
        first += len(z)
    nearest = buffer.view(height + 2, row)[1:-1, 1:-1].flatten()
    visible = nearest != NOTHING
    winner = LOW_32 - (nearest & LOW_32)  # 0 where there is nothing
    rgb = samples.rgb.index_select(0, winner).mul_(visible[:, None])
    xy = samples.xy.index_select(0, winner).masked_fill_(~visible[:, None], -1.0)
    return rgb.view(height, width, 3), xy.view(height, width, 2), visible.view(height, width)


def box_sums(planes: Tensor, radius: int) -> Tensor:
    """Sums [C,H,W] of the squares around each pixel, added up in avg_pool2d's order, at several times its speed."""
    side, (height, width) = 2 * radius + 1, planes.shape[1:]
    padded = F.pad(planes, (radius,) * 4)
    shifted = (padded[:, y:y + height, x:x + width] for y in range(side) for x in range(side))
    total = next(shifted).clone()
    for each in shifted:
        total += each
    return total.div_(side**2).mul_(side**2)  # kept for parity: sums from means, not quite whole


def fill_holes(rgb: Tensor, xy: Tensor, visible: Tensor, source: Tensor, radius: int,
               min_neighbors: int) -> tuple[Tensor, Tensor]:
    """Give an invisible pixel with enough visible neighbours the source colour at their mean source position.

    `source` is [1,3,H,W] in 0..1. Returns new rgb [H,W,3] and visible [H,W]; one pass, from the splat alone.
    """
    height, width = visible.shape
    seen = torch.stack([*xy.unbind(-1), torch.ones_like(xy[..., 0])]).mul_(visible)  # x, y, 1
    x, y, count = box_sums(seen, radius)
    x, y = x / count, y / count
    hole = ~visible & (count >= min_neighbors) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return rgb.index_put((hole,), to_u8(look_up(source[0], x[hole], y[hole])).T), visible | hole


def compose(rgb: Tensor, visible: Tensor, background: Tensor) -> Tensor:
    """Put `background` (a colour [3] or a picture [H,W,3], uint8) where nothing is visible."""
    return rgb * visible[..., None] + background * ~visible[..., None]


def render_samples(samples: Samples, source: Geometry, poses: Tensor, settings: RenderSettings, intrinsics: Tensor,
                   backdrop: Backdrop | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The frames of `render_frames`, from samples that need not all be of `source`, whose camera and picture lead.
    Pixels that no sample reaches show the `backdrop` and count as visible, where it is known."""
    poses, intrinsics, source_pose = poses.cpu(), intrinsics.cpu(), source.c2w.cpu()  # a device would stall every frame
    mean = (source.rgb.sum((0, 1)).cpu().double() / source.valid.numel()).round().to(source.rgb)
    fill = mean if settings.mean_fill else torch.zeros_like(mean)
    picture = rearrange(source.rgb, "h w c -> 1 c h w") / 255
    yield source.rgb, torch.ones_like(source.valid)
    for pose, K in zip(poses[1:], intrinsics[1:]):
        c2w = product(source_pose, pose)
        rgb, xy, visible = splat(samples, c2w, K, source.size)
        if settings.hole_radius:
            rgb, visible = fill_holes(rgb, xy, visible, picture, settings.hole_radius, settings.min_neighbors)
        if backdrop is not None:
            behind, known = backdrop(c2w, K)
            rgb, visible = compose(rgb, visible, behind), visible | known
        yield compose(rgb, visible, fill), visible


def render_frames(
    geometry: Geometry, poses: Tensor, settings: RenderSettings = RenderSettings(), intrinsics: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Frame by frame: rgb [H,W,3] uint8 and visible [H,W] bool at the geometry's size.

    `poses` [T,4,4] are relative to the geometry's camera, translations in its unit. Frame 0 is the source picture,
    whatever its pose. `intrinsics` [T,3,3] are target cameras; if the first is not the geometry's, the points are
    rebuilt from the depth with it.
    """
    if intrinsics is None:
        intrinsics = geometry.K.expand(len(poses), 3, 3)
    elif not torch.allclose(intrinsics[0].cpu(), geometry.K.cpu(), rtol=1e-5, atol=1e-4):
        points = unproject(geometry.depth, intrinsics[0], geometry.c2w)
        geometry = replace(geometry, points=points, K=intrinsics[0])
    return render_samples(surface_samples(geometry, settings), geometry, poses, settings, intrinsics)


def to_video(frames: Tensor, visible: Tensor, size: tuple[int, int]) -> Warp:
    """8-bit frames [T,h,w,3] and masks [T,h,w] -> `Warp` at the video size (H, W)."""
    video = resize(rearrange(frames, "t h w c -> t c h w") / 255, size) * 2 - 1
    mask = resize(visible[:, None].float(), size).clamp(0, 1)
    return Warp(rearrange(video, "t c h w -> 1 c t h w"), rearrange(mask, "t 1 h w -> 1 1 t h w"))


def collect(frames: Iterator[tuple[Tensor, Tensor]], size: tuple[int, int]) -> Warp:
    """Rendered (rgb, visible) one after the other -> `Warp` at the video size (H, W)."""
    parts = [to_video(rgb[None], visible[None], size) for rgb, visible in frames]
    return Warp(*(torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("frames", "visible")))


def render(geometry: Geometry, poses: Tensor, size: tuple[int, int], settings: RenderSettings = RenderSettings(),
           intrinsics: Tensor | None = None) -> Warp:
    """All frames of `render_frames` at the video size (H, W)."""
    return collect(render_frames(geometry, poses, settings, intrinsics), size)


def smooth_fill(frames: Tensor, visible: Tensor) -> Tensor:
    """Frames [1, 3, T, H, W] whose invisible pixels continue what is around them; `visible` [1, 1, T, H, W].

    Averages of visible pixels alone, from fine to coarse, until nothing is unknown; on the way back what is known stays
    and the rest is the coarser level, enlarged. Each frame by itself. Ours, not the paper's.
    """
    def fill(color: Tensor, known: Tensor) -> Tensor:
        if known.all() or max(color.shape[-2:]) == 1:
            return color * known
        share = F.avg_pool2d(known.to(color), 2, ceil_mode=True)
        mean = F.avg_pool2d(color * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
        coarse = fill(mean, share > 0)
        return torch.where(known, color, F.interpolate(coarse, color.shape[-2:], mode="bilinear", align_corners=False))

    known = visible > 0.999  # a mask that was resized has half-visible edges
    each = zip(frames.unbind(2), known.unbind(2))  # one frame stays in the cache: half the time of all at once
    return torch.stack([fill(frame, mask) for frame, mask in each], dim=2)


def fill_warp(warp: Warp, fill: str) -> Warp:
    """The warp with its holes filled: "mean" leaves what is painted there, officially the picture's mean colour. The
    mask stays as it is: filled pixels count as invisible."""
    if fill == "smooth":
        return replace(warp, frames=smooth_fill(warp.frames, warp.visible))
    if fill == "black":
        return replace(warp, frames=torch.where(warp.visible > 0.999, warp.frames, -1.0))
    return warp


def make_warp(frames: np.ndarray, mask: np.ndarray | None, size: tuple[int, int]) -> Warp:
    """A warp from pictures: `frames` [T, h, w, 3] uint8; `mask` [T', h', w'] in 0..1, None for all visible. Resized
    as the official code does it: frames with Pillow's bilinear filter, the mask trilinearly, so also in time."""
    frames = np.stack([resize_frame(frame, size) for frame in frames])
    video = rearrange(torch.from_numpy(frames), "t h w c -> 1 c t h w") / 255 * 2 - 1
    if mask is None:
        return Warp(video, torch.ones_like(video[:, :1]))
    return Warp(video, resize_volume(torch.from_numpy(mask).float()[None, None], video.shape[2:]))


def resize_volume(x: Tensor, size: torch.Size) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="trilinear", align_corners=False)


def draw_path(geometry: Geometry, poses: Tensor) -> np.ndarray:
    """The scene and a path [T,4,4] in it, both in the picture's camera, from above and from the side: [640,1280,3]
    uint8."""
    w2c = inverse(geometry.c2w)
    points = torch.stack(transform(w2c, *geometry.points[geometry.valid].unbind(-1)), dim=-1).numpy()
    colors, places, headings = geometry.rgb[geometry.valid].numpy(), poses[:, :3, 3].numpy(), poses[:, :3, 2].numpy()
    views = []
    for names, axes, sign in ((("x", "z"), [0, 2], 1), (("z", "-y"), [2, 1], np.array([1, -1]))):
        views.append(plan(points[:, axes] * sign, colors, places[:, axes] * sign, headings[:, axes] * sign, names))
    return np.concatenate(views, axis=1)


def read_fov(text: str | None) -> tuple[float, ...] | None:
    """Degrees, or two with a comma."""
    if text is None:
        return None
    try:
        degrees = tuple(map(float, text.split(",")))
    except ValueError:
        degrees = ()
    if not (1 <= len(degrees) <= 2 and all(1 <= each <= 179 for each in degrees)):
        raise ValueError(f"--fov {text}: expected degrees from 1 to 179, or two with a comma")
    return degrees


def preview_geometry(args: argparse.Namespace, path: CameraPath,
                     size: tuple[int, int]) -> tuple[Geometry, float, str]:
    """The picture's geometry, the length of the path's unit, and where they come from."""
    picture, fov = load_image(args.image), read_fov(args.fov)
    tell_shape(args.image, picture, size)
    file = args.geometry and find_pi3x(args.geometry, args.geometry)
    if file is None:
        return given_scene(picture, path, args.depth, size, fov, args.inverse_depth, args.unit)[1:]
    (geometry,) = estimate(load_pi3x(file), [fit_image(picture, size)])
    K, words = known_lens(picture, path, size, fov)
    if K is not None:
        geometry = with_lens(geometry, stretch(K, size, geometry.size))
    geometry = ensure_valid(geometry)
    return geometry, choose_unit(args.unit or path.unit, geometry), f"Pi3X of {args.geometry}{words}"


def preview(args: argparse.Namespace) -> None:
    """Render the path that the arguments describe; write the warp, its mask, a contact sheet and a top view."""
    size = parse_size(args.size)
    check_frames(args.frames)
    if args.inverse_depth and args.depth is None:
        raise ValueError("--inverse-depth: needs --depth")
    outputs = beside(args.out, mask="_mask.mp4", sheet="_sheet.png", path="_path.png", cloud="_cloud.ply")
    inputs = existing(args.image, args.poses, args.depth, args.geometry)
    check_outputs(outputs, inputs)
    path = read_path(args.poses, args.move)
    path, count, fps = retime(path, args.frames, args.fps, args.resample)
    try_encoder(fps, size)
    geometry, unit, source = preview_geometry(args, path, size)
    poses = normalize(scale_translation(path.c2w, unit), count)
    intrinsics = None if path.zoom is None else zoomed(geometry.K, count, hold(path.zoom, count))
    picks, tiles, shares = set(evenly_spaced(count, 8)), [], []
    with replacing(outputs, inputs) as partial:
        with VideoWriter(partial["video"], fps, size) as video, VideoWriter(partial["mask"], fps, size) as mask:
            for index, (rgb, visible) in enumerate(render_frames(geometry, poses, intrinsics=intrinsics)):
                shares.append(visible.float().mean().item())
                warp = to_video(rgb[None], visible[None], size)
                frame, seen = to_frames(warp.frames)[0], to_u8(warp.visible[0, 0, 0]).numpy()
                video.write(frame)
                mask.write(seen)
                if index in picks:
                    tiles.append((frame, seen))
        save_png(partial["sheet"], contact_sheet(dict(zip(("warp", "mask"), map(np.stack, zip(*tiles))))))
        save_png(partial["path"], draw_path(geometry, poses))
        save_ply(partial["cloud"], geometry.points[geometry.valid].numpy(), geometry.rgb[geometry.valid].numpy())
    print(f"geometry: {source}")
    print(f"camera: {describe(path)}; one unit of it is {unit:.4g} of the geometry's; {count} frames")
    print(describe_visible(shares))
    print("wrote", *outputs.values())


def main(argv: list[str] | None = None) -> int:
    about = "Preview a camera path: warp, mask, contact sheet, top view."
    parser = argparse.ArgumentParser("render.py", usage=argparse.SUPPRESS, description=about)  # one line an error
    parser.register("type", Path, given_path)
    parser.add_argument("--image", type=Path, required=True, help="first frame")
    camera = parser.add_mutually_exclusive_group(required=True)
    camera.add_argument("--poses", type=Path, help="a file of poses or a COLMAP folder (docs/paths.md)")
    camera.add_argument("--move", help=f'such as "forward 1, yaw -20 + up 1, hold"; verbs: {", ".join(VERBS)}, hold')
    geometry = parser.add_mutually_exclusive_group()
    geometry.add_argument("--geometry", type=Path, help="Pi3X weights; without them and without --depth a plane")
    geometry.add_argument("--depth", type=Path, help="depth map of the image: .npy, .npz or 16-bit picture")
    parser.add_argument("--inverse-depth", action="store_true", help="the depth map holds 1 / z")
    parser.add_argument("--fov", help="the picture's horizontal degrees, or 60,38 with the vertical ones"
                        " (default: the path file's, or 55)")
    parser.add_argument("--unit", help="of the path: depth (a tenth of the median depth), 0.2depth, same or meter (the"
                        " depth map's own), or a number of its units (default: the file's, or depth)")
    parser.add_argument("--size", default="384x640", help="video HEIGHTxWIDTH (384x640)")
    parser.add_argument("--frames", type=int, help="cut or pad the path to this many frames")
    parser.add_argument("--fps", type=float, help="frame rate of the video (default: the path file's, or 16)")
    parser.add_argument("--resample", action="store_true", help="stretch the path to --frames or --fps instead")
    parser.add_argument("--out", type=Path, default=Path("warp.mp4"), help="video; the others go beside it (warp.mp4)")
    return run_program("render.py", preview, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
