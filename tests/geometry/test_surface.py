"""The surface that a depth map and a field of view give."""

import math

import numpy as np
import torch
from goldens import check
from known import picture
from PIL import Image

from geometry import surface


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
    assert (height, width) == (378, 644) and source.valid.all()  # of 16 points a pixel
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
    for rows, columns in ((100, 400), (50, 200), (10, 400)):
        depth = torch.ones(rows, columns)
        depth[:, round(columns * 170 / 400):] = 3
        _, geometry = surface.place(Image.fromarray(edge), depth, 90, (64, 128))
        color = geometry.rgb[200, :, 0] > 127
        place = (geometry.depth[200] > 2).int().argmax() - color.int().argmax()
        assert abs(place) <= 4, f"{rows}x{columns}: {place} pixels apart of {len(color)}"
    width = geometry.depth.shape[1]
    seen = 2 * math.degrees(math.atan(width / 2 / geometry.K[0, 0]))
    assert abs(seen - 2 * math.degrees(math.atan(0.5))) < 0.1  # half the width of 90 degrees
