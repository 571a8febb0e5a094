"""The surface that a depth map and a field of view give."""

import math

import numpy as np
import pytest
import torch
from goldens import check
from known import picture
from PIL import Image

from geometry import surface
from render import render_frames


def test_a_thumbnail_keeps_the_pictures_colours():
    """Stripes too fine for the video's own size are still on the geometry's surface; at official sizes nothing changes."""
    stripes = np.tile(np.repeat(np.uint8([0, 255]), 3), 64)[None, :, None].repeat(256, 0).repeat(3, 2)
    image, geometry = surface.place(Image.fromarray(stripes), None, 60, (64, 96))
    assert geometry.rgb.float().std() > 90 > 127.5 * image.std()
    image, geometry = surface.place(Image.fromarray(stripes), None, 60, (384, 640))
    assert torch.equal(geometry.rgb, surface.geometry_from_depth(image, torch.ones(1, 1), surface.pinhole(60, 384, 640)).rgb)


def test_geometry_from_depth_is_a_pinhole():
    source = surface.geometry_from_depth(picture(), torch.ones(3, 5) * 2, surface.pinhole(90, 96, 160))
    height, width = source.depth.shape
    assert (height, width) == (238, 406) and source.valid.all()  # a small picture has 98,304 points at most
    check("Geometry from depth", source.K[0], torch.tensor([width / 2, 0, (width - 1) / 2]), 1e-4)
    check("Geometry from depth", source.K[1], torch.tensor([0, height / 2 * 160 / 96, (height - 1) / 2]), 1e-4)
    check("Geometry from depth", source.points[0, 0, 0], torch.tensor(-2 * (width - 1) / width), 1e-5)
    assert (source.points[..., 2] == 2).all() and source.rgb.dtype == torch.uint8


def test_unknown_depth_is_invalid_and_does_not_bleed():
    depth = torch.full((96, 160), 3.0)
    depth[40:60, 50:80] = math.nan
    depth[10:20, 10:20], depth[80:85, 100:120] = -1, math.inf
    source = surface.geometry_from_depth(picture(), depth, surface.pinhole(60, 96, 160))
    check("Geometry from depth", source.depth[source.valid], torch.tensor(3.0).expand(source.valid.sum()), 1e-6)
    share = (~source.valid).float().mean().item()
    assert abs(share - (600 + 100 + 100) / depth.numel()) < 0.005
    assert source.points.isfinite().all()


def test_depth_and_field_of_view_are_cropped_with_the_picture():
    """A wide picture loses its sides: a depth edge stays on its colour edge, at any size of the depth map, and the field
    of view of the whole picture narrows."""
    edge = np.zeros((100, 400, 3), np.uint8)
    edge[:, 170:] = 255
    for rows, columns in ((100, 400), (50, 200), (24, 100)):
        depth = torch.ones(rows, columns)
        depth[:, round(columns * 170 / 400):] = 3
        _, geometry = surface.place(Image.fromarray(edge), depth, 90, (64, 128))
        color = geometry.rgb[200, :, 0] > 127
        place = (geometry.depth[200] > 2).int().argmax() - color.int().argmax()
        assert abs(place) <= 4 * max(1, 200 // columns), f"{rows}x{columns}: {place} pixels apart of {len(color)}"
    width = geometry.depth.shape[1]
    seen = 2 * math.degrees(math.atan(width / 2 / geometry.K[0, 0]))
    assert abs(seen - 2 * math.degrees(math.atan(0.5))) < 0.1  # half the width of 90 degrees


def test_a_depth_map_of_another_shape_is_refused():
    """Padded to a square, or upright for a picture on its side; rounding to the blocks of a network is no other shape."""
    wide = Image.new("RGB", (320, 192))
    for size in ((320, 320), (320, 192)):
        with pytest.raises(ValueError, match="depth map of .* for a picture of 320x192: expected the same shape"):
            surface.place(wide, torch.ones(size), 60, (48, 80))
    for size in ((192, 320), (294, 518), (64, 112)):
        surface.place(wide, torch.ones(size), 60, (48, 80))


def test_both_axes_and_the_middle_of_a_lens():
    """Pixels that are not square, and a principal point beside the middle, through the crop to the video."""
    picture = Image.new("RGB", (400, 100))
    K = surface.crop_lens((0.5, 2.0, 0.4, 0.5), picture, (64, 128))  # half the width is kept
    check("Lens", K, torch.tensor([[128.0, 0, 0.3 * 128 - 0.5], [0, 128.0, 31.5], [0, 0, 1]]), 1e-4)
    check("Lens", surface.crop_lens(90, picture, (100, 400)), surface.pinhole(90, 100, 400), 1e-4)


def test_zoom_is_an_enlargement():
    """Twice the focal length shows the middle of the picture, twice as large."""
    image = Image.fromarray((np.indices((96, 160)).sum(0) % 97 * 2).astype(np.uint8)).convert("RGB")
    _, geometry = surface.place(image, None, 60, (96, 160))
    zoom = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    poses = torch.eye(4).repeat(2, 1, 1)
    intrinsics = surface.zoomed(geometry.K, 2, zoom)
    _, (frame, visible) = render_frames(geometry, poses, intrinsics=intrinsics)
    height, width = geometry.depth.shape
    middle = geometry.rgb[height // 4 : -(height // 4), width // 4 : -(width // 4)].permute(2, 0, 1)[None].float()
    large = surface.resize(middle, (height, width))[0].permute(1, 2, 0)
    assert visible.float().mean() > 0.99 and (frame[visible] - large[visible]).abs().mean() < 6


@pytest.mark.parametrize("height, width", [(4000, 1), (1, 4000), (3000, 80)])
def test_of_a_long_thin_picture_a_row_is_left(height, width):
    """The crop to the video's shape keeps less than one row of the picture, or of its coarse depth map."""
    depth = torch.full((height // 80, 1) if width == 80 else (height, width), 2.0)
    _, geometry = surface.place(Image.new("RGB", (width, height)), depth, 60, (64, 96))
    assert (geometry.depth == 2).all()
