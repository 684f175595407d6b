"""Distances with row checksums, in torch: FT K-Means' algebra on the side of the centroids.

Behind the columns of each tile of centroids stands their sum, as one more centroid of the same
product, so each row of distances has to add up to what the product says (section IV: the scalar
``(e1^T A)(B e1)``, here per row). A second sum, with weights 1, 2, 3, ..., is made only for rows
that do not add up: the ratio of the two differences is the place of a single error. The element is
then rebuilt from the checksum and the others of its row, not by subtracting: after a large error
the sum has lost the digits that would be needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowtide.kmeans.protection import FaultReport, Protection

TILE = 128  # centroids under one checksum
# Limit of a row's sum, in units of ``u * sqrt(D + T) * |C| (2 |x| + |C|)``: twice the largest
# residual of 4.6 million fault-free rows (2.26), D from 1 to 3000, T from 1 to 128, both types,
# centred and not, heavy tails, 1e-15, repeated samples. No order of summation is taken for granted,
# so the unit grows with the number of terms, unlike that of a kernel whose order is known.
KAPPA = 5.0


@dataclass(frozen=True)
class Centres:
    """Centroids as the product takes them, (D, K + tiles).

    Attributes:
        columns: ``-2 c``, and for each tile the sum of its columns.
        starts: ``|c|^2``, and for each tile their sum; what the accumulators begin with.
        sizes: Of each tile, the Frobenius norm.
        longest: The largest norm of a centroid.
        firsts: int64 (K,), the first centroid equal to each, or None where no two are equal.
        n_clusters: K.
        protection: Checks to make.
    """

    columns: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor
    longest: float
    firsts: torch.Tensor | None
    n_clusters: int
    protection: Protection

    @classmethod
    def of(cls, centroids: torch.Tensor, protection: Protection) -> Centres:
        """Return (K, D) centroids made ready for a call."""
        wide = centroids.double()
        squares = wide.square().sum(1)
        columns, starts = -2 * wide, squares
        sizes = torch.zeros(0, dtype=torch.float64, device=wide.device)
        if protection.is_on:
            tiles = torch.stack([tile.sum(0) for tile in columns.split(TILE)])
            sums = torch.stack([tile.sum() for tile in starts.split(TILE)])
            columns, starts = torch.cat([columns, tiles]), torch.cat([starts, sums])
            sizes = sums.sqrt()
        return cls(
            columns.to(centroids.dtype).T.contiguous(),
            starts.to(centroids.dtype),
            sizes,
            float(squares.max().sqrt()),
            _firsts(centroids, squares),
            len(centroids),
            protection,
        )


def product(samples: torch.Tensor, centres: Centres) -> torch.Tensor:
    """Return ``|c|^2 - 2 x c`` for all samples and columns."""
    return torch.addmm(centres.starts, samples, centres.columns)


class Checked:
    """The distances of one block of samples to all centroids.

    Args:
        samples: (m, D), in the type that is computed in, around the same point as the centroids.
        centres: The centroids.
        report: Counts go here.
    """

    def __init__(self, samples: torch.Tensor, centres: Centres, report: FaultReport) -> None:
        self._samples = samples
        self._centres = centres
        self._report = report
        self._unit = torch.finfo(samples.dtype).eps / 2
        self._rebuilt: list[torch.Tensor] = []
        found = product(samples, centres)
        self._distances = found[:, : centres.n_clusters]
        self._checksums = found[:, centres.n_clusters :]

    def labels(self) -> torch.Tensor:
        """Return int64 (m,) labels; the lowest index wins a tie."""
        if not self._centres.protection.is_on:
            return self._first(self._distances.argmin(1))
        self._lengths = torch.linalg.vector_norm(self._samples, dim=1, dtype=torch.float64)
        for tile in range(len(self._centres.sizes)):
            self._check(tile)
        self._settle()
        smallest, chosen = self._distances.min(1)
        return self._first(self._winners_checked(smallest, chosen))

    def _first(self, chosen: torch.Tensor) -> torch.Tensor:
        # A library's products may round equal columns unlike each other, so they need not tie.
        return chosen if self._centres.firsts is None else self._centres.firsts[chosen]

    def _check(self, tile: int) -> None:
        """Compare a tile's rows with their checksums."""
        limits = self._limits(tile)
        distances = self._tile(tile)
        off = distances.sum(1, dtype=torch.float64) - self._checksums[:, tile]
        is_held = off.abs() <= limits  # not a number is not held
        self._count(off, limits, is_held)
        if bool(is_held.all()):
            return
        rows = (~is_held).nonzero()[:, 0]
        if self._centres.protection.mode == "detect":
            self._report.uncorrected += len(rows)
        elif self._centres.protection.mode == "recompute":
            self._recompute(rows)
        else:
            self._correct(tile, rows, off[rows], limits[rows])

    def _correct(
        self, tile: int, rows: torch.Tensor, off: torch.Tensor, limits: torch.Tensor
    ) -> None:
        """Rebuild the wrong element of each row where it can be told which; redo the others."""
        distances = self._tile(tile)[rows].double()
        columns, starts = self._wide(tile)
        count = distances.shape[1]
        weights = torch.arange(1, count + 1, dtype=torch.float64, device=distances.device)
        second = self._samples[rows].double() @ (columns @ weights) + starts @ weights
        # The second sum rounds by `count` times as much, which moves the place by less than a half.
        is_found = off.abs() > 2 * count * limits
        place = ((distances @ weights - second) / off).round()
        is_found &= (place >= 1) & (place <= count)
        index = torch.where(is_found, place, 1.0).long() - 1
        others = distances.scatter(1, index[:, None], 0.0)
        element = self._checksums[rows, tile].double() - others.sum(1)
        rebuilt = others.scatter(1, index[:, None], element[:, None])
        is_found &= (rebuilt @ weights - second).abs() <= count * limits
        values = element[is_found].to(self._samples.dtype)
        self._tile(tile)[rows[is_found], index[is_found]] = values
        self._report.corrected += int(is_found.sum())
        self._rebuilt.append(rows[is_found])
        self._recompute(rows[~is_found])

    def _settle(self) -> None:
        """Redo rebuilt rows whose two smallest are nearer than a rebuilt element is exact."""
        if not self._rebuilt or self._centres.n_clusters == 1:
            return
        rows = torch.cat(self._rebuilt).unique()
        two = self._distances[rows].topk(2, dim=1, largest=False).values.double()
        limit = torch.stack([self._limits(tile)[rows] for tile in range(len(self._centres.sizes))])
        self._recompute(rows[two[:, 1] - two[:, 0] <= 2 * limit.amax(0)], is_new=False)

    def _recompute(self, rows: torch.Tensor, *, is_new: bool = True) -> None:
        """Compute whole rows again in float64."""
        if not len(rows):
            return
        wide = self._samples[rows].double()
        for tile in range(len(self._centres.sizes)):
            columns, starts = self._wide(tile)
            again = (wide[:, :, None] * columns).sum(1) + starts  # no matrix product this time
            self._tile(tile)[rows] = again.to(self._samples.dtype)
        if is_new:
            self._report.recomputed += len(rows)

    def _winners_checked(self, smallest: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Compare the smallest values with the distances to the centroids they stand for."""
        columns, starts = self._centres.columns, self._centres.starts
        wide = self._samples.double()
        again = (wide * columns[:, chosen].T).sum(1) + starts[chosen]
        size = self._lengths + self._centres.longest
        limits = 2 * (self._samples.shape[1] + 4) * self._unit * size.square()
        off = smallest.double() - again
        is_held = off.abs() <= limits
        self._count(off, limits, is_held)
        if bool(is_held.all()):
            return chosen
        rows = (~is_held).nonzero()[:, 0]
        if self._centres.protection.mode == "detect":
            self._report.uncorrected += len(rows)
            return chosen
        self._recompute(rows)
        chosen[rows] = self._distances[rows].argmin(1)
        return chosen

    def _count(self, off: torch.Tensor, limits: torch.Tensor, is_held: torch.Tensor) -> None:
        report = self._report
        report.checks += len(off)
        report.detected += len(off) - int(is_held.sum())
        ratios = torch.where(is_held & (limits > 0), off.abs() / limits, 0.0)
        report.max_residual = max(report.max_residual, float(ratios.max()))

    def _tile(self, tile: int) -> torch.Tensor:
        return self._distances[:, tile * TILE : (tile + 1) * TILE]

    def _wide(self, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = slice(tile * TILE, min((tile + 1) * TILE, self._centres.n_clusters))
        return self._centres.columns[:, place].double(), self._centres.starts[place].double()

    def _limits(self, tile: int) -> torch.Tensor:
        """What rounding may do to a row's sum, (m,): see `KAPPA`."""
        size = self._centres.sizes[tile]
        kappa = self._centres.protection.kappa or KAPPA
        terms = math.sqrt(self._samples.shape[1] + self._tile(tile).shape[1])
        return kappa * terms * self._unit * size * (2 * self._lengths + size)


def _firsts(centroids: torch.Tensor, squares: torch.Tensor) -> torch.Tensor | None:
    if len(squares.unique()) == len(squares):
        return None
    kinds, kind = torch.unique(centroids, dim=0, return_inverse=True)
    places = torch.arange(len(centroids), device=centroids.device)
    firsts = torch.full((len(kinds),), len(centroids), device=centroids.device)
    return firsts.scatter_reduce(0, kind, places, "amin")[kind]
