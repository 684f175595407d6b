"""Metrics beside plain numpy, scikit-image and scipy; selection beside trying everything.

First table: seconds for one metric on the same two arrays, in turn in one process and one thread,
medians; and how far the values are apart. Rivals that are not installed are left out.

Second table: `select` with and without predictors, beside measuring every candidate of the same
grid. Regret is 1 - ratio / best ratio of any candidate that meets the target: the mean over fields
and targets, and the worst. Time is that of `select`; that of the exhaustive search is encoding,
decoding and metrics of all candidates.

    python benchmarks/bench_quality.py [--edge 48] [--megapixels 4] [--fields FOLDER] [--rounds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compression_fields import all_fields, random_field
from rich.console import Console
from rich.table import Table

from lowtide.quality import QualityReport, evaluate, measure, select
from lowtide.quality.candidates import automatic
from lowtide.quality.predictors import BlockSampling, ClosedForm, Persistence, Predictor
from lowtide.quality.targets import Target, targets_of

TARGETS: tuple[dict[str, float], ...] = (
    {"psnr_db": 40}, {"psnr_db": 60}, {"psnr_db": 80}, {"max_rel_error": 1e-3}, {"ssim": 0.999},
    {"psnr_db": 60, "error_autocorr": 0.1},
)  # fmt: skip
NAMES = ("psnr_db", "max_rel_error", "ssim", "error_autocorr")


def numpy_psnr(x: Any, y: Any) -> float:
    error = y.astype(np.float64) - x.astype(np.float64)
    spread = float(x.max()) - float(x.min())
    return 20 * math.log10(spread) - 10 * math.log10(np.mean(error**2))


def numpy_quantile(x: Any, y: Any) -> float:
    error = np.abs(y.astype(np.float64) - x.astype(np.float64))
    return float(np.quantile(error, 0.99, method="inverted_cdf"))


def numpy_spectrum(x: Any, y: Any) -> float:
    grids = np.meshgrid(*(np.fft.fftfreq(n) * max(x.shape) for n in x.shape), indexing="ij")
    bins = np.rint(np.sqrt(sum(grid**2 for grid in grids))).astype(int).reshape(-1)
    px, py = (
        np.bincount(bins, (np.abs(np.fft.fftn(each.astype(np.float64))) ** 2).reshape(-1))
        for each in (x, y)
    )
    inside = slice(1, max(x.shape) // 2 + 1)
    return float(np.mean(np.abs(np.log(py[inside] / px[inside]))))


def rivals() -> Iterator[tuple[str, str, Callable[[Any, Any], float]]]:
    """Yield (metric, rival, its function)."""
    yield "psnr_db", "numpy", numpy_psnr
    yield "error_quantile", "numpy", numpy_quantile
    yield "spectral_error", "numpy", numpy_spectrum
    yield "pearson_r", "numpy", lambda x, y: float(np.corrcoef(x.reshape(-1), y.reshape(-1))[0, 1])
    try:
        from scipy.stats import ks_2samp

        yield (
            "ks_statistic",
            "scipy",
            lambda x, y: float(ks_2samp(x.reshape(-1), y.reshape(-1), method="asymp").statistic),
        )
    except ImportError:
        pass
    try:
        from skimage.metrics import structural_similarity

        yield "ssim", "scikit-image", lambda x, y: float(
            structural_similarity(
                x.astype(np.float64), y.astype(np.float64),
                data_range=float(x.max()) - float(x.min()),
            )
        )  # fmt: skip
    except ImportError:
        pass


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    begin_s = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin_s


def metric_table(console: Console, megapixels: float, rounds: int) -> None:
    """Print times of metrics and of rivals, on a 2-D and a 3-D field."""
    count = int(megapixels * (1 << 20))
    side, edge = 1 << round(math.log2(count) / 2), 1 << round(math.log2(count) / 3)
    rng = np.random.default_rng(0)
    table = Table(title="seconds for one metric")
    for column in ("shape", "metric", "lowtide", "rival", "seconds", "ratio", "difference"):
        table.add_column(column)
    for shape in ((side, side), (edge, edge, edge)):
        x = np.cumsum(rng.normal(size=shape), axis=-1).astype(np.float32)
        y = (x + 0.05 * rng.normal(size=shape)).astype(np.float32)
        for metric, rival, function in rivals():
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(seconds(evaluate, x, y, [metric]))
                theirs.append(seconds(function, x, y))
            apart = abs((evaluate(x, y, [metric])[metric] or 0.0) - function(x, y))
            mine, other = statistics.median(ours), statistics.median(theirs)
            table.add_row(
                "x".join(map(str, shape)), metric, f"{mine:.3f}", rival, f"{other:.3f}",
                f"{other / mine:.2f}x", f"{apart:.1e}",
            )  # fmt: skip
    console.print(table)


def fields(edge: int, folder: Path | None) -> Iterator[tuple[str, Any]]:
    """Yield fields and tensors."""
    yield from all_fields(edge, folder)
    torch.manual_seed(0)
    yield "normal weights", torch.randn(256, 512)
    yield "the same in bfloat16", torch.randn(256, 512).bfloat16()
    yield "slice", random_field(edge)[edge // 2]


def exhaustive(x: Any) -> tuple[list[QualityReport], float]:
    """Measure every candidate."""
    spread = float(torch.as_tensor(x).double().max() - torch.as_tensor(x).double().min())
    begin_s = time.perf_counter()
    reports = [
        measure(x, candidate, NAMES) for family in automatic() for candidate in family.grid(spread)
    ]
    return reports, time.perf_counter() - begin_s


def best(reports: list[QualityReport], targets: tuple[Target, ...]) -> float:
    """Return the best ratio of those that meet the targets."""
    met = [
        report.ratio or 1.0
        for report in reports
        if all(target.is_met(report.value(target.metric)) for target in targets)
    ]
    return max(met, default=1.0)


def selection_table(console: Console, edge: int, folder: Path | None) -> None:
    """Print measurements, time and regret of each way to select."""
    ways: dict[str, Callable[[], Predictor | None]] = {
        "measured search": lambda: None,
        "closed form": ClosedForm,
        "blocks 5 %": lambda: BlockSampling(0.05),
        "blocks 25 %": lambda: BlockSampling(0.25),
        "persistence, second time": Persistence,
    }
    found: dict[str, list[tuple[float, int, float, bool]]] = {name: [] for name in ways}
    candidates, exhaustive_s = 0, []
    for _, x in fields(edge, folder):
        reports, spent_s = exhaustive(x)
        candidates = len(reports)
        exhaustive_s.append(spent_s)
        for spec in TARGETS:
            targets = targets_of(spec)
            oracle = best(reports, targets)
            for name, make in ways.items():
                predictor = make()
                if isinstance(predictor, Persistence):
                    select(x, targets, predictor=predictor)
                chosen = select(x, targets, predictor=predictor)
                report = chosen.measured
                is_met = report is not None and all(
                    target.is_met(report.value(target.metric)) for target in targets
                )
                regret = 1 - chosen.ratio / oracle
                found[name].append((regret, chosen.measurements, chosen.elapsed_s, is_met))
    table = Table(title=f"selection among {candidates} candidates, {len(TARGETS)} targets")
    for column in ("way", "measured", "s", "speed-up", "mean regret", "worst", "target met"):
        table.add_column(column)
    whole_s = statistics.fmean(exhaustive_s)
    table.add_row("exhaustive", str(candidates), f"{whole_s:.2f}", "1x", "0.0 %", "0.0 %", "all")
    for name, rows in found.items():
        regrets, counts, times, met = zip(*rows, strict=True)
        table.add_row(
            name, f"{statistics.fmean(counts):.1f}", f"{statistics.fmean(times):.3f}",
            f"{whole_s / statistics.fmean(times):.0f}x", f"{100 * statistics.fmean(regrets):.1f} %",
            f"{100 * max(regrets):.1f} %", f"{sum(met)} of {len(met)}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=48, help="points per axis of the made field")
    parser.add_argument("--megapixels", type=float, default=4, help="Mi elements for the metrics")
    parser.add_argument("--fields", type=Path, help="folder of .npy files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    metric_table(console, options.megapixels, options.rounds)
    selection_table(console, options.edge, options.fields)


if __name__ == "__main__":
    main()
