"""Numbers of many videos as a Markdown table: means with standard errors, and paired differences from one row.

`Rows` is row -> video -> metric -> value. A mean is over videos; its standard error is that of videos as independent
draws. Differences are taken video by video, over those that both rows have.
"""

import math

import numpy as np

Rows = dict[str, dict[str, dict[str, float]]]
Table = tuple[str, list[str], dict[str, list[str]]]  # corner, columns, name -> cells

TITLES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "R-Err": "R-Err, degrees", "turn": "camera turn, degrees",
          "shift": "camera shift, m", "flicker": "flicker, grey levels"}
DIGITS = {"ssim": 3, "lpips": 3, "T-Err": 3, "sharpness": 3, "ghost": 3, "accuracy": 3, "consistency": 3}


def title(metric: str) -> str:
    first, _, rest = metric.partition(" ")
    return TITLES.get(metric) or f"{TITLES.get(first, first.replace('_', ' '))} {rest}".strip()


def metrics_of(rows: Rows) -> list[str]:
    """All that any video has, in the order of their first appearance."""
    return list(dict.fromkeys(metric for row in rows.values() for values in row.values() for metric in values))


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean of the finite values, and its standard error: nan if there are fewer than two."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not len(known):
        return math.nan, math.nan
    return float(known.mean()), float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else math.nan


def cell(values: list[float], metric: str, signed: bool = False) -> str:
    """Such as "24.31 ± 0.52"; nothing if no value is finite."""
    mean, error = mean_error(values)
    if math.isnan(mean):
        return ""
    digits = DIGITS.get(metric.partition(" ")[0], 2)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def column(row: dict[str, dict[str, float]], metric: str) -> list[float]:
    return [values[metric] for values in row.values() if metric in values]


def differences(row: dict[str, dict[str, float]], other: dict[str, dict[str, float]], metric: str) -> list[float]:
    """Video by video, where both have the metric."""
    return [values[metric] - other[video][metric] for video, values in row.items()
            if metric in values and metric in other.get(video, {})]


def tables(rows: Rows, reference: str | None = None) -> list[Table]:
    """The means of all rows, and every other row's differences from the `reference`."""
    columns = metrics_of(rows)
    found = [("", ["videos", *map(title, columns)], {
        name: [str(len(row)), *(cell(column(row, metric), metric) for metric in columns)]
        for name, row in rows.items()})]
    if reference is not None and len(rows) > 1:
        one, columns = rows[reference], metrics_of({reference: rows[reference]})
        found.append((f"difference from {reference}", [*map(title, columns)], {
            name: [cell(differences(row, one, metric), metric, signed=True) for metric in columns]
            for name, row in rows.items() if name != reference}))
    return found


def grid(corner: str, columns: list[str], lines: dict[str, list[str]]) -> str:
    rows = [[corner, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in lines.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def means(rows: Rows) -> str:
    return grid(*tables(rows)[0])


def markdown(head: list[str], rows: Rows, reference: str | None = None) -> str:
    """The whole page: how it was measured, the means, the differences."""
    parts = "\n".join(f"* {line}" for line in head) + "\n", *(grid(*table) for table in tables(rows, reference))
    return "\n".join(parts)
