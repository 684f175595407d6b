"""Gradients that stay in 16 bit until an update, or somebody, needs them.

DeepSpeed widens each gradient into a float32 buffer, multiplies that buffer by the inverse of the
loss scale and of the clipping factor, and lets the optimizer read it: 18 bytes of memory traffic
per parameter where the 2 bytes of the accumulation buffer hold the same numbers. Here the update
reads those 2 bytes and multiplies in registers. What is left of the float32 buffer is its meaning:
whoever asks for it gets, at that moment, exactly what stock DeepSpeed would hold there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.core.errors import HostError

logger = logging.getLogger("lowtide")


@dataclass(frozen=True)
class Span:
    """Where one parameter's gradient lies in its subgroup: `count` elements from `begin` on."""

    key: Hashable
    begin: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """Return this parameter's part of a flat tensor."""
        return flat.narrow(0, self.begin, self.count)


class GroupGradients:
    """The gradients of one subgroup on this rank.

    Args:
        accumulated: Flat accumulation buffer, any floating dtype; the host writes it in backward.
        spans: Parameters of which this rank has a part that is not only padding.
        get_wide: Returns the flat float32 buffer, making it (zeros) where there is none yet.
    """

    def __init__(
        self, accumulated: Tensor, spans: Iterable[Span], get_wide: Callable[[], Tensor]
    ) -> None:
        self.accumulated = accumulated
        self._spans = {span.key: span for span in spans}
        self._get_wide = get_wide
        self._fresh: set[Hashable] = set()  # arrived for the update that comes next
        self._wide: set[Hashable] = set(self._spans)  # float32 buffer holds the newest value
        self._scale: float | None = None  # what stock has multiplied the others by, since then
        self._overwritten: set[Hashable] = set()  # by a micro-batch that is not the last
        self._irregular: set[Hashable] = set()  # missed the last micro-batch before

    @property
    def nbytes_each(self) -> int:
        """Bytes per parameter in the accumulation buffer."""
        return self.accumulated.element_size()

    def overwrite(self, key: Hashable) -> None:
        """A micro-batch that is not the last one is about to overwrite a parameter's gradient.

        Stock keeps the last update's value in its float32 buffer, and uses it again should the
        parameter miss the window's last micro-batch. Parameters that ever did so (experts, layers
        that are dropped) get that value saved here; for all others that would be wasted traffic.
        """
        if key not in self._spans or key in self._wide:
            return
        if key in self._irregular:
            self._widen(key, self._get_wide())
            self._fresh.discard(key)  # of an update that was left out
        else:
            self._overwritten.add(key)

    def arrive(self, key: Hashable) -> None:
        """The gradient of a parameter is complete in the accumulation buffer."""
        if key in self._spans:
            self._fresh.add(key)
            self._wide.discard(key)
            self._overwritten.discard(key)

    def widen(self) -> Tensor:
        """Return the float32 buffer with the values that stock would hold there now."""
        wide = self._get_wide()
        for key in self._spans:
            self._widen(key, wide)
        return wide

    def _widen(self, key: Hashable, wide: Tensor) -> None:
        if key in self._wide:
            return
        part = self._spans[key].of(wide)
        part.copy_(self._spans[key].of(self.accumulated))
        if self._scale is not None and key not in self._fresh:
            part.mul_(self._scale)
        self._wide.add(key)

    def source(self, scale: float) -> tuple[Tensor, float]:
        """Return (flat gradient, what the update multiplies it by), for the coming update.

        Args:
            scale: Inverse of loss scale times clipping factor, as float32.
        """
        for key in self._overwritten:
            self._irregular.add(key)
            self._fresh.add(key)
            logger.warning(
                "offload: the gradient of %s did not come with the window's last micro-batch; this "
                "update takes what the window has accumulated (stock DeepSpeed would repeat the "
                "last update's), from the next on it is as in stock", key,
            )  # fmt: skip
        self._overwritten.clear()
        is_whole = len(self._fresh) == len(self._spans) and not self._wide
        if is_whole:
            source = self.accumulated, scale
        else:  # a parameter took no part, or somebody has changed the float32 values
            source = self.widen().mul_(scale), 1.0
        self._scale = scale
        self._fresh.clear()
        return source


class LeafGradients:
    """Gradients that the host keeps in float32 at the leaf, and has unscaled and clipped itself.

    Args:
        leaf: Master; its ``grad`` is read at each update.
        missing: What to say where there is none: why, and what to do.
    """

    nbytes_each = 4

    def __init__(self, leaf: Tensor, missing: str) -> None:
        self._leaf = leaf
        self._missing = missing

    def source(self, _scale: float) -> tuple[Tensor, float]:
        """Return the flat gradient; nothing is left to multiply it by.

        Raises:
            HostError: the leaf has no gradient.
        """
        gradient = self._leaf.grad
        if gradient is None:
            raise HostError(f"offload: {self._missing}")
        return gradient.view(-1), 1.0


def as_float32(value: float | Tensor) -> float:
    """Return a factor the way torch applies it to a float32 tensor: rounded to float32."""
    return float(torch.tensor(float(value), dtype=torch.float32))
