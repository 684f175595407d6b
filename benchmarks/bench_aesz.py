"""`lowtide.aesz` beside `lowtide.sz` and SZ3, on later steps of series of which it learned others.

Models see the first 60 % of the steps of a series, everything is measured on the rest. Four models:
blocks of 32 x 32 with 16 numbers and of 8 x 8 x 8 with 64, each with its linear way alone ("lin":
no epoch of training) and with the network trained for --minutes. All codecs get the same absolute
bounds, r times the range of the measured part; what comes back is checked in float64.

"x/1" and "x/100": the best model's ratio with its file counted, if that is kept for this one array
or for 100 like it. "eq." is the best model's ratio over that of others at the PSNR that it reached,
interpolated between bounds; there `lowtide.sz` has the goal "psnr". Speeds are MB (1e6 bytes) of
the array per second of processor time, one thread, at r = 1e-2.

    python benchmarks/bench_aesz.py [--edge 128] [--steps 160] [--series FOLDER] [--minutes 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from aesz_fields import Series, all_series
from bench_compression import CURVE, Result, measured
from compression_rivals import Candidate, ours, sz3
from rich.console import Console
from rich.table import Table

from lowtide.compression import register_model
from lowtide.compression.learned.layers import Architecture
from lowtide.compression.learned.model import Model
from lowtide.compression.learned.training import TrainingOptions, train_model

BOUNDS = (2e-2, 1e-2, 5e-3, 2e-3, 1e-3, 1e-4)
SHARED = 100  # arrays that a model is kept for
MODELS = {
    "2-D": Architecture((32, 32), 16, (8, 16, 32)),
    "3-D": Architecture((8, 8, 8), 64, (8, 16)),
}


@dataclass(frozen=True)
class Learned:
    """A model and what it took."""

    name: str
    model: Model
    train_s: float

    @property
    def codec(self) -> Candidate:
        """The codec with this model; its streams find it by name."""
        return ours("lowtide.aesz", name=self.name, model=register_model(self.model).sha256)


def learned_from(series: Series, minutes: float) -> list[Learned]:
    """Return the four models of a series."""
    found = []
    for name, architecture in MODELS.items():
        for is_deep in (False, True):
            options = TrainingOptions(
                epochs=40 if is_deep else 0, batches=50, time_limit_s=60 * minutes
            )
            begin_s = time.perf_counter()
            model = train_model([series.train], architecture, options)
            train_s = time.perf_counter() - begin_s
            found.append(Learned(f"{name}{'' if is_deep else ' lin'}", model, train_s))
    return found


def at_psnr(codec: Candidate, series: Series, spread: float, psnr_db: float) -> float | None:
    """Return the ratio that a codec needs for a PSNR, or None outside of what was run."""
    key = (codec.name, series.name)
    if key not in _curves:
        points = [measured(codec, series.test, r * spread, 1) for r in CURVE]
        _curves[key] = [point for point in points if math.isfinite(point.psnr_db)]
    curve = _curves[key]
    if not curve or not curve[0].psnr_db <= psnr_db <= curve[-1].psnr_db:
        return None
    psnrs, ratios = [c.psnr_db for c in curve], [math.log(c.ratio) for c in curve]
    return math.exp(float(np.interp(psnr_db, psnrs, ratios)))


_curves: dict[tuple[str, str], list[Result]] = {}


def compare(console: Console, series: Series, models: Sequence[Learned]) -> None:
    """Print a series' table, a row for each bound."""
    spread = float(series.test.max()) - float(series.test.min())
    has_sz3 = importlib.util.find_spec("pysz") is not None
    others = [*([sz3(lorenzo=False), sz3(lorenzo=True)] if has_sz3 else []), ours(name="sz")]
    at_equal = [*others[:-1], ours(name="sz psnr", goal="psnr")]
    table = Table(title=f"{series.name}: {series.test.shape}, {series.test.nbytes / 1e6:.1f} MB")
    names = [*(c.name for c in others), *(m.name for m in models), "x/1", f"x/{SHARED}", "PSNR"]
    for column in ("r", *names, *(f"eq. {c.name}" for c in at_equal)):
        table.add_column(column.replace(" lorenzo+reg", " lor"), justify="right")
    for r in BOUNDS:
        results = [
            measured(codec, series.test, r * spread, 1)
            for codec in (*others, *(m.codec for m in models))
        ]
        if any(result.outside for result in results[len(others) - 1 :]):
            raise SystemExit(f"{series.name}, r = {r}: a bound is broken")
        ours_only = results[len(others) :]
        best = max(range(len(models)), key=lambda number: ours_only[number].ratio)
        model_bytes, ratio = models[best].model.stored_bytes, ours_only[best].ratio
        stream_bytes = series.test.nbytes / ratio
        with_model = [series.test.nbytes / (stream_bytes + model_bytes / n) for n in (1, SHARED)]
        psnr_db = ours_only[best].psnr_db
        equal = [at_psnr(codec, series, spread, psnr_db) for codec in at_equal]
        table.add_row(
            f"{r:g}", *(f"{result.ratio:.1f}" for result in results),
            *(f"{each:.1f}" for each in with_model), f"{psnr_db:.1f}",
            *("-" if each is None else f"{ratio / each:.2f}" for each in equal),
        )  # fmt: skip
    console.print(table)


def describe(console: Console, series: Series, models: Sequence[Learned]) -> None:
    """Print what the models of a series cost, and their speeds at r = 1e-2."""
    spread = float(series.test.max()) - float(series.test.min())
    table = Table(title=f"{series.name}: models")
    for column in ("model", "kB", "train s", "epochs", "dB", "enc MB/s", "dec MB/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for each in models:
        result = measured(each.codec, series.test, 1e-2 * spread, 3)
        facts = each.model.facts
        table.add_row(
            each.name, f"{each.model.stored_bytes / 1e3:.0f}", f"{each.train_s:.0f}",
            str(facts["epochs_done"]), f"{facts['validation_psnr_db']:.2f}",
            f"{result.encode_mb_per_s:.1f}", f"{result.decode_mb_per_s:.1f}",
        )  # fmt: skip
    plain = measured(ours(name="sz"), series.test, 1e-2 * spread, 3)
    speeds = f"{plain.encode_mb_per_s:.1f}", f"{plain.decode_mb_per_s:.1f}"
    table.add_row("lowtide.sz", "", "", "", "", *speeds)
    console.print(table)


def main() -> None:
    """Train and compare on each series."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=128, help="points per axis of the made series")
    parser.add_argument("--steps", type=int, default=160, help="steps of the made series")
    parser.add_argument("--series", type=Path, help="folder of .npy files, steps first")
    parser.add_argument("--minutes", type=float, default=2.0, help="training of each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=132)
    for series in all_series(options.edge, options.steps, options.series):
        models = learned_from(series, options.minutes)
        compare(console, series, models)
        describe(console, series, models)


if __name__ == "__main__":
    main()
