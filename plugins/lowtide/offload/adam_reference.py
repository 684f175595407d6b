"""CPUAdam's arithmetic, and torch's, in numpy: what the native kernels are held to, by bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]

_BLOCK = 1 << 16  # elements at a time: the float64 temporaries stay small


class ReferencePiece(NamedTuple):
    """float32 arrays of shape (N,); the first three are updated in place, `grad` is scaled."""

    param: Floats
    exp_avg: Floats
    exp_avg_sq: Floats
    grad: Floats


def update_piece(
    piece: ReferencePiece, scalars: Mapping[str, float], *, mode: str, is_contracted: bool
) -> None:
    """Update `piece` in place.

    Args:
        piece: The arrays.
        scalars: float32 values by the names of `lowtide.offload.adam.AdamStep`.
        mode: "none", "decoupled", "l2" or "torch_decoupled".
        is_contracted: Whether to fuse as in CPUAdam's scalar loop instead of its vector code.
    """
    values = {name: np.float32(value) for name, value in scalars.items()}
    for begin in range(0, piece.param.size, _BLOCK):
        block = ReferencePiece(*(array[begin : begin + _BLOCK] for array in piece))
        with np.errstate(all="ignore"):  # infinities and NaN are results like others
            _update_block(block, values, mode, is_contracted)


def _update_block(
    block: ReferencePiece, s: Mapping[str, np.float32], mode: str, is_contracted: bool
) -> None:
    param, m, v, grad = block
    if mode == "torch_decoupled":
        m[:] = fused(s["one_minus_beta1"], grad - m, m)
        v[:] = fused(s["one_minus_beta2"] * grad, grad, v * s["beta2"])
        below = np.sqrt(v) / s["inverse_root_bias2"] + s["eps"]
        param[:] = param * s["decay"] + s["step_size"] * m / below
        return
    if mode == "l2":
        grad = fused(param, s["decay"], grad)
    m[:] = _blended(m, s["beta1"], grad, s["one_minus_beta1"], is_contracted)
    v[:] = _blended(v, s["beta2"], grad * grad, s["one_minus_beta2"], is_contracted)
    direction = m / fused(np.sqrt(v), s["inverse_root_bias2"], s["eps"])
    if mode == "decoupled":
        param[:] = fused(param, s["decay"], param)
    param[:] = fused(direction, s["step_size"], param)


def _blended(
    old: Floats, beta: np.float32, added: Floats, rest: np.float32, is_contracted: bool
) -> Floats:
    """Return old * beta + added * rest with one of the products rounded before the sum."""
    if is_contracted:
        return fused(old, beta, added * rest)
    return fused(added, rest, old * beta)


def fused(a: Any, b: Any, c: Any) -> Floats:
    """Return a * b + c of float32 arrays (or numbers) with a single rounding.

    The product of two float32 is exact in float64; the sum is not, and rounding it to float64
    and then to float32 is wrong where the first rounding makes a tie of what was none. So the sum
    is rounded to odd: if it is inexact, to the neighbour whose last bit is 1, which is never a tie
    in float32 nor a float32 itself. This is right while the wider format has two bits more.

    Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Transactions on
    Computers 57(4), 2008.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    # Knuth's two-sum: what the sum lost, exactly.
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    is_even = total.view(np.int64) & 1 == 0
    moves = np.isfinite(total) & (lost != 0) & is_even
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where(moves, odd, total).astype(np.float32)
