"""Contact sheets."""

import numpy as np

from files import draw


def test_contact_sheet():
    assert draw.evenly_spaced(33, 8) == [0, 5, 9, 14, 18, 23, 27, 32]
    assert draw.evenly_spaced(3, 8) == [0, 1, 2]
    levels = np.arange(33, dtype=np.uint8) * 7
    video = np.broadcast_to(levels[:, None, None, None], (33, 20, 40, 3))
    sheet = draw.contact_sheet({"video": video, "mask": video[..., 0]}, columns=4, tile_width=80)
    assert sheet.shape == (4 + 2 * (14 + 40 + 4), 4 + 4 * 84, 3) and sheet.dtype == np.uint8
    for row in (40, 98):
        for column, index in enumerate(draw.evenly_spaced(33, 4)):
            assert (sheet[row, 44 + 84 * column] == levels[index]).all()
    assert (sheet[4:16, :60] < 128).any()  # the label
