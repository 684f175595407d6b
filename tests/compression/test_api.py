"""``lowtide.compression``: what users call."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import lowtide.compression
from lowtide.compression import compress, decompress, get_codec, inspect
from lowtide.core.codec import ZstdCodec, codecs
from lowtide.core.errors import CodecError, ConfigError, CorruptStreamError, UnknownNameError
from tests.helpers.codec_suite import forge

X = np.sin(np.arange(6000) * 0.01).astype(np.float32).reshape(60, 100)


def test_arrays_and_tensors_go_in_and_come_out() -> None:
    blob = compress(X, mode="abs", bound=1e-3)
    back = decompress(blob)
    assert isinstance(blob, bytes)
    assert (back.dtype, back.shape) == (X.dtype, X.shape)
    assert np.abs(back.astype(np.float64) - X).max() <= 1e-3
    assert compress(torch.from_numpy(X), bound=1e-3) == blob
    assert compress(X.copy(order="F"), bound=1e-3) == blob
    tensor = torch.from_numpy(X).bfloat16().requires_grad_()
    found = decompress(compress(tensor, bound=0.1))
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, found.shape) == (torch.bfloat16, tensor.shape)
    assert (found.double() - tensor.detach().double()).abs().max() <= 0.1


def test_codecs_are_named_or_given() -> None:
    codec = get_codec({"id": "lowtide.sz", "bound": 1e-3, "level": 7})
    assert compress(X, codec) == codec.encode(X)
    assert compress(X, {"id": "lowtide.sz", "bound": 1}, bound=1e-3, level=7) == codec.encode(X)
    assert compress(X, "lowtide.zstd", level=5) == ZstdCodec(5).encode(X)
    assert compress(b"bytes", "lowtide.zstd") == ZstdCodec().encode(b"bytes")
    assert "lowtide.sz" in codecs.names()
    with pytest.raises(CodecError, match=r"ZstdCodec\(level=3\) has its parameters already"):
        compress(X, ZstdCodec(), level=5)
    with pytest.raises(UnknownNameError, match=r"Did you mean \"lowtide\.sz"):
        compress(X, "lowtide.szz", bound=1)
    with pytest.raises(ConfigError, match="bound is missing"):
        compress(X)


def test_inspect_tells_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    x = X.copy()
    x[3, 4:9] = np.nan
    blob = compress(x, mode="rel", bound=1e-2, chunk_elements=2000, predictor="interpolation")
    monkeypatch.setattr("lowtide.compression.sz.decode_chunk", None)
    found = inspect(blob)
    assert found["codec"] == get_codec(found["codec"]).get_config()
    assert (found["dtype"], found["shape"]) == ("float32", [60, 100])
    assert (found["raw_bytes"], found["stream_bytes"]) == (24000, len(blob))
    assert found["ratio"] == 24000 / len(blob)
    assert found["bits_per_value"] == 8 * len(blob) / 6000
    assert found["domain"] == "linear"
    assert 0.0399 < found["step"] <= 0.04
    assert found["chunk_elements"] == 2000
    assert [chunk["shape"] for chunk in found["chunks"]] == [[20, 100]] * 3
    assert [chunk["exceptions"] for chunk in found["chunks"]] == [5, 0, 0]
    assert found["exceptions"] == 5
    first = found["chunks"][0]
    assert first["kind"] == "interpolation"
    assert len(first["weights"]) == 2
    assert first["spline"] in ("linear", "cubic")
    assert first["alpha"] >= 1
    assert first["beta"] >= 1
    assert sum(chunk["stream_bytes"] for chunk in found["chunks"]) < len(blob)
    found = inspect(compress(X, mode="pw_rel", bound=1e-2, predictor="differences"))
    assert found["domain"] == "logarithmic"
    assert len(found["chunks"][0]["orders"]) == 2


def test_inspect_of_other_streams() -> None:
    found = inspect(compress(X, "lowtide.zstd"))
    assert found["codec"] == {"id": "lowtide.zstd", "level": 3}
    assert "chunks" not in found
    empty = inspect(compress(np.zeros((0, 3)), bound=1))
    assert (empty["ratio"], empty["bits_per_value"], empty["chunks"]) == (None, None, [])
    blob = compress(X, bound=1e-3)
    for damaged in (blob[:-1], b"", forge(blob, payload=b"123")):
        with pytest.raises(CorruptStreamError):
            inspect(damaged)


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lowtide.compression as c; "
        "heavy = {'torch', 'numpy', 'zstandard', 'lowtide.core'} & set(sys.modules); "
        "assert not heavy, heavy; c.compress; assert 'numpy' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _: Any = lowtide.compression.shrink
