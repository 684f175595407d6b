"""`lowtide.sz` beside the error-bounded codecs that people use, at the same absolute bounds.

Every codec gets the same arrays and the same bound, `r` times the range of the field, in turn in
one process and one thread. Sizes hold everything that decoding needs. What comes back is checked
in float64: elements outside the bound are counted, whatever the codec says of itself. Speeds are
MB (1e6 bytes) of the array per second of processor time, medians. Rivals that are not installed
are left out.

The last table compares at equal PSNR: the size that `lowtide.sz` with the goal "psnr" needs for the
PSNR that each rival reached, interpolated between the bounds that it was run at.

    python benchmarks/bench_compression.py [--edge 192] [--fields FOLDER] [--rounds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compression_fields import all_fields
from compression_rivals import Array, Candidate, candidates, ours
from rich.console import Console
from rich.table import Table

BOUNDS = (1e-2, 1e-3, 1e-4)
CURVE = tuple(10 ** (-exponent / 4) for exponent in range(4, 22))  # 1e-1 to 5.6e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one codec did with one field at one bound."""

    ratio: float
    outside: int
    largest: float  # error, relative to the bound
    psnr_db: float
    encode_mb_per_s: float
    decode_mb_per_s: float


def measured(candidate: Candidate, values: Array, bound: float, rounds: int) -> Result:
    """Encode and decode some times and check what came back."""
    encode_s, decode_s = [], []
    for _ in range(rounds):
        begin_s = time.process_time()
        blob = candidate.encode(values, bound)
        middle_s = time.process_time()
        decoded = candidate.decode(blob, values.shape)
        encode_s.append(middle_s - begin_s)
        decode_s.append(time.process_time() - middle_s)
    error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    spread = float(values.max()) - float(values.min())
    rmse = math.sqrt(float(np.mean(error**2)))
    megabytes = values.nbytes / 1e6
    return Result(
        ratio=values.nbytes / candidate.size(blob),
        outside=int(np.count_nonzero(~(error <= bound))),
        largest=float(error.max()) / bound,
        psnr_db=20 * math.log10(spread / rmse) if rmse else math.inf,
        encode_mb_per_s=megabytes / statistics.median(encode_s),
        decode_mb_per_s=megabytes / statistics.median(decode_s),
    )


def main() -> None:
    """Print a table for each field and the means over all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=192, help="points per axis of the made field")
    parser.add_argument("--fields", type=Path, help="folder of .npy files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so many threads lowtide.sz uses
    console = Console(width=110)
    codecs = candidates()
    gains: dict[tuple[str, float], list[float]] = {}
    at_psnr: dict[tuple[str, float], list[float]] = {}
    for field, values in all_fields(options.edge, options.fields):
        spread = float(values.max()) - float(values.min())
        curve = [measured(ours(goal="psnr"), values, r * spread, 1) for r in CURVE]
        curve = [point for point in curve if math.isfinite(point.psnr_db)]
        table = Table(title=f"{field}, {values.shape}, {values.nbytes / 1e6:.1f} MB")
        for column in ("r", "codec", "ratio", "outside", "error/bound", "PSNR", "enc MB/s", "dec"):
            table.add_column(column, justify="left" if column == "codec" else "right")
        for r in BOUNDS:
            bound = r * spread
            results = {c.name: measured(c, values, bound, options.rounds) for c in codecs}
            best = results[codecs[0].name].ratio
            for name, found in results.items():
                gains.setdefault((name, r), []).append(math.log(best / found.ratio))
                if curve and curve[0].psnr_db <= found.psnr_db <= curve[-1].psnr_db:
                    reached = np.interp(
                        found.psnr_db,
                        [point.psnr_db for point in curve],
                        [math.log(point.ratio) for point in curve],
                    )
                    gain = float(reached) - math.log(found.ratio)
                    at_psnr.setdefault((name, r), []).append(gain)
                table.add_row(
                    f"{r:g}", name, f"{found.ratio:.2f}", str(found.outside),
                    f"{found.largest:.4f}", f"{found.psnr_db:.1f}",
                    f"{found.encode_mb_per_s:.0f}", f"{found.decode_mb_per_s:.0f}",
                )  # fmt: skip
            table.add_section()
        console.print(table)
    means_table(console, "at the same bound", codecs[1:], gains)
    means_table(console, "at the PSNR of the other", codecs[1:], at_psnr)


def means_table(
    console: Console,
    what: str,
    codecs: Sequence[Candidate],
    gains: Mapping[tuple[str, float], Sequence[float]],
) -> None:
    """Print how much larger the ratio of `lowtide.sz` is, and over how many fields that is."""
    table = Table(title=f"ratio of lowtide.sz over that of others {what}, mean over the fields")
    table.add_column("codec")
    for r in BOUNDS:
        table.add_column(f"r = {r:g}", justify="right")
    for codec in codecs:
        cells = []
        for r in BOUNDS:
            found = gains.get((codec.name, r), ())
            mean = f"{math.exp(statistics.fmean(found)):.2f}x ({len(found)})" if found else "-"
            cells.append(mean)
        table.add_row(codec.name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
