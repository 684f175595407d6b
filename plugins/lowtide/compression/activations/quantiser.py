"""Group-wise quantisation in plain torch operations, the same on every device.

Values are cut into groups of G consecutive elements. Each group keeps its minimum and its step,
both float32, and one code of 2, 4 or 8 bits per value; a value decodes to minimum + code * step.
Random rounding makes the decoded value equal to the original one in expectation.

Groups whose minimum is 0, as behind ReLU, are cut differently: code 0 is for zeros alone, and code
1 is the smallest positive value there is room for, so that what is positive stays so. The backward
pass of ReLU asks for no more than that.

Letters: N elements, K groups of G elements each, the last one filled up.

Source: group-wise stochastic rounding of activations is the idea of ActNN (Chen et al., ICML 2021,
Sec. 3-4) and GACT (Liu et al., ICML 2022). Here all tensors of a run have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMS = 1 << 20
SLACK = 2.0**-12
"""Part of a step by which float32 arithmetic can exceed what real numbers promise."""

_LARGEST = 2.0**126  # above, a range or a decoded value could overflow float32
_SMALLEST = 2.0**-90  # below, a step would come near float32's denormals
_LEAST = 2.0**-20  # of a step: what code 1 stands for where code 0 is for zeros
_GUARD = 1.0 - 2.0**-22  # of a bound that is compared in float32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiser:
    """How values become codes.

    A decoded value is at most 1 + `SLACK` steps of its group off, or 1/2 + `SLACK` when it was
    rounded to the nearest; on top comes half a unit in the last place, of float32 and of its dtype.

    Attributes:
        bits: Of each code: 2, 4 or 8.
        group_size: Consecutive values that share minimum and step; a multiple of 8.
        is_stochastic: Round up or down at random, so that the mean is right; else to the nearest.
        bound: Highest error of a decoded value, relative to its group's range and with all
            rounding. Groups that do not keep it stay as they are. None: what `limit` says.
    """

    bits: int
    group_size: int
    is_stochastic: bool
    bound: float | None = None

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest code."""
        return 2**self.bits - 1

    def encode(self, flat_N: Tensor, generator: torch.Generator | None = None) -> Codes:
        """Quantise `flat_N`: one of `DTYPES`, shape (N,), N >= 1, contiguous.

        Beside the result this needs memory for a few float32 copies of `CHUNK_ELEMS` elements.

        Args:
            flat_N: The values; left as they are.
            generator: Of the same device; needed for stochastic rounding.
        """
        size = self.group_size
        groups = -(-flat_N.numel() // size)
        packed_KB = flat_N.new_empty((groups, size * self.bits // 8), dtype=torch.uint8)
        low_K = flat_N.new_empty(groups, dtype=torch.float32)
        step_K = torch.empty_like(low_K)
        kept, kept_values = [], []
        has_zeros = False
        for begin, end, values in self._chunks(flat_N):
            low, step, bad = _scales(values, self.levels)
            # One wait for the device.
            is_bad, is_cut = torch.stack([bad.any(), _has_zeros(low, step).any()]).tolist()
            has_zeros = has_zeros or is_cut
            if is_bad:
                values = values.masked_fill(bad[:, None], 0.0)
            codes = self._codes(values, low, step, is_cut, generator)
            packed_KB[begin:end] = _pack(codes, self.bits)
            low_K[begin:end], step_K[begin:end] = low, step
            if self.bound is not None:
                bad |= self._misses(values, low, step, codes, flat_N.dtype)
                is_bad = bool(bad.any())
            if is_bad:
                index = bad.nonzero().flatten() + begin
                kept.append(index)
                kept_values.append(_rows(flat_N, index, size))
        return Codes(
            quantiser=self, numel=flat_N.numel(), dtype=flat_N.dtype,
            packed=packed_KB, low=low_K, step=step_K, has_zeros=has_zeros,
            kept=torch.cat(kept) if kept else None,
            kept_values=torch.cat(kept_values) if kept else None,
        )  # fmt: skip

    def _chunks(self, flat_N: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first group, last group + 1 and a float32 copy, shape (groups, G), of a part."""
        size = self.group_size
        step = max(1, CHUNK_ELEMS // size)
        numel = flat_N.numel()
        for begin in range(0, -(-numel // size), step):
            part = flat_N[begin * size : (begin + step) * size]
            rest = -part.numel() % size
            if rest:  # a copy of the last value leaves its group's range as it is
                part = torch.cat([part, part[-1:].expand(rest)])
            values = part.view(-1, size).to(torch.float32)
            yield begin, begin + values.shape[0], values

    def _codes(
        self, values: Tensor, low: Tensor, step: Tensor, is_cut: bool, generator: Any
    ) -> Tensor:
        per_step = torch.where(step > 0, 1.0 / step, 0.0)
        scaled = (values - low[:, None]).mul_(per_step[:, None])
        if self.is_stochastic:
            scaled.add_(_noise(scaled, generator), alpha=2.0**-16).add_(0.5 + 2.0**-17)
        else:
            scaled.add_(0.5)
        if not is_cut:
            return scaled.clamp_(max=self.levels).to(torch.uint8)  # cuts off what is not whole
        has_zeros = _has_zeros(low, step)[:, None]
        above = torch.where(has_zeros & (values > 0), 1, 0).to(torch.uint8)
        return scaled.clamp_(max=self.levels - has_zeros.to(scaled.dtype)).to(torch.uint8) + above

    def _misses(
        self, values: Tensor, low: Tensor, step: Tensor, codes: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return whether a group does not keep the bound; (groups,)."""
        if self.bound is None:
            return torch.zeros_like(low, dtype=torch.bool)
        decoded = _values(codes, low, step, True, dtype).to(dtype)
        error = (decoded.to(torch.float32) - values).abs_().amax(1)
        ranges = values.amax(1) - values.amin(1)
        return ~(error <= ranges * (self.bound * _GUARD))


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Quantised values.

    Attributes:
        quantiser: What made them.
        numel: N.
        dtype: Of the values.
        packed: uint8, shape (K, G * bits / 8).
        low: Minimum of each group, float32.
        step: Step of each group, float32; 0 where all values are equal.
        has_zeros: There are groups whose minimum is 0.
        kept: Groups that could not be quantised (NaN, infinities, extreme ranges, a bound that
            is not kept), int64; None if there are none.
        kept_values: Their values as they were, shape (len(kept), G).
    """

    quantiser: Quantiser
    numel: int
    dtype: torch.dtype
    packed: Tensor
    low: Tensor
    step: Tensor
    has_zeros: bool
    kept: Tensor | None = None
    kept_values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory that is held, in bytes."""
        tensors = (self.packed, self.low, self.step, self.kept, self.kept_values)
        return sum(each.nbytes for each in tensors if each is not None)

    def is_enough_for(self, quantiser: Quantiser) -> bool:
        """Whether these codes are as fine as those that `quantiser` would make."""
        return self.quantiser.bits >= quantiser.bits

    def decode(self) -> Tensor:
        """Return the values: shape (N,), in the dtype and on the device they came from."""
        size, bits = self.quantiser.group_size, self.quantiser.bits
        groups = self.low.numel()
        out = self.packed.new_empty((groups, size), dtype=self.dtype)
        count = max(1, CHUNK_ELEMS // size)
        for begin in range(0, groups, count):
            part = slice(begin, begin + count)
            codes = _unpack(self.packed[part], bits)
            low, step = self.low[part], self.step[part]
            out[part] = _values(codes, low, step, self.has_zeros, self.dtype)
        if self.kept is not None and self.kept_values is not None:
            out[self.kept] = self.kept_values
        return out.flatten()[: self.numel]


def _scales(values: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return minimum, step, and whether a group cannot be quantised; (groups,) each."""
    low, high = values.amin(1), values.amax(1)  # five times as fast as aminmax on a CPU
    ranges = high - low
    # Comparisons with NaN are false, so these are true for what is fit.
    is_fit = torch.maximum(high, -low) < _LARGEST
    is_fit &= (ranges == 0) | (ranges > _SMALLEST)
    low, ranges = torch.where(is_fit, low, 0.0), torch.where(is_fit, ranges, 0.0)
    return low, ranges / torch.where(low == 0, levels - 1, levels), ~is_fit


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return whole numbers from -2^15 to 2^15 - 1, equally likely, as float32 shaped like `like`.

    16 bits are enough, and four times as many come out of a generator's 64.
    """
    drawn = torch.empty(like.numel() // 4, dtype=torch.int64, device=like.device)
    drawn.random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16).view(like.shape).to(torch.float32)


def _has_zeros(low: Tensor, step: Tensor) -> Tensor:
    return (low == 0) & (step > 0)


def _values(codes: Tensor, low: Tensor, step: Tensor, is_cut: bool, dtype: torch.dtype) -> Tensor:
    """Return what codes (groups, G) stand for, float32; `is_cut`: minima may be 0."""
    values = codes.to(torch.float32)
    if not is_cut:
        return values.mul_(step[:, None]).add_(low[:, None])
    has_zeros = _has_zeros(low, step)[:, None]
    info = torch.finfo(dtype)
    least = (step * _LEAST).clamp_(min=info.smallest_normal * info.eps)[:, None]
    values = values.sub_(has_zeros.to(values.dtype)).mul_(step[:, None]).add_(low[:, None])
    is_one = has_zeros & (codes == 1)
    return torch.where(is_one, least, torch.where(has_zeros & (codes == 0), 0.0, values))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Put 8 / bits codes into a byte; a group's first part takes the lowest bits."""
    if bits == 8:
        return codes
    parts = codes.view(codes.shape[0], 8 // bits, -1)
    packed = parts[:, 0].clone()
    for index in range(1, 8 // bits):
        packed |= parts[:, index] << (bits * index)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    mask = 2**bits - 1
    parts = [(packed >> (bits * index)) & mask for index in range(8 // bits)]
    return torch.stack(parts, dim=1).flatten(1)


def _rows(flat_N: Tensor, index: Tensor, size: int) -> Tensor:
    """Return groups `index` of `flat_N`; what is missing of the last repeats its last value."""
    places = index[:, None] * size + torch.arange(size, device=flat_N.device)
    return flat_N[places.clamp_(max=flat_N.numel() - 1)]
