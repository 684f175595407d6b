"""Codes of 2, 4 or 8 bits in whole bytes, the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.core.errors import DataError

PACKED_BITS = (2, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes, (..., n) uint8 below 2^bits, as bytes, (..., ceil(n * bits / 8)) uint8."""
    if bits not in PACKED_BITS:
        raise DataError(f"codes of {bits} bits have no packed form; allowed are {PACKED_BITS}")
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    groups = padded.unflatten(-1, (-1, per_byte))
    packed = groups[..., 0].clone()
    for index in range(1, per_byte):
        packed |= groups[..., index] << (bits * index)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of each row of `pack`, (..., count) uint8."""
    if bits == 8:
        return packed[..., :count]
    mask = 2**bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count]
