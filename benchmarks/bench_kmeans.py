"""One pass of K-Means over the samples: nearest centroids, and sums and counts of the clusters.

Lowtide's native backend, with and without checks, beside scikit-learn's own iteration of Lloyd's
algorithm, numpy (product of matrices in chunks, argmin, bincount of every feature) and faiss'
exact search, which leaves the sums out. All get the same float32 samples and centroids, in turn in
one process; what a fit does once (Lowtide's copy of the samples, scikit-learn's centring and
norms) is not in it: bench_kmeans_fit.py times that.

Times are processor time with one thread, or wall time with more; ratios are medians of the ratios
within a round. Rivals that are not installed are left out. A ratio to the best rival above 1 says
that Lowtide is faster.

    python benchmarks/bench_kmeans.py [--rounds 7] [--threads 1] [--dtype float32] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lowtide.kmeans.native import NativeBackend
from lowtide.kmeans.protection import Protection

Pass = Callable[[], Any]
GRID = [
    (131072, features, clusters)
    for features in (8, 16, 32, 64, 129)
    for clusters in (8, 17, 64, 100, 257)
]
OTHERS = [(1000000, 4, 16), (16384, 768, 1000), (4099, 33, 1000)]
SMALL = [(1, 32, 17), (7, 32, 17), (1023, 32, 17)]
QUICK = [(131072, 8, 8), (131072, 32, 64), (20000, 129, 257)]
CHUNK = 4096  # rows of numpy's distances
LEAST_S = 2e-3  # a measurement repeats shorter passes


def ours(samples: Any, centroids: Any, threads: int) -> dict[str, Pass]:
    """Return Lowtide's pass without and with checks, on the same prepared samples."""
    prepared = NativeBackend(threads).prepare(samples)
    on = Protection("correct")
    return {
        "lowtide": lambda: prepared.assign(centroids, distances=False).labels,
        "checked": lambda: prepared.assign(centroids, on, distances=False).labels,
    }


def scikit_learn(samples: Any, centroids: Any, threads: int) -> Pass:
    from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense

    weights = np.ones(len(samples), samples.dtype)
    made, counts = np.zeros_like(centroids), np.zeros(len(centroids), samples.dtype)
    labels = np.full(len(samples), -1, np.int32)
    shift = np.zeros(len(centroids), samples.dtype)

    def iterate() -> Any:
        lloyd_iter_chunked_dense(samples, weights, centroids, made, counts, labels, shift, threads)
        return labels

    return iterate


def numpy_product(samples: Any, centroids: Any, threads: int) -> Pass:
    del threads  # of its BLAS: limit_threads()
    norms = (centroids**2).sum(axis=1)
    features = samples.shape[1]

    def iterate() -> Any:
        labels = np.empty(len(samples), np.int64)
        for begin in range(0, len(samples), CHUNK):
            part = slice(begin, begin + CHUNK)
            labels[part] = (norms - 2 * (samples[part] @ centroids.T)).argmin(axis=1)
        for feature in range(features):
            np.bincount(labels, samples[:, feature], len(centroids))
        np.bincount(labels, minlength=len(centroids))
        return labels

    return iterate


def faiss_search(samples: Any, centroids: Any, threads: int) -> Pass:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatL2(samples.shape[1])
    index.add(centroids)
    return lambda: index.search(samples, 1)[1][:, 0]


def passes(samples: Any, centroids: Any, threads: int) -> dict[str, Pass]:
    """Return ours and every rival that is installed and takes this dtype."""
    found = ours(samples, centroids, threads)
    found["numpy"] = numpy_product(samples, centroids, threads)
    if importlib.util.find_spec("sklearn"):
        found["scikit-learn"] = scikit_learn(samples, centroids, threads)
    if importlib.util.find_spec("faiss") and samples.dtype == np.float32:
        found["faiss"] = faiss_search(samples, centroids, threads)
    return found


def limit_threads(threads: int) -> None:
    """Limit the BLAS libraries; scikit-learn runs them with one in each of its own threads."""
    if importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)


def measure(
    shape: tuple[int, int, int], dtype: Any, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Return the times of each, round by round; all must agree on the labels."""
    count, features, clusters = shape
    rng = np.random.default_rng(count + features + clusters)
    samples = rng.standard_normal((count, features)).astype(dtype)
    centroids = rng.standard_normal((clusters, features)).astype(dtype)
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {}
    expected: Any = None
    for name, iterate in passes(samples, centroids, threads).items():
        begin_s = clock()
        labels = iterate()
        repeats = max(1, math.ceil(LEAST_S / max(clock() - begin_s, 1e-6)))
        expected = labels.copy() if expected is None else expected
        if (labels != expected).mean() > 1e-4:  # rounding may move a few
            raise SystemExit(f"{shape}: {name} gives other labels than lowtide")
        times[name] = [repeats]
    runs = passes(samples, centroids, threads)
    repeats_of = {name: int(each[0]) for name, each in times.items()}
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, iterate in runs.items():
            begin_s = clock()
            for _ in range(repeats_of[name]):
                iterate()
            times[name].append((clock() - begin_s) / repeats_of[name])
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def geometric(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def interval(ratios: list[float]) -> str:
    """Return a 95% interval of the geometric mean of paired ratios, by the normal distribution."""
    logs = [math.log(each) for each in ratios]
    middle = statistics.fmean(logs)
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    return f"{math.exp(middle - half) - 1:+.1%} .. {math.exp(middle + half) - 1:+.1%}"


def main() -> None:
    """Time all shapes and print a table and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    console = Console(width=120)
    console.print(f"{arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds in "
                  f"turn, load {os.getloadavg()[0]:.2f}; ms (Gflop/s)")  # fmt: skip
    shapes = QUICK if arguments.quick else [*GRID, *OTHERS, *SMALL]
    best: dict[tuple[int, int, int], float] = {}
    paired: dict[tuple[int, int, int], list[float]] = {}
    table: Table | None = None
    for shape in shapes:
        times = measure(shape, np.dtype(arguments.dtype).type, arguments.rounds, arguments.threads)
        rivals = [name for name in times if name not in ("lowtide", "checked")]
        if table is None:
            table = Table("shape", "lowtide", *rivals, "best / lowtide", "checks", box=None)
        work = 2 * math.prod(shape) / 1e9
        medians = {name: statistics.median(each) for name, each in times.items()}
        best[shape] = min(ratio(times, name, "lowtide") for name in rivals)
        paired[shape] = [
            on / off for on, off in zip(times["checked"], times["lowtide"], strict=True)
        ]
        table.add_row(
            " x ".join(map(str, shape)),
            *(f"{medians[name] * 1e3:.3g} ({work / medians[name]:.0f})"
              for name in ("lowtide", *rivals)),
            f"{best[shape]:.2f}",
            f"{statistics.median(paired[shape]) - 1:+.1%}",
        )  # fmt: skip
    console.print(table)
    large = [shape for shape in shapes if shape not in SMALL]
    few = [shape for shape in large if shape[1] <= 16 and shape[2] <= 17]
    for name, group in (("all but the smallest", large), ("D, K <= 17", few)):
        if group:
            console.print(
                f"{name}: best rival / lowtide {geometric([best[s] for s in group]):.2f} "
                f"(least {min(best[s] for s in group):.2f}); checks "
                f"{geometric([statistics.median(paired[s]) for s in group]) - 1:+.1%} "
                f"(most {max(statistics.median(paired[s]) for s in group) - 1:+.1%}; 95% of the "
                f"mean over all pairs {interval([r for s in group for r in paired[s]])})"
            )


if __name__ == "__main__":
    main()
