"""How long a message, a GEMM and a memory-bound kernel take: measured, or modelled.

Everything that is not measured comes from a data sheet and a few constants that hold for all
shapes. They are fitted on a few figures of BOOST's evaluation (four A100, arXiv 2512.12131, and
the README of its code) or assumed, as said at each; `benchmarks/tensor_parallel_published.py`
repeats the fit and compares the model with the figures that it has not seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowtide.core.errors import ConfigError, UnknownNameError, listed, near
from lowtide.tensor_parallel.traffic import Kind, hops, wire_bytes

# Fitted on the utilisations that BOOST's README gives for four GEMM shapes.
PEAK_SHARE = 0.86
"""Share of the data sheet's peak that a GEMM without memory traffic would reach."""
MEMORY_IN_GEMM = 0.85
"""A GEMM's memory time, at the data sheet's bandwidth, that its arithmetic does not hide."""
# Fitted on four of the seven message times that BOOST gives.
LINK_SHARE = 0.75
"""Share of the data sheet's bandwidth (one direction) that a ring reaches."""
HOP_S = 13e-6
"""Fixed time of one step of a ring."""
# Assumed.
HOPPER_PEAK_SHARE = 0.72
"""The same as `PEAK_SHARE` for H100 and H200, whose clock falls under load; not fitted."""
MEMORY_SHARE = 0.8
"""Share of the memory's data-sheet bandwidth that a streaming kernel reaches."""
ATTENTION_SHARE = 0.5
"""Share of the peak that causal flash attention reaches, masked products not counted."""
KERNEL_S = 5e-6
"""Fixed time of a kernel."""

_HUBER = 1.345  # residuals beyond this many deviations count linearly
_ROUNDS = 50
_LEAST_SHARE = 1e-6  # of the longest time that the bytes must explain


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSample:
    """A measured time of one or more collectives in a row.

    Attributes:
        kind: Which collective.
        ranks: In the group.
        payload_bytes: The whole tensor, all messages together.
        seconds: Time of all messages.
        messages: How many.
    """

    kind: Kind
    ranks: int
    payload_bytes: float
    seconds: float
    messages: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Time of a collective on a ring: hops x alpha + wire bytes / beta.

    Attributes:
        alpha_s: Fixed time of one hop; an all-reduce of p ranks has 2 (p-1).
        beta_bytes_per_s: What one rank sends.
        residual: Median relative error on what it was fitted to; None: not fitted.
    """

    alpha_s: float
    beta_bytes_per_s: float
    residual: float | None = None

    def seconds(self, kind: Kind, payload_bytes: float, ranks: int) -> float:
        """Return the time of one message; 0 with one rank."""
        wire = wire_bytes(kind, payload_bytes, ranks)
        return hops(kind, ranks) * self.alpha_s + wire / self.beta_bytes_per_s

    def error(self, sample: LinkSample) -> float:
        """Return the relative error of the predicted time of a sample, with its sign."""
        fixed_s = self.alpha_s * hops(sample.kind, sample.ranks) * (sample.messages - 1)
        predicted_s = self.seconds(sample.kind, sample.payload_bytes, sample.ranks) + fixed_s
        return predicted_s / sample.seconds - 1.0


def fit_link(samples: Sequence[LinkSample]) -> Link:
    """Fit a link to measured times, by robust least squares of the relative error.

    Args:
        samples: At least three, over a range of sizes.

    Raises:
        ConfigError: There are too few samples, one is of a single rank or has a time that is not
            positive, or the times do not grow with the sizes.
    """
    if len(samples) < 3:
        raise ConfigError(f"samples: got {len(samples)}, allowed are 3 or more to fit a link")
    for sample in samples:
        if sample.ranks < 2 or not (sample.seconds > 0 and math.isfinite(sample.seconds)):
            raise ConfigError(
                f"samples: got {sample}, allowed are 2 or more ranks and a positive time"
            )
    fixed = [sample.messages * hops(sample.kind, sample.ranks) for sample in samples]
    wire = [wire_bytes(sample.kind, sample.payload_bytes, sample.ranks) for sample in samples]
    seconds = np.array([sample.seconds for sample in samples])
    columns = np.stack([np.array(fixed) / seconds, np.array(wire) / seconds], axis=1)
    alpha_s, per_byte_s = _robust(columns)
    if per_byte_s * max(wire) < _LEAST_SHARE * float(seconds.max()):
        raise ConfigError(
            "samples: their times do not grow with their sizes, so no bandwidth can be fitted; "
            "measure larger messages"
        )
    errors = np.abs(columns @ (alpha_s, per_byte_s) - 1.0)
    return Link(
        alpha_s=alpha_s, beta_bytes_per_s=1.0 / per_byte_s, residual=float(np.median(errors))
    )


def _robust(columns: np.ndarray) -> tuple[float, float]:
    """Return the coefficients, not negative, with which `columns` come closest to 1 everywhere."""
    weights = np.ones(len(columns))
    found = np.zeros(2)
    for _ in range(_ROUNDS):
        before = found
        found = _least_squares(columns, weights)
        residuals = np.abs(columns @ found - 1.0)
        deviation = max(1.4826 * float(np.median(residuals)), 1e-12)
        weights = 1.0 / np.maximum(residuals / (_HUBER * deviation), 1.0)
        if np.allclose(found, before, rtol=1e-9, atol=0.0):
            break
    return float(found[0]), float(found[1])


def _least_squares(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    roots = np.sqrt(weights)
    scale = np.abs(columns).max(axis=0)  # the columns differ by ten orders of magnitude
    matrix = columns / scale * roots[:, None]
    found = np.linalg.lstsq(matrix, roots, rcond=None)[0]
    if (found < 0).any():  # one of two coefficients: what is left is a fit of the other alone
        kept = int(np.argmax(found))
        found = np.zeros(2)
        found[kept] = matrix[:, kept] @ roots / (matrix[:, kept] @ matrix[:, kept])
    return found / scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        memory_bytes: Device memory.
        peak_flops_per_s: Dense bf16.
        memory_bytes_per_s: Of the device memory.
        link_bytes_per_s: NVLink, one direction, to all peers together.
        peak_share: Share of the peak that a GEMM without memory traffic reaches.
    """

    memory_bytes: float
    peak_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    peak_share: float = PEAK_SHARE


GPUS: dict[str, Gpu] = {
    "A100-40GB": Gpu(
        memory_bytes=40e9,
        peak_flops_per_s=312e12,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=300e9,
    ),
    "A100-80GB": Gpu(
        memory_bytes=80e9,
        peak_flops_per_s=312e12,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
    ),
    "H100-80GB": Gpu(
        memory_bytes=80e9,
        peak_flops_per_s=989e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        peak_share=HOPPER_PEAK_SHARE,
    ),
    "H200-141GB": Gpu(
        memory_bytes=141e9,
        peak_flops_per_s=989e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        peak_share=HOPPER_PEAK_SHARE,
    ),
}
"""GPUs by name (SXM boards)."""
_SHORT = {"a100": "A100-80GB", "h100": "H100-80GB", "h200": "H200-141GB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmRates:
    """Time of a bf16 GEMM: from a table where it was measured, else modelled.

    The model is arithmetic time plus a share of the memory time, so the share of the peak falls
    with the FLOPs per byte: 1 / (1 / peak_share + peak x share / (bandwidth x FLOPs per byte)).

    Attributes:
        peak_flops_per_s: Data sheet.
        memory_bytes_per_s: Data sheet.
        peak_share: Of the peak that a GEMM without memory traffic reaches.
        memory_share: Of the memory time that is not hidden.
        kernel_s: Fixed time of one GEMM.
        measured: (m, k, n) -> seconds of one GEMM [m,k] x [k,n].
    """

    peak_flops_per_s: float
    memory_bytes_per_s: float
    peak_share: float = PEAK_SHARE
    memory_share: float = MEMORY_IN_GEMM
    kernel_s: float = KERNEL_S
    measured: Mapping[tuple[int, int, int], float] = field(default_factory=dict)

    def seconds(self, shape: tuple[int, int, int], count: int = 1) -> float:
        """Return the time of `count` GEMMs of one shape, launched as one batch.

        Args:
            shape: (m, k, n).
            count: How many.
        """
        if shape in self.measured:
            return count * self.measured[shape]
        return self.kernel_s + count * self.body_s(shape)

    def body_s(self, shape: tuple[int, int, int]) -> float:
        """Return the modelled time of one GEMM without its fixed part."""
        m, k, n = shape
        arithmetic_s = 2.0 * m * k * n / (self.peak_share * self.peak_flops_per_s)
        memory_s = 2.0 * (m * k + k * n + m * n) / self.memory_bytes_per_s
        return arithmetic_s + self.memory_share * memory_s

    def utilisation(self, shape: tuple[int, int, int]) -> float:
        """Return the share of the data sheet's peak that one GEMM reaches."""
        m, k, n = shape
        return 2.0 * m * k * n / (self.peak_flops_per_s * self.seconds(shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a plan's times are made from.

    Attributes:
        name: For tables.
        gpu: The data sheet.
        link: Between the ranks of a group.
        gemms: Time of a GEMM.
        attention_flops_per_s: Causal attention, masked products not counted.
        stream_bytes_per_s: Of a memory-bound kernel.
        kernel_s: Fixed time of a kernel.
    """

    name: str
    gpu: Gpu
    link: Link
    gemms: GemmRates
    attention_flops_per_s: float
    stream_bytes_per_s: float
    kernel_s: float = KERNEL_S

    def replace(self, **changes: Any) -> Machine:
        """Return a copy with some parts changed, such as a measured link or table of GEMMs."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the rates for JSON; of measured GEMMs only how many there are."""
        found = dataclasses.asdict(self)
        found["gemms"]["measured"] = len(self.gemms.measured)
        return found


def machine(name: str, *, link_bytes_per_s: float | None = None, hop_s: float = HOP_S) -> Machine:
    """Return the modelled machine of a named GPU; upper and lower case are the same.

    Args:
        name: Such as "A100-80GB"; "A100" means the one with 80 GB.
        link_bytes_per_s: What a ring reaches per rank; None: a share of NVLink's data sheet, for
            ranks in one node.
        hop_s: Fixed time of one step of a ring.

    Raises:
        UnknownNameError: There is no such GPU.
        ConfigError: A rate is not a positive finite number.
    """
    by_lower = {known.lower(): known for known in GPUS}
    known = by_lower.get(_SHORT.get(name.lower(), name).lower())
    if known is None:
        raise UnknownNameError(
            f"gpu: unknown profile {name!r}.{near(name, by_lower)} Known: {listed(GPUS)}"
        )
    gpu = GPUS[known]
    if link_bytes_per_s is None:
        link_bytes_per_s = LINK_SHARE * gpu.link_bytes_per_s
    if not (link_bytes_per_s > 0 and math.isfinite(link_bytes_per_s)):
        raise ConfigError(
            f"link_bytes_per_s: got {link_bytes_per_s!r}, allowed is a finite number above 0"
        )
    if not (hop_s >= 0 and math.isfinite(hop_s)):
        raise ConfigError(f"hop_s: got {hop_s!r}, allowed are seconds >= 0")
    return Machine(
        name=known,
        gpu=gpu,
        link=Link(alpha_s=hop_s, beta_bytes_per_s=link_bytes_per_s),
        gemms=GemmRates(
            peak_flops_per_s=gpu.peak_flops_per_s,
            memory_bytes_per_s=gpu.memory_bytes_per_s,
            peak_share=gpu.peak_share,
        ),
        attention_flops_per_s=ATTENTION_SHARE * gpu.peak_flops_per_s,
        stream_bytes_per_s=MEMORY_SHARE * gpu.memory_bytes_per_s,
    )
