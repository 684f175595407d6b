"""How good the cost model of tensor parallelism is: this machine's link, and published figures.

1. Collectives between two ranks of this machine (NCCL where there are two GPUs, else gloo on CPU),
   sizes in random order, medians. A link is fitted on every second size and predicts the others.
2. The model of four A100 against the figures that the authors of BOOST published; * marks what was
   fitted, everything else the model has not seen.
3. What the model says of one block of 7B, full rank with sequence parallelism and naive low rank
   with joint messages and overlap, over ours. Modelled, not measured.
4. With a GPU: GEMMs of the exact shard shapes (CUDA events, L2 flushed, median and quartiles),
   and 3 again with these times in place of modelled ones.

A link of gloo on a CPU says nothing about NVLink; it shows that the fit predicts sizes it has not
seen, or how far off it is.

    python benchmarks/bench_tensor_parallel_link.py [--repeats 31]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensor_parallel_published as published
import torch
import torch.distributed
import torch.multiprocessing
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lowtide.tensor_parallel.costs import LinkSample, Machine, fit_link, machine
from lowtide.tensor_parallel.timing import Batch, block_time
from lowtide.tensor_parallel.traffic import BOTTLENECK, SCHEMES, Kind, Pass
from lowtide.tensor_parallel.work import PASSES, block_linears

RANKS = 2
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = [4 * RANKS * round(10 ** (3 + step / 3) / 4 / RANKS) for step in range(14)]  # bytes
WARM_UP = 2
GEMM_REPEATS = 40
GROUPS = (2, 4, 8)
FLUSH_BYTES = 256 << 20  # more than any L2

Times = dict[tuple[Kind, int], list[float]]


def table(title: str, *headings: str) -> Table:
    made = Table(title=title, box=SIMPLE, pad_edge=False, title_justify="left")
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return made


def collective(kind: Kind, size: int, device: torch.device) -> Callable[[], Any]:
    """Return a call of one collective with a payload of `size` bytes."""
    whole = torch.zeros(size // 4, device=device)
    part = torch.zeros(size // 4 // RANKS, device=device)
    if kind == "all_reduce":
        return lambda: torch.distributed.all_reduce(whole)
    # Newer names first; torch 2.13 warns of the older ones.
    of_torch = torch.distributed
    if kind == "all_gather":
        gather = getattr(of_torch, "all_gather_single", None) or of_torch.all_gather_into_tensor
        return lambda: gather(whole, part)
    scatter = getattr(of_torch, "reduce_scatter_single", None) or of_torch.reduce_scatter_tensor
    return lambda: scatter(part, whole)


def sweep(rank: int, store: str, backend: str, repeats: int) -> None:
    """Run every collective at every size, interleaved; rank 0 leaves its times beside the store."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    calls = {(kind, size): collective(kind, size, device) for kind in KINDS for size in SIZES}
    order = list(calls)
    generator = random.Random(0)  # the same on every rank
    times: Times = {key: [] for key in order}
    for repeat in range(WARM_UP + repeats):
        generator.shuffle(order)
        for key in order:
            torch.distributed.barrier()
            begin_s = time.perf_counter()
            calls[key]()
            if backend == "nccl":
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                times[key].append(time.perf_counter() - begin_s)
    if rank == 0:
        torch.save(times, store + ".times")
    torch.distributed.destroy_process_group()


def measured_link(console: Console, repeats: int) -> None:
    """Print times of this machine's collectives and what the fitted links say of them."""
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(sweep, (store, backend, repeats), nprocs=RANKS)
        times: Times = torch.load(store + ".times")
    shown = table(
        f"{backend}, {RANKS} ranks: median ms of {repeats}, and the error of the link fitted on "
        "every second size (* held out)",
        "bytes",
        *(heading for kind in KINDS for heading in (kind, "error")),
    )
    samples = {
        key: LinkSample(
            kind=key[0],
            ranks=RANKS,
            payload_bytes=key[1],
            seconds=statistics.median(values),
        )
        for key, values in times.items()
    }
    links = {kind: fit_link([samples[kind, size] for size in SIZES[::2]]) for kind in KINDS}
    for place, size in enumerate(SIZES):
        cells = []
        for kind in KINDS:
            sample = samples[kind, size]
            cells += [f"{sample.seconds * 1e3:.3f}", f"{links[kind].error(sample):+.0%}"]
        shown.add_row(f"{size}{'*' if place % 2 else ' '}", *cells)
    console.print(shown)
    for kind, link in links.items():
        errors = [abs(link.error(samples[kind, size])) for size in SIZES[1::2]]
        console.print(
            f"{kind}: {link.alpha_s * 1e6:.0f} us a hop, {link.beta_bytes_per_s / 1e9:.2f} GB/s, "
            f"median error {link.residual:.0%} on fitted sizes, "
            f"{statistics.median(errors):.0%} (at most {max(errors):.0%}) on held-out ones"
        )


def published_figures(console: Console) -> None:
    """Print the authors' figures beside the model's."""
    shown = table("Published > modelled: seconds an iteration", "model", "TPxPP")
    for name in published.PUBLISHED_SCHEMES:
        shown.add_column(name, justify="right")
        shown.add_column("error", justify="right")
    for heading in ("full/BOOST", "vanilla/BOOST"):
        shown.add_column(heading, justify="right")
    for row in published.ITERATIONS:
        found = {
            name: published.iteration_s(row, scheme)
            for name, scheme in published.PUBLISHED_SCHEMES.items()
        }
        cells = []
        for name, seconds in row.published_s.items():
            cells += [f"{seconds:.2f} > {found[name]:.2f}", f"{found[name] / seconds - 1:+.0%}"]
        for name in ("full rank", "vanilla"):
            ratio = row.published_s[name] / row.published_s["BOOST"]
            cells.append(f"{ratio:.2f} > {found[name] / found['BOOST']:.2f}")
        shown.add_row(row.model, f"{row.ranks}x{row.stages}", *cells)
    console.print(shown)
    shown = table("Published > modelled: parts of 7B on four A100", "what", "published", "modelled")
    shown.add_column("error", justify="right")
    for part in published.parts():
        name = part.name + ("*" if part.is_fitted else "")
        error = f"{part.modelled / part.published - 1:+.0%}"
        shown.add_row(name, f"{part.published:.4g}", f"{part.modelled:.4g}", error)
    console.print(shown)


def blocks(console: Console, title: str, machines: Mapping[str, Machine]) -> None:
    """Print modelled times of one block of 7B, over ours."""
    decoder = published.authors_decoder("llama-7b")
    shown = table(title, "machine", "p", "batch", "ours ms")
    for scheme in SCHEMES[:-1]:
        shown.add_column(f"{scheme.name} / ours", justify="right")
    for name, made in machines.items():
        for ranks in GROUPS:
            for sequences in (1, 4):
                batch = Batch(micro_batch=sequences, sequence=published.SEQUENCE)
                times = [
                    block_time(decoder.block, ranks, scheme, batch=batch, machine=made).total_s
                    for scheme in SCHEMES
                ]
                ratios = [f"{seconds / times[-1]:.2f}" for seconds in times[:-1]]
                shown.add_row(name, str(ranks), str(sequences), f"{times[-1] * 1e3:.2f}", *ratios)
    console.print(shown)


def gemm_s(shape: tuple[int, int, int], which: Pass, flush: torch.Tensor) -> Sequence[float]:
    """Return the quartiles of the time of a bf16 GEMM [m,k] x [k,n], with a cold L2.

    The operands lie in memory as training has them: weights as [out,in], activations by token.
    """
    m, k, n = shape

    def operand(rows: int, columns: int, *, is_transposed: bool) -> torch.Tensor:
        size = (columns, rows) if is_transposed else (rows, columns)
        made = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return made.t() if is_transposed else made

    x = operand(m, k, is_transposed=which == "weight_gradient")
    w = operand(k, n, is_transposed=which == "forward")
    times = []
    for repeat in range(WARM_UP + GEMM_REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.matmul(x, w)
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.quantiles(times, n=4)


def measured_gemms(console: Console) -> None:
    """Print measured GEMMs of four ranks, and blocks that are made from those of all ranks."""
    block = published.authors_decoder("llama-7b").block
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    name = torch.cuda.get_device_name(0)
    known = next((gpu for gpu in ("H200", "H100", "A100") if gpu in name), "A100")
    made = machine(known)
    shown = table(f"{name}: GEMMs of 7B on four ranks, 4 sequences (model: {known})", "m x k x n")
    for heading in ("used by", "median ms", "quartiles", "of peak", "modelled ms", "error"):
        shown.add_column(heading, justify="right")
    measured: dict[tuple[int, int, int], float] = {}
    for ranks in GROUPS:
        for scheme in SCHEMES:
            for sequences in (1, 4):
                for layer in block_linears(block, ranks, scheme):
                    for which in PASSES:
                        shape = layer.gemm(sequences * published.SEQUENCE, which)
                        if shape in measured:
                            continue
                        low, measured[shape], high = gemm_s(shape, which, flush)
                        if (ranks, sequences, which) != (4, 4, "forward"):
                            continue
                        modelled_s, seconds = made.gemms.seconds(shape), measured[shape]
                        flops = 2.0 * shape[0] * shape[1] * shape[2]
                        shown.add_row(
                            " x ".join(map(str, shape)),
                            f"{scheme.layout} {layer.where} {layer.part}",
                            f"{seconds * 1e3:.3f}",
                            f"{low * 1e3:.3f}-{high * 1e3:.3f}",
                            f"{flops / seconds / made.gpu.peak_flops_per_s:.0%}",
                            f"{modelled_s * 1e3:.3f}",
                            f"{modelled_s / seconds - 1:+.0%}",
                        )
    console.print(shown)
    errors = [abs(made.gemms.seconds(shape) / t - 1.0) for shape, t in measured.items()]
    console.print(
        f"{len(errors)} shapes, median error of the model {statistics.median(errors):.0%}"
    )
    gemms = dataclasses.replace(made.gemms, measured=measured)
    title = "One block of 7B with measured GEMMs, the rest modelled"
    blocks(console, title, {f"{known}, measured GEMMs": made.replace(gemms=gemms)})


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31, help="of every size of a collective")
    options = parser.parse_args()
    console = Console(width=120)
    measured_link(console, options.repeats)
    published_figures(console)
    machines = {name: machine(name) for name in ("A100-80GB", "H100-80GB")}
    blocks(console, f"One block of 7B, modelled; ours: {BOTTLENECK.name}", machines)
    if torch.cuda.is_available():
        measured_gemms(console)


if __name__ == "__main__":
    main()
