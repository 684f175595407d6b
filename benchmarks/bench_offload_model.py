"""How good the planner's model is: against published curves, against the bound, and how fast.

1. The lane simulator, with the order of events of the published artifact, against the authors'
   update throughputs by stride (strides 3 and 6 held out of the fit).
2. Predicted update times of the planner for a thousand subgroups, against the lower bound: the
   slowest lane of the best division ("ratio"), and the same with fair sharing of the host's memory
   taken into account ("fair"). "gradient": bytes per parameter that go to the device.
3. Time to make a plan.

Nothing here runs on a GPU: 1 compares with the authors' numbers, 2 is modelled from data sheets.

    python benchmarks/bench_offload_model.py [--plans 50]
"""

from __future__ import annotations

import argparse
import statistics
import time

from offload_published import FITTED, HELD_OUT, STRIDES, THROUGHPUT, fit
from rich.console import Console
from rich.table import Table

from lowtide.core.native import status
from lowtide.offload.fluid import kinds_of, lower_bound_s
from lowtide.offload.plan import Piece, make_plan
from lowtide.offload.rates import Rates, profile

EMULATED = Rates(
    host_to_device_bytes_per_s=1.0e9,
    device_to_host_bytes_per_s=1.0e9,
    host_params_per_s=40e6,
    device_params_per_s=1e9,
    launch_s=1e-4,
)


def published(console: Console) -> None:
    """Print the fitted curves."""
    for name in THROUGHPUT:
        found = fit(name)
        bandwidth = found.host_memory_bytes_per_s / 1e9
        table = Table(
            title=f"4 x {name}: Bparam/s by stride, published > model (0: stock, fitted exactly)"
        )
        columns = [f"k={k}{'*' if k in HELD_OUT else ''}" for k in STRIDES]
        for column in ["model", *columns, "Adam 1e9/s", "downcast 1e9/s"]:
            table.add_column(column, justify="right")
        for row in found.rows:
            pairs = zip(row.published, row.predicted, strict=True)
            rates = (row.host_params_per_s / 1e9, row.downcast_params_per_s / 1e9)
            table.add_row(
                f"{row.billions}B",
                *(f"{a} > {b:.1f}" for a, b in pairs),
                *(f"{r:.2f}" for r in rates),
            )
        console.print(table)
        without = fit(name, has_memory_limit=False)
        console.print(
            f"{name}: mean error {found.mean_error(HELD_OUT):.1%} on held-out strides (*), "
            f"{found.mean_error(FITTED):.1%} on fitted ones, host memory {bandwidth:.0f} GB/s a "
            f"rank; without a memory limit {without.mean_error(HELD_OUT):.1%} and "
            f"{without.mean_error(FITTED):.1%}"
        )


def planner(console: Console, plans: int) -> None:
    """Print predicted times against the bound, and the time to plan."""
    table = Table(title="1000 subgroups of 20M parameters (modelled)")
    for column in [
        "rates",
        "memory",
        "gradient",
        "fraction",
        "residents",
        "update",
        "bound",
        "ratio",
        "x slowest lane",
        "plan",
    ]:
        table.add_column(column, justify="right")
    named = {
        "H100, 1 rank": profile("H100-80GB").rates(),
        "H100, 4 ranks": profile("H100-80GB").rates(ranks=4),
        "A100, 4 ranks": profile("A100-80GB").rates(ranks=4),
        "emulated": EMULATED,
    }
    for name, rates in named.items():
        for memory, gradient in ((1e9, 4), (16e9, 4), (16e9, 0)):
            pieces = [Piece(numel=20_000_000, gradient_upload_bytes=gradient)] * 1000
            times = []
            for _ in range(plans):
                begin_s = time.perf_counter()
                plan = make_plan(pieces, rates, memory_bytes=memory)
                times.append(time.perf_counter() - begin_s)
            makespan_s, bound_s = plan.makespan_s or 0.0, plan.lower_bound_s or 0.0
            kinds = kinds_of(pieces)
            lane_s = lower_bound_s(kinds, rates, memory_bytes=memory)
            table.add_row(
                name,
                f"{memory / 1e9:.0f} GB",
                str(gradient),
                f"{plan.fraction:.3f}",
                str(len(plan.residents)),
                f"{makespan_s:.3f} s",
                f"{bound_s:.3f} s",
                f"{makespan_s / bound_s:.3f}",
                f"{makespan_s / lane_s:.3f}",
                f"{statistics.median(times) * 1e3:.2f} ms",
            )
    console.print(table)
    console.print(f"simulator: {'native' if status().available else 'Python reference'}")


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=50, help="plans timed for each line")
    options = parser.parse_args()
    console = Console(width=120)
    published(console)
    planner(console, options.plans)


if __name__ == "__main__":
    main()
