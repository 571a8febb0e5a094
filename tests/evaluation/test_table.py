"""Means, errors and paired differences by hand."""

import math

import pytest

from evaluation.table import differences, markdown, mean_error

ROWS = {
    "ours": {"a": {"psnr": 20.0, "lpips": 0.25}, "b": {"psnr": 24.0, "lpips": 0.35}, "c": {"psnr": 31.0}},
    "theirs": {"a": {"psnr": 19.0, "lpips": 0.5}, "b": {"psnr": 22.0, "lpips": 0.5}, "d": {"psnr": 99.0}},
}


def test_mean_and_error():
    assert mean_error([1.0, 3.0, math.nan]) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    assert mean_error([4.0])[0] == 4 and math.isnan(mean_error([4.0])[1])
    assert all(map(math.isnan, mean_error([])))


def test_pairs_are_those_that_both_have():
    assert differences(ROWS["theirs"], ROWS["ours"], "psnr") == [-1, -2]
    assert differences(ROWS["theirs"], ROWS["ours"], "lpips") == pytest.approx([0.25, 0.15])


def test_the_page():
    assert markdown(["33 frames"], ROWS, "ours").splitlines() == [
        "* 33 frames",
        "",
        "|  | videos | PSNR | LPIPS |",
        "| --- | --- | --- | --- |",
        "| ours | 3 | 25.00 ± 3.21 | 0.300 ± 0.050 |",
        "| theirs | 3 | 46.67 ± 26.18 | 0.500 ± 0.000 |",
        "",
        "| difference from ours | PSNR | LPIPS |",
        "| --- | --- | --- |",
        "| theirs | -1.50 ± 0.50 | +0.200 ± 0.050 |",
    ]
