"""Whole fits of `lowtide.kmeans.KMeans` beside scikit-learn and faiss, with and without checks.

Every one gets the same float32 samples, the same initial centroids and the same number of
iterations (tol 0; shapes where one of them converges before are left out of the means), in turn in
one process with so many threads, and ends with centroids and the samples' labels for them: faiss
leaves those out, so its search is added. faiss' own sampling of the samples is switched off. The
inertia of all is computed in float64 from what they return and has to be the same to 1e-5.

Times are processor time, all threads together, medians over the rounds: the machine need not be
idle. Ratios are medians of the ratios within a round. Rivals that are not installed are left out.

    python benchmarks/bench_kmeans_fit.py [--rounds 7] [--iterations 8] [--threads 1] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lowtide.kmeans import KMeans
from lowtide.kmeans.backends import choose

Array = NDArray[np.float32]
GRID = [
    (131072, features, clusters)
    for features in (8, 16, 32, 64, 129)
    for clusters in (8, 17, 64, 100, 257)
]
LARGE = [(1000000, 4, 16), (16384, 768, 1000), (4099, 33, 1000)]
QUICK = [(131072, 8, 8), (131072, 32, 64), (65536, 128, 256)]
SMALL = [(1023, 16, 16)]


@dataclass(frozen=True)
class Fit:
    """What one of them returns: centroids, labels and iterations made."""

    centroids: Array
    labels: NDArray[Any]
    iterations: int


Fitter = Callable[[Array, Array, int], Fit]


def ours(mode: str) -> Fitter:
    """Return Lowtide's, with a mode of fault tolerance."""

    def fit(samples: Array, start: Array, iterations: int) -> Fit:
        model = KMeans(len(start), init=start, max_iter=iterations, tol=0, fault_tolerance=mode)
        model.fit(samples)
        return Fit(model.cluster_centers_, model.labels_, model.n_iter_)

    return fit


def scikit_learn(samples: Array, start: Array, iterations: int) -> Fit:
    from sklearn.cluster import KMeans as Theirs

    model = Theirs(len(start), init=start, n_init=1, max_iter=iterations, tol=0).fit(samples)
    return Fit(model.cluster_centers_, model.labels_, model.n_iter_)


def faiss_kmeans(samples: Array, start: Array, iterations: int) -> Fit:
    import faiss

    model = faiss.Kmeans(
        samples.shape[1], len(start), niter=iterations,
        min_points_per_centroid=1, max_points_per_centroid=len(samples),
    )  # fmt: skip
    model.train(samples, init_centroids=start)
    _, labels = model.index.search(samples, 1)
    return Fit(model.centroids, labels[:, 0], iterations)


def fitters() -> dict[str, Fitter]:
    """Return ours and every rival that is installed here."""
    found: dict[str, Fitter] = {"lowtide": ours("off"), "checked": ours("correct")}
    if importlib.util.find_spec("sklearn"):
        found["scikit-learn"] = scikit_learn
    if importlib.util.find_spec("faiss"):
        found["faiss"] = faiss_kmeans
    return found


def samples_of(shape: tuple[int, int, int]) -> tuple[Array, Array]:
    """Return overlapping blobs, which take long to converge, and places to start from."""
    count, features, clusters = shape
    g = np.random.default_rng(count + features + clusters)
    places = g.standard_normal((clusters, features), dtype=np.float32)
    samples = places[g.integers(0, clusters, count)] + g.standard_normal(
        (count, features), dtype=np.float32
    )
    return samples, samples[g.choice(count, clusters, replace=False)].copy()


def inertia(samples: Array, fit: Fit) -> float:
    total = 0.0
    for begin in range(0, len(samples), 16384):
        part = slice(begin, begin + 16384)
        away = samples[part].astype(np.float64) - fit.centroids[fit.labels[part]]
        total += float((away**2).sum())
    return total


def limit_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)


def measure(
    shape: tuple[int, int, int], fits: dict[str, Fitter], rounds: int, iterations: int
) -> tuple[dict[str, list[float]], bool]:
    """Return the times of each, round by round, and whether all made the same iterations."""
    samples, start = samples_of(shape)
    times: dict[str, list[float]] = {name: [] for name in fits}
    found: dict[str, Fit] = {}
    for number in range(-1, rounds):  # the first warms up
        for name, fit in fits.items():
            begin_s = time.process_time()
            found[name] = fit(samples, start, iterations)
            if number >= 0:
                times[name].append(time.process_time() - begin_s)
    sizes = {name: inertia(samples, fit) for name, fit in found.items()}
    for name, size in sizes.items():
        if not math.isclose(size, sizes["lowtide"], rel_tol=1e-5):
            raise SystemExit(
                f"{shape}: {name} ends with inertia {size}, lowtide with {sizes['lowtide']}"
            )
    return times, len({fit.iterations for fit in found.values()}) == 1


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    """Print a row for each shape and the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three shapes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    limit_threads(options.threads)
    fits = fitters()
    rivals = [name for name in fits if name not in ("lowtide", "checked")]
    backend = choose("auto", np.zeros((1, 1), np.float32)).name
    table = Table(
        title=f"{options.iterations} iterations, {options.threads} thread(s), ms, backend {backend}"
    )
    for column in ("M x D x K", *fits, *(f"{name}/lowtide" for name in rivals), "checked/lowtide"):
        table.add_column(column, justify="left" if column[0] == "M" else "right")
    ratios: dict[str, list[float]] = {name: [] for name in [*rivals, "best rival", "checked"]}
    for shape in QUICK if options.quick else [*SMALL, *GRID, *LARGE]:
        times, is_alike = measure(shape, fits, options.rounds, options.iterations)
        row = {name: ratio(times[name], times["lowtide"]) for name in fits}
        if rivals:
            row["best rival"] = min(row[name] for name in rivals)
        if is_alike:
            for name, values in ratios.items():
                if name in row:
                    values.append(row[name])
        cells = [f"{1000 * statistics.median(times[name]):.1f}" for name in fits]
        cells += [f"{row[name]:.2f}" for name in [*rivals, "checked"]]
        mark = "" if is_alike else " (converged)"
        table.add_row(" x ".join(map(str, shape)) + mark, *cells)
    console = Console(width=120)
    console.print(table)
    for name, values in ratios.items():
        if values:
            console.print(
                f"{name}/lowtide: geometric mean {statistics.geometric_mean(values):.2f}, least "
                f"{min(values):.2f}, most {max(values):.2f}, {len(values)} shapes"
            )


if __name__ == "__main__":
    main()
