"""What every codec has to pass, for each mode and predictor of ``lowtide.sz``."""

from __future__ import annotations

from lowtide.core.codec import get_codec
from tests.helpers.codec_suite import CodecSuite

DTYPES = ("float16", "bfloat16", "float32", "float64")


class _SzSuite(CodecSuite):
    dtypes = DTYPES
    keeps_negative_zero = False


class TestAbs(_SzSuite):
    codec = get_codec({"id": "lowtide.sz", "mode": "abs", "bound": 1e-2})


class TestRel(_SzSuite):
    codec = get_codec({"id": "lowtide.sz", "mode": "rel", "bound": 1e-3, "level": 9})


class TestPwRel(_SzSuite):
    codec = get_codec({"id": "lowtide.sz", "mode": "pw_rel", "bound": 1e-2})


class TestDifferences(_SzSuite):
    codec = get_codec({"id": "lowtide.sz", "bound": 0.3, "predictor": "differences"})


class TestInterpolationInSmallChunks(_SzSuite):
    codec = get_codec(
        {"id": "lowtide.sz", "bound": 0.3, "predictor": "interpolation", "chunk_elements": 40}
    )


class TestLossless(_SzSuite):
    codec = get_codec({"id": "lowtide.sz", "bound": 0})
    keeps_negative_zero = True
