"""Silent errors in K-Means: how many are seen, what they do, and how often nothing is called one.

    python benchmarks/kmeans_faults.py [--flips 1e6] [--checks 1e8]
    python benchmarks/kmeans_faults.py --calibrate         the table of lowtide/kmeans/checks.py

Single bits are flipped in the accumulators of the native kernels, in every site and both dtypes.
For each position of the bit: how many flips were found, how many change a label if nothing is
done, and how many change one although the checks are on. Then sound passes over ordinary and
adversarial samples: checks, alarms, and the bound on their rate.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lowtide.kmeans.checks import CALIBRATIONS
from lowtide.kmeans.injection import Injector
from lowtide.kmeans.native import NativeBackend
from lowtide.kmeans.protection import Protection

DTYPES = (np.float32, np.float64)
SHAPE = (4096, 32, 32)  # of the study of errors: samples, features, clusters
ROW_SITES = ("acc", "checksum", "argmin")
CALL_SITES = ("norm", "sum", "count")
ORDINARY = ("normal", "mean 3", "mean 1000", "blobs", "integers", "scale 1e15", "scale 1e-15")
ADVERSARIAL = ("rank 1", "two values", "heavy tails", "outlier", "duplicates")
FALSE_SHAPES = ((8192, 8, 8), (8192, 4, 64), (8192, 32, 100), (4096, 128, 257), (1024, 768, 1000))


def samples_of(kind: str, count: int, features: int, rng: np.random.Generator) -> Any:
    """Return (M, D) in float64."""
    normal = rng.standard_normal((count, features))
    if kind.startswith("mean"):
        return normal + float(kind.split()[1])
    if kind.startswith("scale"):
        return normal * float(kind.split()[1])
    if kind == "blobs":
        return 0.1 * normal + rng.standard_normal((20, features))[rng.integers(0, 20, count)]
    if kind == "integers":
        return rng.integers(0, 256, (count, features)).astype(float)
    if kind == "rank 1":
        return normal[:, :1] * np.ones(features)
    if kind == "two values":
        return np.where(normal[:, :1] > 0, 0.1, -0.1) * np.ones(features)
    if kind == "heavy tails":
        return rng.standard_t(1.5, (count, features))
    if kind == "outlier":
        normal[0] *= 1e12
    if kind == "duplicates":
        return normal[rng.integers(0, 7, count)]
    return normal


@dataclass
class Case:
    """Samples made ready, and centroids for them."""

    kind: str
    shape: tuple[int, int, int]
    prepared: Any
    centroids: Any


def case(
    kind: str, shape: tuple[int, int, int], dtype: Any, seed: int, injector: Any = None
) -> Case:
    rng = np.random.default_rng(seed)
    count, features, clusters = shape
    samples = samples_of(kind, count, features, rng).astype(dtype)
    centroids = samples[rng.choice(count, clusters, replace=False)] * dtype(0.97)
    return Case(kind, shape, NativeBackend(injector=injector).prepare(samples), centroids)


@dataclass
class Found:
    """Of one site, dtype and bit."""

    flips: int = 0
    detected: int = 0
    harmful: int = 0  # labels that differ without protection
    escaped: int = 0  # labels that differ with it
    worst: float = 0.0  # largest relative change of a sum that remains


def study(site: Any, dtype: Any, bit: int, flips: int, seed: int) -> Found:
    """Flip one bit in `flips` places."""
    at_once = {"norm": 1, "sum": 1, "count": 1}.get(site, SHAPE[0] // 8)
    if site in CALL_SITES:
        flips = max(20, flips // 100)
    found = Found()
    runs = [case("normal", SHAPE, dtype, seed, Injector(site, bit, at_once, s)) for s in (1, 1)]
    clean = case("normal", SHAPE, dtype, seed)
    right = clean.prepared.assign(clean.centroids, distances=False)
    size = np.abs(right.sums).sum(axis=0)
    protected, bare = runs
    while found.flips < flips:
        kept = protected.prepared.assign(
            protected.centroids, Protection("correct"), distances=False
        )
        lost = bare.prepared.assign(bare.centroids, distances=False)
        found.flips += kept.report.injected
        found.detected += kept.report.detected
        found.escaped += int((kept.labels != right.labels).sum())
        found.harmful += int((lost.labels != right.labels).sum())
        change = np.max(np.abs(kept.sums - right.sums) / size)
        found.worst = max(found.worst, float(change))
        if site == "count":
            change = np.max(np.abs(kept.counts - right.counts) / right.counts)
            found.worst = max(found.worst, float(change))
    return found


def study_all(flips: float, console: Console) -> None:
    """Print a table for each dtype, and totals."""
    for dtype in DTYPES:
        bits = 8 * np.dtype(dtype).itemsize
        table = Table("site", "bits", "flips", "found", "labels changed if off",
                      "labels changed if on", "worst change of a sum", box=None)  # fmt: skip
        for site in (*ROW_SITES, *CALL_SITES):
            width = 64 if site in ("sum", "count") else bits
            each = int(flips / width)
            total = Found()
            group = max(1, width // 16)
            for begin in range(0, width, group):
                part = Found()
                for bit in range(begin, begin + group):
                    one = study(site, dtype, bit, each, seed=bit)
                    for name in ("flips", "detected", "harmful", "escaped"):
                        setattr(part, name, getattr(part, name) + getattr(one, name))
                    part.worst = max(part.worst, one.worst)
                table.add_row(site, f"{begin}..{begin + group - 1}", *cells(part))
                for name in ("flips", "detected", "harmful", "escaped"):
                    setattr(total, name, getattr(total, name) + getattr(part, name))
                total.worst = max(total.worst, part.worst)
            table.add_row(site, "all", *cells(total), style="bold")
        console.print(f"{np.dtype(dtype).name}, {SHAPE[0]} x {SHAPE[1]} samples, {SHAPE[2]} "
                      f"centroids, mode correct")  # fmt: skip
        console.print(table)


def cells(found: Found) -> Iterator[str]:
    yield f"{found.flips}"
    yield f"{100 * found.detected / found.flips:.1f}%"
    yield f"{found.harmful}"
    yield f"{found.escaped}"
    yield f"{found.worst:.0e}" if found.worst else "none"


def sound(checks: float, console: Console) -> None:
    """Print how many checks of sound passes raised an alarm."""
    table = Table("samples", "dtype", "checks", "alarms", "rate, 95%", "largest residual", box=None)
    total = alarms = 0
    each = checks / (len(ORDINARY + ADVERSARIAL) * len(DTYPES) * len(FALSE_SHAPES))
    for kind, dtype in itertools.product(ORDINARY + ADVERSARIAL, DTYPES):
        counted = raised = 0
        largest = 0.0
        for shape in FALSE_SHAPES:
            done, seed = 0, 0
            while done < each:
                made = case(kind, shape, dtype, seed)
                for move in range(8):
                    moved = made.centroids * dtype(1 - 0.01 * move)
                    report = made.prepared.assign(
                        moved, Protection("detect"), distances=False
                    ).report
                    done += report.checks
                    raised += report.detected
                    largest = max(largest, report.max_residual)
                seed += 1
            counted += done
        bound = 3 / counted if raised == 0 else raised / counted
        table.add_row(kind, np.dtype(dtype).name, f"{counted:.2e}", f"{raised}",
                      f"{'<' if raised == 0 else ''}{bound:.0e}", f"{largest:.2f}")  # fmt: skip
        total, alarms = total + counted, alarms + raised
    console.print("sound passes, mode detect; residuals in thresholds")
    console.print(table)
    console.print(f"{total:.3e} checks, {alarms} alarms, rate below {3 / total:.1e} (95%)")


def calibrate(checks: float, console: Console) -> None:
    """Print the largest residuals in units, for `lowtide.kmeans.checks.CALIBRATIONS`."""
    features = {16: (2, 8, 16), 256: (17, 64, 256), np.inf: (257, 800)}
    table = Table("features up to", "samples", "checks", "largest residual, units", box=None)
    for most, kinds in itertools.product(features, (ORDINARY, ADVERSARIAL)):
        largest = counted = 0.0
        for kind, dtype, width in itertools.product(kinds, DTYPES, features[most]):
            for clusters in (4, 20, 64, 127, 300):
                begin, seed = counted, 0
                share = checks / (len(kinds) * 2 * len(features[most]) * 5)
                while counted - begin < share:
                    made = case(kind, (8192, width, clusters), dtype, seed)
                    report = made.prepared.assign(
                        made.centroids, Protection("detect", kappa=1.0), distances=False
                    ).report
                    counted += report.checks
                    largest = max(largest, report.max_residual)
                    seed += 1
        name = "ordinary" if kinds is ORDINARY else "adversarial"
        table.add_row(f"{most}", name, f"{counted:.2e}", f"{largest:.2f}")
    console.print(table)
    console.print(f"in use: {[(each.features, each.kappa) for each in CALIBRATIONS]}")


def main() -> None:
    """Study errors and sound passes, or calibrate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=float, default=1e6, help="of each site and dtype")
    parser.add_argument("--checks", type=float, default=1e8)
    parser.add_argument("--calibrate", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=110)
    begin_s = time.perf_counter()
    if arguments.calibrate:
        calibrate(arguments.checks, console)
    else:
        study_all(arguments.flips, console)
        sound(arguments.checks, console)
    console.print(f"{time.perf_counter() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
