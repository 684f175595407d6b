"""Published update throughputs of Deep Optimizer States, and the lane model fitted to them.

Numbers: recomputed from the authors' public raw logs (repository
mauryaavinash95/deep-optimizer-states-results, DataStates/artifacts) of "Deep Optimizer States"
(Middleware 2024, arXiv 2410.21316). They are the authors', not measured here: billions of
parameters a second, all four ranks together, by update stride; stride 0 is stock.

The model's parameters are those that the logs do not hold: Adam's rate per row, the host's memory
bandwidth per machine, and the rate of the unfused downcast, which follows from the stock column.
Strides 3 and 6 are never used in the fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.offload.plan import Piece, stride_plan
from lowtide.offload.rates import Rates
from lowtide.offload.simulate import Options, machine, plan_job

RANKS = 4
SUBGROUP = 100_000_000
STRIDES = (0, 2, 3, 4, 6, 8, 10)
FITTED = (2, 4, 8, 10)
HELD_OUT = (3, 6)
# Machine -> billions of parameters of the model -> throughput by stride.
THROUGHPUT: dict[str, dict[int, tuple[float, ...]]] = {
    "H100": {
        20: (8.6, 15.3, 14.9, 14.2, 13.3, 13.0, 12.7),
        13: (7.7, 13.6, 13.2, 12.2, 11.3, 10.7, 10.7),
        7: (7.8, 14.2, 13.4, 12.5, 11.6, 10.9, 11.1),
    },
    "A100": {
        20: (3.8, 5.7, 5.6, 5.3, 5.1, 5.1, 5.1),
        13: (3.5, 5.0, 4.8, 4.6, 4.5, 4.4, 4.3),
        7: (3.5, 5.3, 4.8, 4.8, 4.7, 4.6, 4.7),
    },
}
LINK_BYTES_PER_S = {"H100": 55.2e9, "A100": 25e9}  # the authors' constant, and PCIe 4
DEVICE_PARAMS_PER_S = 25e9  # assumed; the logs do not hold it
HOST_MEMORY_BYTES_PER_S = {"H100": (60e9, 300e9), "A100": (25e9, 150e9)}  # searched, per rank
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model size on one machine, with the parameters that fit it best."""

    machine: str
    billions: int
    published: tuple[float, ...]
    predicted: tuple[float, ...]
    host_params_per_s: float
    downcast_params_per_s: float
    squared_error: float

    def errors(self, strides: tuple[int, ...]) -> list[float]:
        """Return relative errors of the prediction."""
        places = [STRIDES.index(stride) for stride in strides]
        return [self.predicted[i] / self.published[i] - 1.0 for i in places]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """All rows of one machine."""

    rows: tuple[Row, ...]
    host_memory_bytes_per_s: float

    def mean_error(self, strides: tuple[int, ...]) -> float:
        """Return the mean absolute relative error."""
        errors = [abs(error) for row in self.rows for error in row.errors(strides)]
        return sum(errors) / len(errors)


def pieces_of(billions: int) -> list[Piece]:
    """Return one rank's subgroups; device gradients never leave the device in the artifact."""
    whole, rest = divmod(billions * 10**9 // RANKS, SUBGROUP)
    sizes = [SUBGROUP] * whole + ([rest] if rest else [])
    return [Piece(numel=size, gradient_upload_bytes=0) for size in sizes]


def throughput(pieces: list[Piece], stride: int, rates: Rates) -> float:
    """Return billions of parameters a second of all ranks, as the artifact would reach them."""
    job = plan_job(stride_plan(pieces, stride), Options.artifact() if stride else Options.stock())
    seconds = machine(pieces, rates).run(job).makespan_s
    return RANKS * sum(piece.numel for piece in pieces) / seconds / 1e9


def least(function: Callable[[float], float], low: float, high: float, rounds: int) -> float:
    """Return where a function with one valley is least, by golden-section search in logarithms."""
    a, b = math.log(low), math.log(high)
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = function(math.exp(c)), function(math.exp(d))
    for _ in range(rounds):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = function(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = function(math.exp(d))
    return math.exp((a + b) / 2)


def fit_row(name: str, billions: int, memory: float, device: float) -> Row:
    """Fit Adam's rate on the host to one row, for a given memory bandwidth."""
    pieces, published = pieces_of(billions), THROUGHPUT[name][billions]
    link = LINK_BYTES_PER_S[name]

    def rates(host: float, downcast: float) -> Rates:
        return Rates(
            host_to_device_bytes_per_s=link,
            device_to_host_bytes_per_s=link,
            host_params_per_s=host,
            downcast_params_per_s=downcast,
            device_params_per_s=device,
            host_memory_bytes_per_s=memory,
        )

    def downcast(host: float) -> float:
        """Return the rate with which the model meets the stock column, by bisection."""
        low, high = math.log(host) - 1.5, math.log(1e12)
        for _ in range(30):
            middle = (low + high) / 2
            is_slow = throughput(pieces, 0, rates(host, math.exp(middle))) < published[0]
            low, high = (middle, high) if is_slow else (low, middle)
        return math.exp(high)

    def error(host: float) -> float:
        found = rates(host, downcast(host))
        return sum(
            (throughput(pieces, stride, found) / published[STRIDES.index(stride)] - 1.0) ** 2
            for stride in FITTED
        )

    per_rank = 1e9 / RANKS
    host = least(error, published[-1] * per_rank * 0.5, published[1] * per_rank * 2.0, 25)
    best = rates(host, downcast(host))
    return Row(
        machine=name,
        billions=billions,
        published=published,
        predicted=tuple(throughput(pieces, stride, best) for stride in STRIDES),
        host_params_per_s=host,
        downcast_params_per_s=best.downcast_params_per_s or 0.0,
        squared_error=error(host),
    )


@functools.cache
def fit(name: str, *, has_memory_limit: bool = True, device: float = DEVICE_PARAMS_PER_S) -> Fit:
    """Fit one machine: its host memory bandwidth by a grid and a search around the best of it."""

    def rows(memory: float) -> tuple[Row, ...]:
        return tuple(fit_row(name, billions, memory, device) for billions in THROUGHPUT[name])

    def error(memory: float) -> float:
        return sum(row.squared_error for row in rows(memory))

    if not has_memory_limit:
        return Fit(rows=rows(1e15), host_memory_bytes_per_s=math.inf)
    low, high = HOST_MEMORY_BYTES_PER_S[name]
    grid = [low * (high / low) ** (step / 12) for step in range(13)]
    best = min(range(13), key=lambda i: error(grid[i]))
    memory = least(error, grid[max(best - 1, 0)], grid[min(best + 1, 12)], 8)
    return Fit(rows=rows(memory), host_memory_bytes_per_s=memory)
