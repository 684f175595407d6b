"""SZ3 and ZFP as registered codecs: measured and predicted as ours are.

Importing this registers those that are installed here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.codec import ArrayData, Bound, Codec, StreamHeader, codecs
from lowtide.core.errors import CodecError
from lowtide.core.stream import numpy_dtype

ALGORITHMS = {"interpolation": "INTERP_LORENZO", "lorenzo": "LORENZO_REG"}


class _Absolute(Codec):
    """A codec of others with an absolute bound; its stream inside of our container."""

    def __init__(self, mode: str = "abs", *, bound: float) -> None:
        if mode not in ("abs", "rel"):
            raise CodecError(f'codec "{self.codec_id}": mode "{mode}", allowed are "abs" and "rel"')
        self.mode, self._value = mode, float(bound)

    @property
    def bound(self) -> Bound:
        return Bound(self.mode, self._value)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bound": self._value}

    def _absolute(self, values: NDArray[Any]) -> float:
        if self.mode == "abs":
            return self._value
        return self._value * (float(values.max()) - float(values.min()))


class Sz3(_Absolute):
    """SZ3 through its official binding."""

    codec_id = "rivals.sz3"

    def __init__(
        self, mode: str = "abs", *, bound: float, algorithm: str = "interpolation"
    ) -> None:
        super().__init__(mode, bound=bound)
        self.algorithm = algorithm

    def _encode(self, data: ArrayData) -> bytes:
        from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode

        config = szConfig()
        config.errorBoundMode = szErrorBoundMode.ABS
        config.absErrorBound = self._absolute(data.values)
        config.cmprAlgo = getattr(szAlgorithm, ALGORITHMS[self.algorithm])
        # Its encoder overwrites what it is given.
        return bytes(sz.compress(np.array(data.values), config)[0])

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        from pysz import sz

        blob = np.frombuffer(payload, np.uint8)
        values = sz.decompress(blob, numpy_dtype(header.dtype).type, header.shape)[0]
        return np.asarray(values).reshape(-1)


class Zfp(_Absolute):
    """ZFP in its fixed-accuracy mode."""

    codec_id = "rivals.zfp"

    def _encode(self, data: ArrayData) -> bytes:
        import zfpy

        values = np.ascontiguousarray(data.values)
        return bytes(zfpy.compress_numpy(values, tolerance=self._absolute(values)))

    def _decode(self, _: StreamHeader, payload: memoryview) -> NDArray[Any]:
        import zfpy

        return np.asarray(zfpy.decompress_numpy(bytes(payload))).reshape(-1)


def installed() -> list[dict[str, Any]]:
    """Return configurations, without bounds, of ours and of the rivals that are installed here."""
    found: list[dict[str, Any]] = [
        {"id": "lowtide.sz", "predictor": "interpolation"},
        {"id": "lowtide.sz", "predictor": "differences"},
    ]
    if importlib.util.find_spec("pysz"):
        found += [{"id": Sz3.codec_id, "algorithm": name} for name in ALGORITHMS]
    if importlib.util.find_spec("zfpy"):
        found.append({"id": Zfp.codec_id})
    return found


for _codec in (Sz3, Zfp):
    codecs.register(_codec.codec_id, _codec)
