"""Faults that tests put into the native kernels: single bits, flipped while they are in use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lowtide.core.errors import ConfigError, listed, near
from lowtide.kmeans.backend import Floats
from lowtide.kmeans.checks import groups

Site: TypeAlias = Literal["acc", "checksum", "norm", "argmin", "sum", "count"]
_Planned: TypeAlias = tuple[str, int, int, int]

# The running minimum is kept twice, its index once, with a byte of its own to check it.
_ARGMIN = ("best", "best_again", "index")


@dataclass(frozen=True)
class Flip:
    """One bit that was flipped.

    Attributes:
        call: Number of the call, from 0.
        site: What was hit; of "argmin" which of its three registers.
        row: The sample at work; 0 for "norm".
        column: Centroid, for "checksum" its group, for "sum" the feature.
        bit: From the least significant one.
        before: Value.
        after: Value with the bit flipped.
    """

    call: int
    site: str
    row: int
    column: int
    bit: int
    before: float
    after: float


@dataclass
class Injector:
    """Flips bits in the accumulators of the native kernels, before they are used.

    What is hit follows from the seed, the number of the call and the shapes alone: not from
    threads, not from the instruction set.

    Attributes:
        site: "acc" (a distance's accumulator), "checksum" (its row's checksum), "norm" (a
            centroid's squared norm when it is encoded), "argmin" (running minimum or its index),
            "sum" or "count" (of a cluster).
        bit: Which, from the least significant one, or "uniform".
        rate: Faults in a call, on average; its whole part happens in each.
        seed: Of the choices.
        log: What happened, as the kernels saw it.
    """

    site: Site
    bit: int | Literal["uniform"] = "uniform"
    rate: float = 1.0
    seed: int = 0
    log: list[Flip] = field(default_factory=list)
    _call: int = 0
    _planned: list[_Planned] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.site not in get_args(Site):
            raise ConfigError(
                f'injection: site "{self.site}" is unknown.{near(self.site, get_args(Site))} '
                f"Known: {listed(get_args(Site))}"
            )
        if self.bit != "uniform" and not 0 <= self.bit < 64:
            raise ConfigError(f'injection: bit {self.bit}, allowed are 0 to 63 and "uniform"')
        if not 0 <= self.rate < float("inf"):
            raise ConfigError(f"injection: rate {self.rate}, allowed are 0 and more")

    def plan(self, count: int, centroids: Floats) -> list[_Planned]:
        """Return the next call's faults as (site, row, column, bit), by row."""
        rng = np.random.default_rng([self.seed, self._call])
        self._planned = []
        if count == 0:
            return []
        n_faults = int(self.rate) + int(rng.random() < self.rate % 1)
        clusters, features = centroids.shape
        is_double = self.site in ("sum", "count") or centroids.dtype == np.float64
        columns = clusters
        if self.site == "checksum":
            columns = len(groups(clusters))
        elif self.site == "sum":
            columns = features
        # Different samples, as long as there are enough.
        hit = rng.choice(count, n_faults, replace=n_faults > count)
        rows = np.zeros(n_faults, np.int64) if self.site == "norm" else np.sort(hit)
        drawn = rng.integers(64 if is_double else 32, size=n_faults)
        bits = drawn if self.bit == "uniform" else np.full(n_faults, self.bit)
        sites = np.array(_ARGMIN if self.site == "argmin" else [self.site])
        self._planned = list(
            zip(
                sites[rng.integers(len(sites), size=n_faults)].tolist(),
                rows.tolist(),
                rng.integers(columns, size=n_faults).tolist(),
                bits.tolist(),
                strict=True,
            )
        )
        return self._planned

    def note(self, happened: list[Any]) -> int:
        """Add what became of the plan to the log; return how many faults happened."""
        flips = [
            Flip(self._call, *planned, before, after)
            for planned, (is_done, before, after) in zip(self._planned, happened, strict=True)
            if is_done
        ]
        self._call += 1
        self.log += flips
        return len(flips)
