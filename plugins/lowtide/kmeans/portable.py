"""Lloyd's two steps in torch: any device, float32, float64 and bfloat16 samples.

Blocks of samples times all centroids, so that the M x K distances never exist at once. Checksums
are columns of the same product (see `portable_checks`). Products are made in full precision: TF32
and bfloat16 inside of matrix products are switched off while they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError
from lowtide.kmeans.backend import Assignment, Backend, Floats, Prepared
from lowtide.kmeans.invariants import Totals, sums_by_label
from lowtide.kmeans.portable_checks import Centres, Checked
from lowtide.kmeans.protection import FaultReport, Protection
from lowtide.kmeans.samples import Moments, as_tensor, blocks_of, to_numpy

_BLOCK_DISTANCES = 1 << 19  # held at once on a CPU; sixty-four times as many on a GPU
_ROWS = 256, 16384


class TorchBackend(Backend):
    """Blocked products and argmin.

    Labels are the reference's except where the two smallest distances differ by less than their
    rounding, about ``2 * (D + 2) * u * (|x| + |c|)**2``. Sums are float64 in a fixed order: the
    same bits every time, for a number of threads on a CPU.

    Args:
        compute: Type of the distances; None is the samples' type, float32 for bfloat16.
    """

    name = "torch"

    def __init__(self, compute: torch.dtype | None = None) -> None:
        self._compute = compute

    def prepare(self, samples: Any, weights: NDArray[np.float64] | None = None) -> Prepared:
        """Return samples made ready; see `Backend.prepare`.

        Raises:
            DataError: The samples are not (M, D) floating-point numbers.
        """
        values = as_tensor(samples)
        if values.ndim != 2 or not values.is_floating_point():
            raise DataError(
                f"samples: {values.dtype} of shape {tuple(values.shape)}, allowed are (M, D) "
                f"floating-point numbers; convert them with samples.float()"
            )
        is_small = values.dtype in (torch.bfloat16, torch.float16)
        own = torch.float32 if is_small else values.dtype
        return _Prepared(values, weights, self._compute or own)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Make matrix products on a device in the precision of their type, whatever else is set."""
    is_cuda = device.type == "cuda"
    place = (
        torch.backends.cuda.matmul if is_cuda else getattr(torch.backends.mkldnn, "matmul", None)
    )
    name = "fp32_precision" if hasattr(place, "fp32_precision") else "allow_tf32"  # from torch 2.9
    if not hasattr(place, name):
        yield  # an older torch, which only knows of TF32
        return
    before = getattr(place, name)
    setattr(place, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(place, name, before)


class _Prepared(Prepared):
    def __init__(
        self, values: torch.Tensor, weights: NDArray[np.float64] | None, compute: torch.dtype
    ) -> None:
        self._values = values
        self._host_weights = weights
        self._weights = None if weights is None else torch.from_numpy(weights).to(values.device)
        self._compute = compute
        moments = Moments.of(values)
        self._mean = torch.from_numpy(moments.mean)
        self._squares: float | None = None
        # Taken off again in every block: a second copy of the samples would cost more.
        self._shift = self._mean.to(values.device, compute) if moments.is_off_centre else None
        self._totals: Totals | None = None

    def assign(
        self, centroids: Floats, protection: Protection | None = None, *, distances: bool = True
    ) -> Assignment:
        """See `Prepared.assign`; labels and distances are tensors where the samples are."""
        protection = protection or Protection()
        values, count = self._values, len(self._values)
        # The others compute in the samples' type, so that is what the centroids are first.
        given = torch.from_numpy(np.ascontiguousarray(centroids)).to(values.device, values.dtype)
        given = given.to(self._compute)
        centres = Centres.of(given if self._shift is None else given - self._shift, protection)
        labels = torch.empty(count, dtype=torch.int64, device=values.device)
        exact = torch.empty(count if distances else 0, dtype=torch.float64, device=values.device)
        sums = torch.zeros(
            len(given), values.shape[1] + 1, dtype=torch.float64, device=values.device
        )
        report = FaultReport()
        with full_precision(values.device):
            for place in self._places(len(given)):
                block = values[place].to(self._compute)
                shifted = block if self._shift is None else block - self._shift
                chosen = Checked(shifted, centres, report).labels()
                labels[place] = chosen
                self._add(sums, place, block, chosen)
                if distances:
                    away = block - given[chosen]
                    exact[place] = away.square_().sum(1, dtype=torch.float64)
        if distances:
            inertia = float((exact if self._weights is None else exact * self._weights).sum())
        else:
            inertia = self._inertia(sums, given)
        done = Assignment(
            labels=_out(labels.to(torch.int32)),
            distances=_out(exact) if distances else None,
            sums=to_numpy(sums[:, :-1]),
            counts=to_numpy(sums[:, -1]),
            inertia=inertia,
            report=report,
        )
        return self._sums_checked(done, protection) if protection.is_on else done

    def _inertia(self, sums: torch.Tensor, centroids: torch.Tensor) -> float:
        """Return the inertia that follows from the sums, about the mean, where digits last."""
        wide = self._mean.to(sums.device)
        if self._squares is None:
            self._squares = 0.0
            for place, block in blocks_of(self._values):
                squares = (block.double() - wide).square().sum(1)
                if self._weights is not None:
                    squares *= self._weights[place]
                self._squares += float(squares.sum())
        counts, away = sums[:, -1:], centroids.double() - wide
        rest = counts * away.square() - 2 * (sums[:, :-1] - counts * wide) * away
        return max(0.0, self._squares + float(rest.sum()))

    def _places(self, n_clusters: int) -> Iterator[slice]:
        rows = _BLOCK_DISTANCES // n_clusters
        rows = min(max(rows, _ROWS[0]), _ROWS[1])
        if self._values.device.type != "cpu":
            rows *= 64
        for begin in range(0, len(self._values), rows):
            yield slice(begin, min(begin + rows, len(self._values)))

    def _add(
        self, sums: torch.Tensor, place: slice, block: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Add samples, and behind them their weights, to the sums of their clusters."""
        wide = torch.ones(len(block), block.shape[1] + 1, dtype=torch.float64, device=block.device)
        wide[:, :-1] = block
        if self._weights is not None:
            wide *= self._weights[place, None]
        if block.device.type == "cpu":
            sums.index_add_(0, labels, wide)
        else:  # there it adds with atomics, in the order of the day
            order = labels.argsort(stable=True)
            lengths = labels.bincount(minlength=len(sums))
            sums += torch.segment_reduce(wide[order], "sum", lengths=lengths)

    def _sums_checked(self, done: Assignment, protection: Protection) -> Assignment:
        """Return the assignment with sums that agree with the sums over all samples."""
        if self._totals is None:
            self._totals = Totals.of(self._values, self._host_weights)
        report = done.report
        residual = self._totals.residual(done.sums, done.counts)
        report.checks += 1
        if residual <= 1:
            return done
        report.detected += 1
        if protection.mode != "detect":
            labels = np.asarray(to_numpy(done.labels))
            sums, counts = sums_by_label(self._values, self._host_weights, labels, len(done.counts))
            report.recomputed += 1
            if self._totals.residual(sums, counts) <= 1:
                return replace(done, sums=sums, counts=counts)
        report.uncorrected += 1
        return done


def _out(tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
