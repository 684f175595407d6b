"""`QualitySurrogate` beside what one would do without it, on generated fields and training tensors.

Labels are measured, in sixty steps of eight fields of four applications, five codecs, twelve
bounds. Splits hold out whole arrays: at random (S1), later steps (S2), a field (S3), an application
(S4), bounds (S5), a codec (S6), later steps of a training run (S7). Every seed makes other fields,
other networks and other trees. Rivals: boosted trees on the same inputs and targets (scikit-learn),
the mean of each codec and bound, the closed form, blocks that are measured, and what was measured
some steps before. Codecs, and scikit-learn, that are not installed are left out.

The first run measures for minutes; labels are kept in a folder.

    python benchmarks/bench_quality_surrogate.py [--seeds 3] [--edge 128] [--steps 60]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from quality_choices import costs_table, decisions_table
from quality_labels import labelled
from quality_rivals import (
    boosted_trees,
    closed_form,
    means,
    persisted,
    probes,
    sampled,
    truths,
)
from quality_scores import Board, coverage
from quality_splits import Split, of_codec, samples_of, splits, training_split
from rich.console import Console
from rich.table import Table

from lowtide.quality.surrogate.fitting import Settings
from lowtide.quality.surrogate.history import Following
from lowtide.quality.surrogate.model import QualitySurrogate
from lowtide.quality.surrogate.networks import EXPERTS
from lowtide.quality.surrogate.outputs import METRICS, scaled
from lowtide.quality.surrogate.samples import Sample

Floats = NDArray[np.float64]

LATER = "S2 later steps"
ABLATED = (LATER, "S4 new: gray_scott")
DRIFTING = ("waves/velocity", "turbulence/vorticity")
NEW_CODEC = "rivals.zfp"
COUNTS = (5, 20, 100)
LAG = 10
EPOCHS = 8
VARIANTS = {
    "dense": {},
    "experts": {"heads": EXPERTS},
    "dense + CNN": {"epochs": EPOCHS},
    "experts + CNN": {"heads": EXPERTS, "epochs": EPOCHS},
}


def predicted(
    surrogate: QualitySurrogate, samples: Sequence[Sample], before: dict[str, Sample] | None = None
) -> tuple[Floats, Floats, Floats]:
    """Return places on scales, half widths of intervals, and whether each row is familiar."""
    places, widths, familiar = [], [], []
    for each in samples:
        asked = [one.candidate for one in each.labels]
        handle = surrogate.stage.handle(*each.seen)
        if before is None:
            estimates = surrogate.predict_from_features(handle, asked)
        else:
            following = Following(surrogate)
            old = before[f"{each.series} {each.step - LAG}"]
            following.predict_from_features(surrogate.stage.handle(*old.seen), asked)
            for label in old.labels:
                following.remember(label)
            estimates = following.predict_from_features(handle, asked)
        for estimate in estimates:
            rows = [
                scaled(METRICS, {n: getattr(i, part) for n, i in estimate.metrics.items()})
                for part in ("value", "lower", "upper")
            ]
            places.append(rows[0])
            widths.append(np.abs(rows[2] - rows[1]) / 2)
            familiar.append(estimate.is_familiar)
    return np.stack(places), np.stack(widths), np.array(familiar)


class Bench:
    """All tables."""

    def __init__(self, console: Console, options: argparse.Namespace) -> None:
        self.console, self.options = console, options
        self.board, self.ablation = Board(), Board()
        self.covered: dict[tuple[str, str], list[list[float]]] = {}
        self.gates: list[str] = []
        self.fit_s: list[float] = []
        self.drift: dict[str, list[list[float]]] = {}
        self.decisions = Table()
        self.has_trees = importlib.util.find_spec("sklearn") is not None

    def run(self, seed: int) -> None:
        """Measure one seed."""
        found = labelled(
            seed, edge=self.options.edge, steps=self.options.steps, folder=self.options.cache
        )
        samples = samples_of(found)
        for split in [*splits(samples, seed=seed), training_split(seed=seed)]:
            self.split(split, samples, seed)
            self.console.log(f"seed {seed}: {split.name}")
        self.new_codec(samples, seed)

    def split(self, split: Split, everything: Sequence[Sample], seed: int) -> None:
        """All methods on one split."""
        truth = truths(split.test)
        begin_s = time.perf_counter()
        surrogate = QualitySurrogate(Settings(seed=seed)).fit(split.train)
        self.fit_s.append(time.perf_counter() - begin_s)
        places, widths, familiar = predicted(surrogate, split.test)
        self.board.add(split.name, "surrogate", truth, places)
        self.cover(split.name, truth, places, widths, familiar)
        if self.has_trees:
            trees = boosted_trees(split.train, split.test, seed=seed)
            self.board.add(split.name, "boosted trees", truth, trees)
        self.board.add(split.name, "probe alone", truth, probes(split.test))
        self.board.add(split.name, "mean", truth, means(split.train, split.test))
        self.board.add(split.name, "closed form", truth, closed_form(split.test))
        if split.name == LATER:
            self.history(split, everything, surrogate, truth)
            some = split.test[:: max(1, len(split.test) // 16)]
            for share in (0.05, 0.25, 0.5):
                name = f"blocks, {share:.0%} (16 arrays)"
                self.board.add(split.name, name, truths(some), sampled(some, share))
            if seed == 0:
                self.decisions = decisions_table(surrogate, split)
        if split.name in ABLATED:
            self.ablate(split, truth, seed, places)

    def history(
        self, split: Split, everything: Sequence[Sample], surrogate: QualitySurrogate, truth: Floats
    ) -> None:
        """What an earlier measurement is worth."""
        for lag in (1, LAG):
            found = persisted(everything, split.test, lag)
            self.board.add(split.name, f"persistence, {lag} before", truth, found)
        wanted = {one.candidate.key for each in split.test for one in each.labels}
        before = {
            f"{each.series} {each.step}": Sample(
                each.tensor,
                [one for one in each.labels if one.candidate.key in wanted],
                each.series,
                each.step,
            )
            for each in everything
        }
        places, widths, familiar = predicted(surrogate, split.test, before)
        self.board.add(split.name, f"surrogate, measured {LAG} before", truth, places)
        self.cover(f"{split.name}, {LAG} before", truth, places, widths, familiar)

    def ablate(self, split: Split, truth: Floats, seed: int, dense: Floats) -> None:
        """Experts against dense heads of as many parameters, with and without the embedding."""
        series = np.array([each.series for each in split.test for _ in each.labels])
        drifting = np.isin(series, DRIFTING)
        for name, changes in VARIANTS.items():
            places = dense
            if changes:
                surrogate = QualitySurrogate(Settings(seed=seed, **changes)).fit(split.train)
                places = predicted(surrogate, split.test)[0]
                used = [h["expert_utilisation"] for h in surrogate.describe()["heads"].values()]
                if len(used[0]) > 1:
                    mean = ", ".join(f"{each:.2f}" for each in np.mean(used, axis=0))
                    self.gates.append(f"{split.name}, seed {seed}, {name}: {mean}")
            self.ablation.add(split.name, name, truth, places)
            if split.name == LATER:
                self.ablation.add(f"{LATER}, drifting", name, truth[drifting], places[drifting])

    def cover(
        self, name: str, truth: Floats, places: Floats, widths: Floats, familiar: Floats
    ) -> None:
        """Take up how intervals did."""
        is_familiar = familiar.astype(bool)
        every = coverage(truth, places, widths)
        inside = coverage(truth[is_familiar], places[is_familiar], widths[is_familiar])
        row = [float(is_familiar.mean())]
        for metric in METRICS[:4]:
            row += [every[metric][0], inside[metric][0]]
        row += [20 * every["psnr_db"][1]]
        self.covered.setdefault((name, "surrogate"), []).append(row)

    def new_codec(self, samples: Sequence[Sample], seed: int) -> None:
        """S6: one codec is added later, with few arrays."""
        if not any(one.candidate.codec == NEW_CODEC for one in samples[0].labels):
            return
        first_late = 0.6 * self.options.steps
        early = [each for each in samples if each.step < first_late]
        late = of_codec([e for e in samples if e.step >= first_late], lambda n: n == NEW_CODEC)
        surrogate = QualitySurrogate(Settings(seed=seed)).fit(
            of_codec(early, lambda name: name != NEW_CODEC)
        )
        own = of_codec(early, lambda name: name == NEW_CODEC)
        order = np.random.default_rng(seed).permutation(len(own))
        truth = truths(late)
        fitted = surrogate._ready()
        for count in (*COUNTS, len(own)):
            some = [own[n] for n in sorted(order[:count])]
            surrogate._fitted = fitted
            surrogate.add_compressor(NEW_CODEC, some)
            label = f"S6 new codec, {count} arrays"
            self.board.add(label, "surrogate", truth, predicted(surrogate, late)[0])
            if self.has_trees:
                self.board.add(label, "boosted trees", truth, boosted_trees(some, late, seed=seed))

    def print(self) -> None:
        """Print what all seeds found."""
        names = list(dict.fromkeys(split for split, _ in self.board.rows))
        seeds = f"{self.options.seeds} seeds: mean (least-greatest)"
        self.board.print(self.console, f"Errors, {seeds}", names)
        names = list(dict.fromkeys(split for split, _ in self.ablation.rows))
        self.ablation.print(self.console, f"Experts and embedding, {seeds}", names)
        self.console.print("Shares of experts, sorted, mean over heads:")
        for line in self.gates:
            self.console.print(f"  {line}")
        table = Table(title="Intervals at 90 %: all arrays / those marked familiar")
        for column in ("split", "familiar", "CR", "PSNR", "DSSIM", "ac1", "PSNR width dB"):
            table.add_column(column, justify="left" if column == "split" else "right")
        for (name, _), rows in self.covered.items():
            r = np.nanmean(np.array(rows), axis=0)
            pairs = [f"{r[at]:.0%} / {r[at + 1]:.0%}" for at in (1, 3, 5, 7)]
            table.add_row(name, f"{r[0]:.0%}", *pairs, f"{r[9]:.2f}")
        self.console.print(table)
        self.console.print(self.decisions)
        self.console.print(f"Fitting: {np.median(self.fit_s):.0f} s, median of {len(self.fit_s)}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cache", type=Path, default=Path("runs/quality-labels"))
    parser.add_argument("--only-costs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=170)
    bench = Bench(console, options)
    for seed in range(0 if options.only_costs else options.seeds):
        bench.run(seed)
    if not options.only_costs:
        bench.print()
    costs_table(console)


if __name__ == "__main__":
    main()
