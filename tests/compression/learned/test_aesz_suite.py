"""What every codec has to pass, for ``lowtide.aesz``."""

from __future__ import annotations

from lowtide.core.codec import get_codec
from tests.compression.learned.tiny import MODEL
from tests.helpers.codec_suite import CodecSuite

DTYPES = ("float16", "bfloat16", "float32", "float64")


class TestAuto(CodecSuite):
    dtypes = DTYPES
    keeps_negative_zero = False
    codec = get_codec({"id": "lowtide.aesz", "bound": 0.3, "model": MODEL.sha256})


class TestAutoencoderInSmallChunks(CodecSuite):
    dtypes = DTYPES
    keeps_negative_zero = False
    codec = get_codec(
        {
            "id": "lowtide.aesz", "mode": "rel", "bound": 0.1, "predictor": "autoencoder",
            "chunk_elements": 40, "model": MODEL.sha256,
        }
    )  # fmt: skip
