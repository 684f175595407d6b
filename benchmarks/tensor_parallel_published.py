"""Published figures of BOOST, and the planner's cost model fitted to a few and held to the rest.

Numbers: the README of the authors' code (repository Arcana-2236/BOOST, 2026-03) and Table 2 of the
paper (arXiv 2512.12131) as quoted by others. They are the authors', not measured here: four A100
with 80 GB, linked in pairs by NVLink of 100 GB/s, sequences of 4096, r = d/4, bf16.

Fitted: two constants of GEMMs on four utilisations, two of messages on four of seven times. All
iteration times, all layer times, all GEMM times and three message times are held out.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from lowtide.tensor_parallel.costs import (
    Link,
    LinkSample,
    Machine,
    fit_link,
    machine,
)
from lowtide.tensor_parallel.footprint import DecoderShape
from lowtide.tensor_parallel.presets import PRESETS
from lowtide.tensor_parallel.timing import Batch, block_time, end_time, update_s
from lowtide.tensor_parallel.traffic import BOTTLENECK, FULL_RANK, NAIVE, Scheme
from lowtide.tensor_parallel.work import block_linears

SEQUENCE = 4096
PAIR_BYTES_PER_S = 100e9  # four links of 25 GB/s between any two GPUs of the authors' nodes
MIB = 2.0**20

# The authors reduce d instead of gathering and scattering it, and overlap nothing.
PUBLISHED_SCHEMES: dict[str, Scheme] = {
    "full rank": dataclasses.replace(FULL_RANK, has_sequence_parallel=False, is_overlapped=False),
    "vanilla": dataclasses.replace(NAIVE, has_joint_outputs=False, is_overlapped=False),
    "BOOST": dataclasses.replace(BOTTLENECK, is_overlapped=False),
}


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One row of the authors' table: seconds per iteration of one micro-batch of 4 sequences."""

    model: str
    ranks: int
    stages: int
    published_s: dict[str, float]


def _row(model: str, ranks: int, stages: int, *seconds: float) -> Iteration:
    published = dict(zip(PUBLISHED_SCHEMES, seconds, strict=True))
    return Iteration(model=model, ranks=ranks, stages=stages, published_s=published)


# 30B is left out: its configuration is not published.
ITERATIONS = (
    _row("llama-1b", 1, 1, 0.85, 0.56, 0.59),
    _row("llama-3b", 2, 1, 1.14, 1.41, 0.78),
    _row("llama-7b", 4, 1, 1.06, 1.64, 0.72),
    _row("llama-13b", 4, 2, 2.07, 2.42, 1.30),
)

# 7B, four sequences on four GPUs: name -> (m, k, n) of the GEMMs it may mean, published share.
UTILISATIONS: dict[str, tuple[tuple[tuple[int, int, int], ...], float]] = {
    "attention, vanilla": (((16384, 4096, 256), (16384, 256, 4096)), 0.59),
    "MLP, vanilla": (((16384, 4096, 256), (16384, 256, 11008)), 0.59),
    "attention, BOOST": (((16384, 1024, 1024),), 0.70),
    "MLP, BOOST": (((16384, 1024, 2752),), 0.75),
}


def _sample(seconds: float, *payload_mib: float) -> LinkSample:
    return LinkSample(
        kind="all_reduce",
        ranks=4,
        payload_bytes=sum(payload_mib) * MIB,
        seconds=seconds,
        messages=len(payload_mib),
    )


# Payloads follow from the shapes: one latent of 7B is 8 MiB with one sequence, 32 MiB with four.
MESSAGES: dict[str, LinkSample] = {
    "gate+up, one message": _sample(218e-6, 16),
    "gate+up, two messages": _sample(266e-6, 8, 8),
    "q+k+v, one message": _sample(288e-6, 24),
    "q+k+v, three messages": _sample(406e-6, 8, 8, 8),
    "block, full rank": _sample(2.01e-3, 128, 128),
    "block, vanilla": _sample(9.87e-3, 128, 128, 128, 128, 344, 344, 128),
    "block, BOOST": _sample(1.85e-3, 96, 32, 64, 32),
}
MESSAGES_FITTED = ("gate+up, two messages", "q+k+v, one message", "block, vanilla", "block, BOOST")

# Table 2, one sequence: the GEMMs of a group; one and four: a whole layer, taken to be its forward,
# since three times 32 of them make the iteration.
GROUPED = {"gate_up": 292e-6, "qkv": 255e-6}
LAYER_FORWARD_S = {1: 2395e-6, 4: 7266e-6}
GEMM_S = {"attention, vanilla": 0.20e-3, "attention, BOOST": 0.16e-3}


def fit_gemms() -> tuple[float, float]:
    """Return (peak_share, memory_share) that fit the four utilisations best, by least squares.

    One over the utilisation is linear in one over peak_share and in memory_share.
    """
    gpu = machine("A100-80GB").gpu
    rows, wanted = [], []
    for shapes, share in UTILISATIONS.values():
        flops = sum(2.0 * m * k * n for m, k, n in shapes)
        moved = sum(2.0 * (m * k + k * n + m * n) for m, k, n in shapes)
        memory_s, peak_s = moved / gpu.memory_bytes_per_s, flops / gpu.peak_flops_per_s
        rows.append((share, share * memory_s / peak_s))
        wanted.append(1.0)
    found = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return float(1.0 / found[0]), float(found[1])


@functools.cache
def fitted_link() -> Link:
    """Return the link that fits four of the message times."""
    return fit_link([MESSAGES[name] for name in MESSAGES_FITTED])


def authors_machine(ranks: int) -> Machine:
    """Return the modelled machine of the authors: a ring of `ranks` uses the links of ranks - 1."""
    fitted = fitted_link()
    share = fitted.beta_bytes_per_s / (3 * PAIR_BYTES_PER_S)
    beta = share * PAIR_BYTES_PER_S * max(ranks - 1, 1)
    peak_share, memory_share = fit_gemms()
    made = machine("A100-80GB")
    gemms = dataclasses.replace(made.gemms, peak_share=peak_share, memory_share=memory_share)
    link = Link(alpha_s=fitted.alpha_s, beta_bytes_per_s=beta)
    return made.replace(name="authors' A100", link=link, gemms=gemms)


def authors_decoder(model: str) -> DecoderShape:
    """Return a model with r = d/4, and the tied embedding that the authors' files have."""
    shape = PRESETS[model]
    return dataclasses.replace(shape, is_tied=True).decoder(shape.width // 4)


def iteration_s(row: Iteration, scheme: Scheme) -> float:
    """Return the modelled time of an iteration; stages work one after another on one micro-batch.

    The update of a stage's parameters runs at once on all stages.
    """
    decoder, batch = authors_decoder(row.model), Batch(micro_batch=4, sequence=SEQUENCE)
    made = authors_machine(row.ranks)
    block = block_time(decoder.block, row.ranks, scheme, batch=batch, machine=made)
    ends = end_time(decoder, row.ranks, scheme, batch=batch, machine=made)
    update = update_s(decoder, row.ranks, scheme, made) / row.stages
    return decoder.layers * block.total_s + ends.total_s + update


@dataclass(frozen=True, kw_only=True)
class Part:
    """One published figure of a part of 7B on four GPUs, and the model's."""

    name: str
    published: float
    modelled: float
    is_fitted: bool = False


def parts() -> list[Part]:
    """Return all published figures below a whole iteration, the fitted ones among them."""
    made = authors_machine(4)
    block = authors_decoder("llama-7b").block
    found = []
    for name, (shapes, share) in UTILISATIONS.items():
        flops = sum(2.0 * m * k * n for m, k, n in shapes)
        seconds = sum(made.gemms.body_s(shape) for shape in shapes)
        modelled = flops / seconds / made.gpu.peak_flops_per_s
        found.append(
            Part(name=f"{name}: of peak", published=share, modelled=modelled, is_fitted=True)
        )
    for name, sample in MESSAGES.items():
        is_fitted = name in MESSAGES_FITTED
        predicted_s = sample.seconds * (1.0 + made.link.error(sample))
        found.append(
            Part(
                name=f"{name}: ms sending",
                published=sample.seconds * 1e3,
                modelled=predicted_s * 1e3,
                is_fitted=is_fitted,
            )
        )
    for name, seconds in GEMM_S.items():
        modelled = made.gemms.seconds(UTILISATIONS[name][0][0])
        found.append(Part(name=f"{name}: ms", published=seconds * 1e3, modelled=modelled * 1e3))
    for where, seconds in GROUPED.items():
        layers = [layer for layer in block_linears(block, 4, BOTTLENECK) if layer.where == where]
        shapes_s = [
            made.gemms.seconds(layer.gemm(SEQUENCE, "forward"), layer.count) for layer in layers
        ]
        name = f"{where} of one sequence: ms of GEMMs"
        found.append(Part(name=name, published=seconds * 1e3, modelled=sum(shapes_s) * 1e3))
    for sequences, seconds in LAYER_FORWARD_S.items():
        batch = Batch(micro_batch=sequences, sequence=SEQUENCE)
        scheme = PUBLISHED_SCHEMES["BOOST"]
        modelled = block_time(block, 4, scheme, batch=batch, machine=made).forward.total_s
        name = f"layer forward, {sequences} sequence(s): ms"
        found.append(Part(name=name, published=seconds * 1e3, modelled=modelled * 1e3))
    return found
