"""Errors of predictions as they are read: percent of ratios, decibels, percent of DSSIM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lowtide.quality.surrogate.outputs import METRICS

Floats = NDArray[np.float64]

LEAST_DSSIM = 1e-6  # below, percent say little
COLUMNS = ("CR MAPE %", "median", "p95", "PSNR MAE dB", "p95", "worst", "DSSIM MAPE %", "ac1 MAE",
           "spectral x")  # fmt: skip


def errors(truth: Floats, found: Floats) -> list[float]:
    """Return `COLUMNS` from places on the scales of metrics; NaN where nothing was predicted."""
    with np.errstate(invalid="ignore"):
        gap = found - truth
        is_seen = 10 ** (-2 * truth[:, 2]) > LEAST_DSSIM
        ratio = np.abs(10 ** gap[:, 0] - 1) * 100
        decibels = 20 * np.abs(gap[:, 1])
        dssim = np.abs(10 ** (-2 * gap[is_seen, 2]) - 1) * 100
        correlation = np.abs(np.tanh(found[:, 3]) - np.tanh(truth[:, 3]))
        spectral = 10 ** np.abs(gap[:, 4])
    return [
        _of(ratio, np.mean), _of(ratio, np.median), _of(ratio, _p95), _of(decibels, np.mean),
        _of(decibels, _p95), _of(decibels, np.max), _of(dssim, np.mean),
        _of(correlation, np.mean), _of(spectral, np.mean),
    ]  # fmt: skip


def _p95(values: Floats) -> float:
    return float(np.percentile(values, 95))


def _of(values: Floats, statistic: object) -> float:
    known = values[np.isfinite(values)]
    return float(statistic(known)) if len(known) else np.nan  # type: ignore[operator]


@dataclass
class Board:
    """Results of all seeds.

    Attributes:
        rows: By split and method, one list of `COLUMNS` for each seed.
    """

    rows: dict[tuple[str, str], list[list[float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, split: str, method: str, truth: Floats, found: Floats) -> None:
        """Take up the predictions of one seed."""
        self.rows[split, method].append(errors(truth, found))

    def print(self, console: Console, title: str, names: Sequence[str]) -> None:
        """Print means over seeds, with the range where there are several."""
        table = Table(title=title)
        table.add_column("split")
        table.add_column("method")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        last = ""
        for (split, method), results in sorted(
            self.rows.items(), key=lambda i: names.index(i[0][0])
        ):
            if split != last:
                table.add_section()
            cells = [_cell(np.array(column)) for column in zip(*results, strict=True)]
            table.add_row(split if split != last else "", method, *cells)
            last = split
        console.print(table)


def _cell(values: Floats) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    middle = known.mean()
    digits = 3 if middle < 1 else 2 if middle < 10 else 1 if middle < 100 else 0
    text = f"{middle:.{digits}f}"
    if len(known) > 1:
        text += f" ({known.min():.{digits}f}-{known.max():.{digits}f})"
    return text


def coverage(truth: Floats, found: Floats, widths: Floats) -> dict[str, tuple[float, float]]:
    """Return by metric the share inside of intervals, and the mean width on its scale."""
    result = {}
    for number, name in enumerate(METRICS):
        is_known = np.isfinite(truth[:, number]) & np.isfinite(found[:, number])
        inside = np.abs(found - truth)[is_known, number] <= widths[is_known, number]
        finite = widths[is_known, number][np.isfinite(widths[is_known, number])]
        result[name] = (
            float(inside.mean()) if len(inside) else np.nan,
            2 * float(finite.mean()) if len(finite) else np.inf,
        )
    return result
