"""The two predictors of ``lowtide.sz`` with their parameters, as they stand in a record.

Arrays of working values are flat and C-contiguous; `shape` has 1 to 4 axes. FORMAT, 2 to 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from lowtide.compression.elements import Array
from lowtide.compression.primitives import primitives
from lowtide.core.errors import CorruptStreamError

Shape: TypeAlias = tuple[int, ...]
MAX_ORDER = 2


class ChunkPredictor(Protocol):
    """What a record says about a chunk, and how its section of codes is made and read."""

    kind: ClassVar[int]
    name: ClassVar[str]

    def to_section(self, work: Array, shape: Shape, step: float) -> tuple[bytes, Array]:
        """Return the section of codes, and the working values that a decoder will have."""

    def from_section(
        self, section: bytes | memoryview, shape: Shape, step: float, *, is_double: bool
    ) -> Array:
        """Return working values, or raise CorruptStreamError or ValueError."""

    def pack(self) -> bytes:
        """Return the bytes of a record that say all this."""

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON types."""


class Kind(Protocol):
    """One kind of record: reads what `ChunkPredictor.pack` wrote."""

    packed_bytes: ClassVar[int]

    def parse(self, raw: bytes, ndim: int) -> ChunkPredictor:
        """Return the predictor for chunks of `ndim` axes, or raise CorruptStreamError."""


class _Scanned:
    """A predictor that gives each point a code: the section is what the entropy coder makes."""

    def to_section(self, work: Array, shape: Shape, step: float) -> tuple[bytes, Array]:
        codes, restored = self.encode(work, shape, step)  # type: ignore[attr-defined]
        return primitives().entropy_encode(codes, shape, self.scan), restored  # type: ignore[attr-defined]

    def from_section(
        self, section: bytes | memoryview, shape: Shape, step: float, *, is_double: bool
    ) -> Array:
        codes = primitives().entropy_decode(section, shape, self.scan)  # type: ignore[attr-defined]
        return self.decode(codes, shape, step, is_double=is_double)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Differences(_Scanned):
    """Quantizes first, then takes differences along the axes, exactly.

    Attributes:
        orders: How many times along each axis, 0 to 2.
    """

    orders: tuple[int, ...]

    kind: ClassVar[int] = 1
    name: ClassVar[str] = "differences"
    packed_bytes: ClassVar[int] = 4
    scan: ClassVar[None] = None
    """What `entropy_encode` has to know of it."""

    def encode(self, work: Array, shape: Shape, step: float) -> tuple[Array, Array]:
        """Return codes (int32) and the working values that a decoder will have."""
        codes, restored = primitives().difference_encode(work, shape, self.orders, step)
        return codes, restored

    def decode(self, codes: Array, shape: Shape, step: float, *, is_double: bool) -> Array:
        """Return working values; may overwrite `codes`."""
        restored: Array = primitives().difference_decode(codes, shape, self.orders, step, is_double)
        return restored

    def pack(self) -> bytes:
        """Return the bytes of a record that say all this."""
        return bytes(_four(self.orders))

    @classmethod
    def parse(cls, raw: bytes, ndim: int) -> Differences:
        """Undo `pack` for chunks of `ndim` axes, or raise CorruptStreamError."""
        if max(raw[:ndim]) > MAX_ORDER or any(raw[ndim:]):
            raise CorruptStreamError(f"orders of differences are {[*raw]} for {ndim} axes")
        return cls(tuple(raw[:ndim]))

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON types."""
        return {"orders": list(self.orders)}


@dataclass(frozen=True)
class Interpolation(_Scanned):
    """Predicts points halfway between known ones, from coarse grids to fine ones.

    Attributes:
        weights: Of the axes, 0 to 255, where a point lies between known ones on several.
        is_cubic: Four neighbours on an axis instead of two, where they are there.
        alpha: Code a, 0 to 255: steps get finer by 1 + a/8 with each coarser level...
        beta: Code b, 0 to 255: ...up to 1 + b/4.
    """

    weights: tuple[int, ...]
    is_cubic: bool
    alpha: int
    beta: int

    kind: ClassVar[int] = 2
    name: ClassVar[str] = "interpolation"
    packed_bytes: ClassVar[int] = 7

    @property
    def scan(self) -> tuple[int, ...]:
        """What `entropy_encode` has to know of it."""
        return self.weights

    def encode(self, work: Array, shape: Shape, step: float) -> tuple[Array, Array]:
        """Return codes (int32) and the working values that a decoder will have."""
        codes, restored = primitives().interpolation_encode(
            work, shape, self.weights, self.is_cubic, self.alpha, self.beta, step
        )
        return codes, restored

    def decode(self, codes: Array, shape: Shape, step: float, *, is_double: bool) -> Array:
        """Return working values; may overwrite `codes`."""
        restored: Array = primitives().interpolation_decode(
            codes, shape, self.weights, self.is_cubic, self.alpha, self.beta, step, is_double
        )
        return restored

    def pack(self) -> bytes:
        """Return the bytes of a record that say all this."""
        return bytes((self.is_cubic, *_four(self.weights), self.alpha, self.beta))

    @classmethod
    def parse(cls, raw: bytes, ndim: int) -> Interpolation:
        """Undo `pack` for chunks of `ndim` axes, or raise CorruptStreamError."""
        spline, *weights, alpha, beta = raw
        if spline > 1 or any(weights[ndim:]):
            raise CorruptStreamError(f"interpolation is {[*raw]} for {ndim} axes")
        return cls(tuple(weights[:ndim]), bool(spline), alpha, beta)

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON types."""
        spline = "cubic" if self.is_cubic else "linear"
        finer = {"alpha": 1 + self.alpha / 8, "beta": 1 + self.beta / 4}
        return {"weights": list(self.weights), "spline": spline, **finer}


Predictor: TypeAlias = Differences | Interpolation

KINDS: Mapping[int, Kind] = {each.kind: each for each in (Differences, Interpolation)}  # type: ignore[misc]
"""The kinds of records that ``lowtide.sz`` has."""


def _four(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (*numbers, *(0,) * (4 - len(numbers)))
