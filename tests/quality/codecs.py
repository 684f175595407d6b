"""Codecs that tests can predict: a uniform quantiser without entropy coding, and bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.codec import Bound, Codec, compress_bytes, decompress_bytes
from lowtide.core.stream import ArrayData, StreamHeader


class Rounding(Codec):
    """Rounds to multiples of twice the bound; `breaks` adds that many bounds to one element."""

    codec_id = "tests.rounding"

    def __init__(self, mode: str = "abs", *, bound: float = 0.1, breaks: float = 0.0) -> None:
        self.mode, self._value, self.breaks = mode, bound, breaks

    @property
    def bound(self) -> Bound:
        return Bound(self.mode, self._value)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bound": self._value}

    def _encode(self, data: ArrayData) -> bytes:
        values = data.values.astype(np.float64)
        unit = 1.0 if self.mode == "abs" else float(values.max() - values.min())
        step = 2 * self._value * unit * (1 - 1e-9)  # room for rounding
        codes = np.rint(values.reshape(-1) / step)
        if self.breaks and codes.size:
            codes[0] += self.breaks
        return np.float64(step).tobytes() + compress_bytes(codes.astype(np.int64).tobytes(), 3)

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        step = np.frombuffer(payload[:8], np.float64)[0]
        size = int(np.prod(header.shape)) * 8
        codes = np.frombuffer(decompress_bytes(payload[8:], size), np.int64)
        return np.asarray(codes * step).astype(header.dtype)
