"""What predictions are for: decisions that are right, with few measurements, and soon."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from quality_codecs import installed
from quality_labels import GRID
from quality_splits import Split
from rich.console import Console
from rich.table import Table

from lowtide.quality import measure, select
from lowtide.quality.candidates import Candidate, Family
from lowtide.quality.predictors import BlockSampling, ClosedForm, Persistence, Predictor
from lowtide.quality.study.fields import snapshots
from lowtide.quality.surrogate.fitting import Settings
from lowtide.quality.surrogate.history import Following
from lowtide.quality.surrogate.model import QualitySurrogate
from lowtide.quality.surrogate.networks import Shape
from lowtide.quality.surrogate.samples import Sample, labelled
from lowtide.quality.targets import targets_of

TARGETS: tuple[dict[str, float], ...] = ({"psnr_db": 60}, {"psnr_db": 80}, {"dssim": 1e-4})
STEP = 3  # every so many steps of each series


def decisions_table(surrogate: QualitySurrogate, split: Split) -> Table:
    """Return how selections on later steps do, with each predictor, against the best label."""
    series: dict[str, list[Sample]] = {}
    for each in split.test:
        if each.step % STEP == 0:
            series.setdefault(each.series, []).append(each)
    methods: dict[str, Callable[[], Predictor | None]] = {
        "measuring only": lambda: None,
        "closed form": ClosedForm,
        "blocks, 25 %": lambda: BlockSampling(0.25),
        "persistence": Persistence,
        "surrogate": lambda: surrogate,
        "surrogate, following": lambda: Following(surrogate),
    }
    table = Table(
        title=f"Choices among {len(GRID)} bounds of {len(installed())} codecs, S2, first seed"
    )
    for column in ("method", "choices", "first met %", "met %", "measurements", "regret %",
                   "worst %", "fallbacks", "ms each"):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, make in methods.items():
        rows = [
            _chosen(make(), samples, target) for target in TARGETS for samples in series.values()
        ]
        table.add_row(name, *_summary([row for each in rows for row in each]))
    count = len(GRID) * len(installed())
    table.add_row("exhaustive", "", "", "100.0", f"{count}", "0.0", "0.0", "", "")
    return table


def _chosen(
    predictor: Predictor | None, samples: Sequence[Sample], target: dict[str, float]
) -> list[tuple[bool, bool, int, float, bool, float]]:
    families = []
    for codec in installed():
        name, options = codec["id"], {k: v for k, v in codec.items() if k != "id"}
        families.append(Family(name, options, "rel", tuple(sorted(GRID))))
    wanted = targets_of(target)[0]
    found = []
    for each in samples:
        feasible = [
            one.values["compression_ratio"] or 1.0
            for one in each.labels
            if wanted.is_met(one.values[wanted.metric])
        ]
        begin_s = time.process_time()
        choice = select(each.tensor, target, families, predictor=predictor)
        elapsed_s = time.process_time() - begin_s
        best = max(feasible, default=1.0)
        is_met = choice.measured is not None and wanted.is_met(choice.measured.value(wanted.metric))
        found.append(
            (
                choice.decision == "predicted", is_met or not feasible, choice.measurements,
                1 - choice.ratio / best, choice.decision == "searched", elapsed_s,
            )
        )  # fmt: skip
    return found


def _summary(rows: Sequence[tuple[bool, bool, int, float, bool, float]]) -> list[str]:
    first, met, measurements, regret, searched, elapsed = (
        np.array(c) for c in zip(*rows, strict=True)
    )
    return [
        str(len(rows)), f"{100 * first.mean():.1f}", f"{100 * met.mean():.1f}",
        f"{measurements.mean():.2f}", f"{100 * regret.mean():.2f}", f"{100 * regret.max():.1f}",
        str(int(searched.sum())), f"{1e3 * elapsed.mean():.0f}",
    ]  # fmt: skip


COUNTS = (1, 9, 27, 100)
EDGES = (128, 512, 2048)


def costs_table(console: Console) -> None:
    """Print what features and predictions cost beside round trips of lowtide.sz."""
    surrogate = _small()
    table = Table(title="Milliseconds of processor time, one thread; the array in host memory")
    for column in ("array", "features", "features + CNN", "first call",
                   *(f"predict {n}" for n in COUNTS), "one round trip",
                   "with metrics", "27: x codec", "27: x with metrics", "even at"):  # fmt: skip
        table.add_column(column, justify="right")
    with_cnn = _small(epochs=1)
    for edge in EDGES:
        x = _field(edge)
        first_s = _timed(partial(surrogate.extract_features, x), 1)
        features_s = _timed(partial(surrogate.extract_features, x), 9)
        cnn_s = _timed(partial(with_cnn.extract_features, x), 9)
        handle = surrogate.extract_features(x)
        predict_s = [
            _timed(partial(surrogate.predict_from_features, handle, _asked(n)), 9) for n in COUNTS
        ]
        codec_s, metrics_s = _round_trips(x)
        whole_s = features_s + predict_s[2]
        table.add_row(
            f"{edge}^2", *(f"{1e3 * s:.1f}" for s in (features_s, cnn_s, first_s, *predict_s)),
            f"{1e3 * codec_s:.1f}", f"{1e3 * metrics_s:.1f}", f"{27 * codec_s / whole_s:.0f}",
            f"{27 * metrics_s / whole_s:.0f}", f"{whole_s / codec_s:.1f}",
        )  # fmt: skip
    console.print(table)


def _small(**changes: Any) -> QualitySurrogate:
    candidates = [Candidate("lowtide.sz", {}, "rel", bound) for bound in GRID]
    samples = [
        labelled(each.values, candidates, series=each.series, step=each.step)
        for each in snapshots(("turbulence",), edge=64, steps=4)
    ]
    settings = Settings(heads=Shape(steps=20), **changes)
    return QualitySurrogate(settings).fit(samples)


def _field(edge: int) -> Any:
    made = snapshots(("turbulence",), edge=256, steps=1, skip=0)
    values = next(each.values for each in made)
    repeats = max(1, edge // 256)
    noise = np.random.default_rng(0).normal(size=(edge, edge)) * 1e-3
    tiled = np.tile(values, (repeats, repeats))[:edge, :edge]
    return (tiled + noise).astype(np.float32)


def _asked(count: int) -> list[Candidate]:
    return [
        Candidate("lowtide.sz", {}, "rel", bound) for bound in 10 ** np.linspace(-4.9, -1.1, count)
    ]


def _round_trips(x: Any) -> tuple[float, float]:
    """Return mean seconds of encoding and decoding, alone and with the metrics predicted."""
    codec, metrics = [], []
    for bound in GRID[::2]:
        chosen = Candidate("lowtide.sz", {}, "rel", bound)
        built = chosen.build()
        codec.append(_timed(lambda built=built: built.decode(built.encode(x)), 3))  # type: ignore[misc]
        names = ("psnr_db", "dssim", "error_autocorr")
        metrics.append(_timed(partial(measure, x, chosen, names), 3))
    return float(np.mean(codec)), float(np.mean(metrics))


def _timed(call: Callable[[], Any], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        begin_s = time.process_time()
        call()
        found.append(time.process_time() - begin_s)
    return float(np.median(found))
