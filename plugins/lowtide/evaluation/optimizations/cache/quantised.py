"""The key-value cache in 8 or 4 bits.

Keys are quantised for each channel over groups of tokens, because some of their channels are
large for all tokens; values are quantised for each token. Tokens that do not fill a group yet stay
as they are.

Letters: B sequences, K key-value heads, T tokens, D size of a head, N groups of G tokens.

Source: Liu et al., KIVI (2402.02750), Sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.quantization.packing import pack, unpack

_LARGEST = 65504.0  # of float16, in which lows and steps are held


@dataclass(frozen=True, slots=True)
class Quantised:
    """Codes, and what they stand for: ``low + code * step``.

    Attributes:
        bits: Of each code.
        count: Codes in the last dimension.
        packed: uint8; groups of tokens are dimension 2.
        low: float16, broadcasts against the codes.
        step: float16, likewise.
    """

    bits: int
    count: int
    packed: Tensor
    low: Tensor
    step: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.packed, self.low, self.step

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantised:
        """Return the same codes with `change` applied to each tensor that is held."""
        changed = [change(tensor) for tensor in self.tensors()]
        return Quantised(self.bits, self.count, *changed)

    def joined(self, other: Quantised) -> Quantised:
        """Return these groups of tokens and behind them those of `other`."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Quantised(self.bits, self.count, *(torch.cat(pair, 2) for pair in pairs))

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return what the codes stand for, in the shape that was encoded."""
        codes = unpack(self.packed, self.bits, self.count).to(dtype)
        return self.low.to(dtype) + codes * self.step.to(dtype)


def quantise(x: Tensor, bits: int, dimension: int) -> Quantised:
    """Quantise `x`, giving each slice along `dimension` its own low and step."""
    low = x.amin(dimension, keepdim=True).float().clamp(-_LARGEST, _LARGEST).half()
    high = x.amax(dimension, keepdim=True).float().clamp(-_LARGEST, _LARGEST)
    step = ((high - low.float()) / (2**bits - 1)).clamp(0, _LARGEST).half()
    per_step = torch.where(step > 0, 1.0 / step.float(), 0.0)
    codes = ((x.float() - low.float()) * per_step).round().clamp(0, 2**bits - 1)
    return Quantised(bits, x.shape[-1], pack(codes.to(torch.uint8), bits), low, step)


@dataclass(frozen=True, kw_only=True)
class CacheQuantiser(Optimization):
    """Hold keys and values in few bits, and decode a layer's whenever it attends.

    Attributes:
        group_size: Tokens that share the low and step of a key's channel, and channels of a value
            that share theirs where it divides the size of a head; else all channels do.
    """

    stage = "cache"
    letters = {"g": "group_size"}  # noqa: RUF012 - a ClassVar of the base class
    bits: ClassVar[int]
    group_size: int = 32

    def __post_init__(self) -> None:
        self.check(self.group_size > 0, "group_size", "above 0")

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        from lowtide.evaluation.optimizations.adapters.attention import listen

        handle = Handle(self.spelled)
        listen(handle, model)
        handle.replace(context.runtime, "quantiser", self)
        return handle

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Quantised, Quantised]:
        """Quantise whole groups of tokens, (B, K, N * G, D) each."""
        groups = keys.unflatten(2, (-1, self.group_size))  # (B, K, N, G, D)
        channels = values.shape[-1]
        size = self.group_size if channels % self.group_size == 0 else channels
        parts = values.unflatten(2, (-1, self.group_size)).unflatten(-1, (-1, size))
        return quantise(groups, self.bits, 3), quantise(parts, self.bits, 5)

    def decode(self, keys: Quantised, values: Quantised, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return keys and values of `encode`, (B, K, N * G, D) each."""
        return keys.values(dtype).flatten(2, 3), values.values(dtype).flatten(4).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class CacheInt8(CacheQuantiser):
    """8 bits."""

    name: ClassVar[str] = "kv.int8"
    bits = 8


@dataclass(frozen=True, kw_only=True)
class CacheInt4(CacheQuantiser):
    """4 bits, two in a byte."""

    name: ClassVar[str] = "kv.int4"
    bits = 4
