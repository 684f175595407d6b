"""A per-token sum in full precision inside a message of lower precision.

The norm over a hidden dimension that is spread over p ranks needs ``S = sum_i s_i`` for each token,
``s_i`` being rank i's sum of squares. It travels with the latents, in the same all-reduce. In a
16-bit message it must not be rounded to 16 bits (one outlier channel would spoil the gradients), so
rank i writes ``s_i`` as three bfloat16 numbers, high to low, into three columns of its own; the
others write zero there. Sums with zero are exact, so every rank reads all ``s_i`` to the last of
their 24 bits and adds them in the same order (brief: BOOST's online RMSNorm sends it separately).
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECES = 3  # of 8 bits each: the 24 of a float32's significand


def message_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what latents of `dtype` are sent as.

    A float16 message would overflow: what is sent is not divided by the norm yet.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what a sum over elements of `dtype` is kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def local_scale(squares: Tensor, width: int) -> Tensor:
    """Return ``[..., 1]``, the root mean square of one rank's part, and no less than 1.

    Float16 holds nothing above 65504, which a gain times the largest numbers of a residual stream
    can pass: they are divided by this first, and multiplied again where there are 32 bits.

    Args:
        squares: ``[...]``, sums of squares.
        width: Over how many elements.
    """
    return (squares / width).sqrt_().clamp_(min=1.0).unsqueeze(-1)


def columns(dtype: torch.dtype, size: int) -> int:
    """Return how many columns the statistic takes in a message for `size` ranks."""
    if size == 1:
        return 0
    return PIECES * size if message_dtype(dtype) == torch.bfloat16 else 1


def columns_of_each(dtype: torch.dtype, size: int) -> int:
    """Return how many columns it takes if every rank's own number is to be read (a mean)."""
    return PIECES * size if message_dtype(dtype) == torch.bfloat16 else size


def write_each(room: Tensor, local: Tensor, rank: int) -> None:
    """Write this rank's number for each token, to be read beside the others'.

    Args:
        room: ``[T, columns_of_each]``.
        local: ``[T]``, float32 or float64.
        rank: Whose columns.
    """
    if room.dtype == torch.bfloat16:
        write(room, local, rank)
        return
    room.zero_()
    room[:, rank] = local


def read_each(room: Tensor) -> Tensor:
    """Return ``[T, p]``, every rank's number, from the reduced columns."""
    return _by_rank(room) if room.dtype == torch.bfloat16 else room.clone()


def write(room: Tensor, local: Tensor, rank: int) -> None:
    """Write this rank's sums into the message.

    Args:
        room: ``[T, columns]``, the message's last columns.
        local: ``[T]``, float32 or float64.
        rank: Whose columns.
    """
    if room.dtype != torch.bfloat16:
        room[:, 0] = local
        return
    room.zero_()
    split(room[:, rank * PIECES : (rank + 1) * PIECES].T, local)


def split(out: Tensor, numbers: Tensor) -> None:
    """Write numbers of 32 bits as three of 16, high to low.

    Args:
        out: ``[PIECES, ...]``, bfloat16.
        numbers: ``[...]``, float32.
    """
    rest = numbers
    # The largest float32 rounds to infinity in bfloat16, and infinity less itself is no number.
    largest = torch.finfo(torch.bfloat16).max
    for piece in out:
        piece.copy_(rest.clamp(-largest, largest))
        rest = rest - piece.to(rest.dtype)


def joined(pieces: Tensor) -> Tensor:
    """Return the numbers that `split` wrote to ``[PIECES, ...]``, float32."""
    high, middle, low = pieces.to(torch.float32)
    # The small pieces first: high and middle together may round up to infinity.
    return high + (middle + low)


def read(room: Tensor) -> Tensor:
    """Return ``[T]``, the sum over the ranks, from the reduced columns."""
    if room.dtype != torch.bfloat16:
        return room[:, 0].clone()
    # Pieces of one rank first, then ranks in order: the same order, and bits, everywhere.
    return _by_rank(room).sum(-1)


def _by_rank(room: Tensor) -> Tensor:
    return joined(room.unflatten(-1, (-1, PIECES)).movedim(-1, 0))
