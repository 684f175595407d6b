"""Stage 1 as it was trained: from an array to its handle, from a handle to what heads see."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError
from lowtide.quality.surrogate import statistics
from lowtide.quality.surrogate.blocks import sample
from lowtide.quality.surrogate.embedding import WIDTH, Embedding, pictures
from lowtide.quality.surrogate.features import (
    FeatureHandle,
    Plain,
    embedded,
    inputs,
    plain_of,
    stage_of,
)

Floats = NDArray[np.float64]

_CLIP = 4.0  # deviations: heads are not asked about more
_DESCRIBED = len(statistics.NAMES)
# Statistics, the embedding, and how far the array is from the middle of the training set.
GATES = _DESCRIBED + WIDTH + 1


@dataclass(frozen=True)
class Stage:
    """A frozen stage 1.

    Attributes:
        network: The embedding, if there is one: without, it is all zeros.
        centre: Of each input over the training set, shape (inputs,).
        scale: Deviations, the same.
        fingerprint: Of all of this.
    """

    network: Embedding | None
    centre: Floats
    scale: Floats
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(stage_of(self.network).encode())
        for each in (self.centre, self.scale):
            digest.update(each.astype(np.float32).tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    def extract(self, tensor: Any) -> FeatureHandle:
        """Return the handle of an array.

        Raises:
            DataError: it is not floating-point, empty, constant, or not finite.
        """
        blocks = sample(tensor)
        seen = pictures(blocks.values) if self.network is not None else torch.empty(0)
        return self.handle(plain_of(blocks), seen)

    def handle(self, plain: Plain, seen: torch.Tensor) -> FeatureHandle:
        """Return the handle from what `Sample.seen` holds."""
        return FeatureHandle(plain, embedded(self.network, [seen])[0], self.fingerprint)

    def checked(self, handle: FeatureHandle) -> FeatureHandle:
        """Return a handle of this stage.

        Raises:
            DataError: another stage made it.
        """
        if handle.stage != self.fingerprint:
            raise DataError(
                f"features were extracted by stage 1 {handle.stage}, this surrogate has "
                f"{self.fingerprint}; extract them again with it"
            )
        return handle

    def rows(
        self, plain: Plain, vector: Floats, relatives: Sequence[float]
    ) -> tuple[Floats, Floats]:
        """Return standardised inputs of heads, (bounds, inputs), and of gates, (bounds, GATES)."""
        return self.standardised(inputs(plain, vector, relatives))

    def standardised(self, raw: Floats) -> tuple[Floats, Floats]:
        """Return the same from raw inputs."""
        x = np.clip((raw - self.centre) / self.scale, -_CLIP, _CLIP)
        drift = np.sqrt(np.square(x[:, :_DESCRIBED]).mean(axis=1, keepdims=True))
        return x, np.concatenate([x[:, :_DESCRIBED], x[:, -WIDTH:], drift], axis=1)

    def description(self, plain: Plain) -> Floats:
        """Return what says whether arrays are alike: their statistics, standardised."""
        x = (plain.statistics - self.centre[:_DESCRIBED]) / self.scale[:_DESCRIBED]
        return np.asarray(np.clip(x, -4 * _CLIP, 4 * _CLIP))


def scales_of(raw: Floats) -> tuple[Floats, Floats]:
    """Return mean and deviation of each input; what does not vary gets a small unit of its own."""
    spread = raw.std(axis=0)
    return raw.mean(axis=0), np.where(spread > 1e-3, spread, 1e-1)
