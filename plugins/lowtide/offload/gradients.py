"""Gradients that stay in 16 bit until an update, or somebody, needs them.

DeepSpeed widens each gradient into a float32 buffer, multiplies that buffer by the inverse of the
loss scale and of the clipping factor, and lets the optimizer read it: 18 bytes of memory traffic
per parameter where the 2 bytes of the accumulation buffer hold the same numbers. Here the update
reads those 2 bytes and multiplies in registers. What is left of the float32 buffer is its meaning:
whoever asks for it gets, at that moment, exactly what stock DeepSpeed would hold there.

Gradients of a subgroup whose state is resident on the device need not leave it: a `Keeper` lets
them accumulate there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.core.errors import HostError

logger = logging.getLogger("lowtide")


class Source(NamedTuple):
    """What an update reads.

    Attributes:
        flat: Gradient of a whole master, on the host; what a `Keeper` keeps is missing there.
        scale: What it is multiplied by.
        is_accumulated: Whether it is the accumulation buffer, of which a `Keeper` may have a part.
    """

    flat: Tensor
    scale: float
    is_accumulated: bool


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
        relink: Called with a parameter's key and where the host shall accumulate its gradient from
            now on, None for the accumulation buffer again; None: the host cannot do so.
    """

    def __init__(
        self,
        accumulated: Tensor,
        spans: Iterable[Span],
        get_wide: Callable[[], Tensor],
        relink: Callable[[Hashable, Tensor | None], object] | None = None,
    ) -> None:
        self.accumulated = accumulated
        self._spans = {span.key: span for span in spans}
        self._get_wide = get_wide
        self._relink = relink
        self._kept: dict[Hashable, Tensor] = {}  # accumulating on the device
        self._fresh: set[Hashable] = set()  # arrived for the update that comes next
        self._wide: set[Hashable] = set(self._spans)  # float32 buffer holds the newest value
        self._scale: float | None = None  # what stock has multiplied the others by, since then
        self._overwritten: set[Hashable] = set()  # by a micro-batch that is not the last
        self._irregular: set[Hashable] = set()  # missed the last micro-batch before
        self.may_move = True  # whether the host can be told now where to accumulate

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
        kept = self._kept.get(key)
        part.copy_(self._spans[key].of(self.accumulated) if kept is None else kept)
        if self._scale is not None and key not in self._fresh:
            part.mul_(self._scale)
        self._wide.add(key)

    def source(self, scale: float) -> Source:
        """Return the gradient for the coming update.

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
            source = Source(self.accumulated, scale, is_accumulated=True)
        else:  # a parameter took no part, or somebody has changed the float32 values
            source = Source(self.widen().mul_(scale), 1.0, is_accumulated=False)
        self._scale = scale
        self._fresh.clear()
        return source

    # -- on the device ------------------------------------------------------------------------

    def keeper(self, begin: int, count: int) -> Keeper | None:
        """Return what lets a part accumulate on the device, if that can be.

        A parameter's gradient is in one place, so a part that holds none as a whole, as of a large
        embedding that was cut, has nothing to keep.
        """
        can = self._relink is not None and bool(self.within(begin, count))
        return Keeper(self, begin, count) if can else None

    def kept(self) -> list[Tensor]:
        """Return the gradients that accumulate on the device."""
        return list(self._kept.values())

    def move(self, spans: Iterable[Span], there: Tensor | None, begin: int = 0) -> None:
        """Let parameters accumulate in `there`, which begins at `begin`; None: here again."""
        for span in spans:
            here, kept = span.of(self.accumulated), self._kept.get(span.key)
            if there is None and kept is None:
                continue
            view = None if there is None else there.narrow(0, span.begin - begin, span.count)
            (here if view is None else view).copy_(here if kept is None else kept)
            if self._relink is not None:
                self._relink(span.key, view)
            # Only now, as a copy may have failed: what is where the host looks is the newest.
            if view is None:
                del self._kept[span.key]
            else:
                self._kept[span.key] = view
                here.zero_()  # DeepSpeed looks for infinities in all of the buffer

    def within(self, begin: int, count: int) -> list[Span]:
        """Return the parameters that lie wholly in a range, by position."""
        end = begin + count
        found = (s for s in self._spans.values() if begin <= s.begin and s.begin + s.count <= end)
        return sorted(found, key=lambda span: span.begin)


@dataclass(eq=False)
class Keeper:
    """Lets the gradients of one piece of a master accumulate on the device.

    Attributes:
        gradients: The master's.
        begin: First element of the piece.
        count: Elements of it.
    """

    gradients: GroupGradients
    begin: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """Their type."""
        return self.gradients.accumulated.dtype

    def keep(self, there: Tensor) -> list[tuple[int, int]] | None:
        """Let them accumulate in `there`, shape (count,), from now on.

        Returns:
            (begin, count) of what has to be loaded before each update all the same: parameters
            that lie in another piece too, and padding. None: they cannot move now.
        """
        if not self.gradients.may_move:
            return None
        spans = self.gradients.within(self.begin, self.count)
        self.gradients.move(spans, there, self.begin)
        gaps, done = [], self.begin
        for begin, count in (*((s.begin, s.count) for s in spans), (self.begin + self.count, 0)):
            if begin > done:
                gaps.append((done - self.begin, begin - done))
            done = begin + count
        return gaps

    def release(self) -> None:
        """Bring them back to the host's accumulation buffer."""
        self.gradients.move(self.gradients.within(self.begin, self.count), None)


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

    def keeper(self, _begin: int, _count: int) -> None:
        """Return None: the host says where gradients are."""

    def source(self, _scale: float) -> Source:
        """Return the flat gradient; nothing is left to multiply it by.

        Raises:
            HostError: the leaf has no gradient.
        """
        gradient = self._leaf.grad
        if gradient is None:
            raise HostError(f"offload: {self._missing}")
        return Source(gradient.view(-1), 1.0, is_accumulated=False)


def as_float32(value: float | Tensor) -> float:
    """Return a factor the way torch applies it to a float32 tensor: rounded to float32."""
    return float(torch.tensor(float(value), dtype=torch.float32))
