"""Checksums in all their forms, and what `lowtide.core.native` says without native code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core import native
from lowtide.core.errors import NativeUnavailableError

Checksum = Callable[..., int]

# RFC 3720, appendix B.4, and the check value of the CRC catalogue.
READ_COMMAND = bytes.fromhex(
    "01c000000000000000000000000000001400000000000400"
    "000000140000001828000000000000000200000000000000"
)  # fmt: skip
VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (READ_COMMAND, 0xD9963A56),
]
# Lengths around a word, around three short lanes and around three long ones.
EDGES = [0, 1, 7, 8, 9, 575, 576, 577, 1151, 1152, 12287, 12288, 12289, 12288 + 576, 24577]


def implementations() -> dict[str, Checksum]:
    found: dict[str, Checksum] = {"reference": native.crc32c_reference, "public": native.crc32c}
    if native.status().available:
        common = native.native().common
        found["native"] = common.crc32c
        found["portable"] = common.crc32c_portable
        if "sse4.2" in native.status().features:
            found["sse4.2"] = common.crc32c_sse42
    return found


@pytest.fixture(params=sorted(implementations()))
def checksum(request: pytest.FixtureRequest) -> Checksum:
    return implementations()[request.param]


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    native._warn_of_fallback.cache_clear()
    yield
    native._warn_of_fallback.cache_clear()


def some_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_native_is_built_where_a_compiler_is() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler on this machine: the references run")
    status = native.status()
    assert status.available, status.reason
    assert status.path is not None
    assert status.path.exists()
    assert "common" in status.folders
    assert status.compiler


@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_known_vectors(checksum: Checksum, data: bytes, expected: int) -> None:
    assert checksum(data) == expected


@given(data=st.binary(max_size=2000), seed=st.integers(0, 2**32 - 1), skip=st.integers(0, 15))
@settings(deadline=None, max_examples=200)
def test_all_implementations_agree_on_any_alignment(data: bytes, seed: int, skip: int) -> None:
    part = memoryview(data)[skip:]
    expected = native.crc32c_reference(part, seed)
    assert {name: f(part, seed) for name, f in implementations().items()} == dict.fromkeys(
        implementations(), expected
    )


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("skip", [0, 1, 3])
def test_all_implementations_agree_around_lane_ends(size: int, skip: int) -> None:
    part = memoryview(some_bytes(size + skip, size))[skip:]
    expected = native.crc32c_reference(part)
    assert {name: f(part) for name, f in implementations().items()} == dict.fromkeys(
        implementations(), expected
    )


@pytest.mark.parametrize("size", EDGES)
def test_seed_continues_a_checksum(checksum: Checksum, size: int) -> None:
    data = some_bytes(size)
    cut = size // 3
    assert checksum(data[cut:], checksum(data[:cut])) == native.crc32c_reference(data)


@given(a=st.binary(max_size=300), b=st.binary(max_size=300))
@settings(deadline=None)
def test_combine_equals_checksum_of_the_whole(a: bytes, b: bytes) -> None:
    whole = native.crc32c_reference(a + b)
    crc_a, crc_b = native.crc32c_reference(a), native.crc32c_reference(b)
    assert native.crc32c_combine(crc_a, crc_b, len(b)) == whole
    assert native.crc32c_combine_reference(crc_a, crc_b, len(b)) == whole


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40 + 7, 2**64 - 1])
def test_combine_native_equals_reference_for_long_parts(length: int) -> None:
    combined = native.crc32c_combine(0x12345678, 0x9ABCDEF0, length)
    assert combined == native.crc32c_combine_reference(0x12345678, 0x9ABCDEF0, length)


def zip_implementations() -> dict[str, Checksum]:
    found: dict[str, Checksum] = {"reference": native.crc32_reference, "public": native.crc32}
    if native.status().available:
        common = native.native().common
        found["portable"] = common.crc32_portable
        if "pclmul" in native.status().features:
            found["pclmul"] = common.crc32_pclmul
    return found


@pytest.fixture(params=sorted(zip_implementations()))
def zip_checksum(request: pytest.FixtureRequest) -> Checksum:
    return zip_implementations()[request.param]


def test_crc32_is_that_of_zlib_at_every_length(zip_checksum: Checksum) -> None:
    data = memoryview(some_bytes(700))
    seeds = np.random.default_rng(1).integers(0, 2**32, 601).tolist()
    for size, seed in enumerate(seeds):
        part = data[size % 17 : size % 17 + size]
        assert zip_checksum(part) == zlib.crc32(part)
        assert zip_checksum(part, seed) == zlib.crc32(part, seed)


@pytest.mark.parametrize("size", [4095, 65536, 1_000_003, (1 << 24) + 13])
@pytest.mark.parametrize("skip", [0, 1, 8, 15])
def test_crc32_is_that_of_zlib_for_long_data(zip_checksum: Checksum, size: int, skip: int) -> None:
    part = memoryview(some_bytes(size + skip, size))[skip:]
    assert zip_checksum(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)


@given(a=st.binary(max_size=300), b=st.binary(max_size=300))
@settings(deadline=None)
def test_crc32_combine_equals_checksum_of_the_whole(a: bytes, b: bytes) -> None:
    for combine in (native.crc32_combine, native.crc32_combine_reference):
        assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 2**31, 2**40 + 7, 2**63, 2**64 - 1])
def test_crc32_combine_native_equals_reference_for_long_parts(length: int) -> None:
    combined = native.crc32_combine(0x12345678, 0x9ABCDEF0, length)
    assert combined == native.crc32_combine_reference(0x12345678, 0x9ABCDEF0, length)


def test_crc32_checks_its_arguments_as_crc32c_does(zip_checksum: Checksum) -> None:
    assert zip_checksum(b"", 77) == 77
    with pytest.raises(TypeError, match=r"data: got str"):
        zip_checksum("text")
    with pytest.raises(ValueError, match=r"data: .*not C-contiguous"):
        zip_checksum(np.arange(10)[::2])
    with pytest.raises(ValueError, match=r"seed: got -1, allowed is 0 to 4294967295"):
        zip_checksum(b"x", -1)


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(bytearray(data)).toreadonly(),
        lambda data: np.frombuffer(data, np.uint8),
        lambda data: np.frombuffer(data, np.float64).reshape(4, -1),
        lambda data: np.frombuffer(data, [("a", "<i4"), ("b", "<f4")]),
        lambda data: torch.frombuffer(bytearray(data), dtype=torch.float32).numpy(),
    ],
    ids=["bytes", "bytearray", "memoryview", "readonly", "uint8", "float64-2d", "record", "torch"],
)
def test_any_contiguous_buffer_is_taken(checksum: Checksum, make: Callable[[bytes], Any]) -> None:
    data = some_bytes(64)
    assert checksum(make(data)) == native.crc32c_reference(data)


@pytest.mark.parametrize("empty", [b"", np.empty((0, 3), np.float32), bytearray()])
def test_empty_buffers_have_the_seed_as_checksum(checksum: Checksum, empty: Any) -> None:
    assert checksum(empty, 77) == 77


def test_zero_dimensional_array_is_taken(checksum: Checksum) -> None:
    assert checksum(np.array(1.5)) == native.crc32c_reference(np.float64(1.5).tobytes())


@pytest.mark.parametrize(
    "data",
    [np.arange(10)[::2], np.arange(12).reshape(3, 4).T, memoryview(b"abcdef")[::-1]],
    ids=["strided", "transposed", "reversed"],
)
def test_gaps_raise_value_error_that_says_what_to_do(checksum: Checksum, data: Any) -> None:
    with pytest.raises(ValueError, match=r"data: .*not C-contiguous.*ascontiguousarray"):
        checksum(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", r"data: got str, allowed is any object with the buffer protocol"),
        (12, r"data: got int"),
        (None, r"data: got NoneType"),
        (torch.zeros(3), r"data: got .*Tensor.*tensor\.numpy\(\)"),
        (np.array([object()]), r"holds Python objects"),
    ],
    ids=["str", "int", "none", "tensor", "objects"],
)
def test_wrong_types_raise_type_error(checksum: Checksum, data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        checksum(data)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seed_out_of_range_names_the_range(checksum: Checksum, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed: got {seed}, allowed is 0 to 4294967295"):
        checksum(b"x", seed)


@pytest.mark.parametrize(
    "combine",
    [
        native.crc32c_combine,
        native.crc32c_combine_reference,
        native.crc32_combine,
        native.crc32_combine_reference,
    ],
)
@pytest.mark.parametrize(
    ("arguments", "name"),
    [((-1, 0, 0), "crc_a"), ((0, 2**32, 0), "crc_b"), ((0, 0, -5), "length_b")],
)
def test_combine_out_of_range_names_the_argument(
    combine: Checksum, arguments: tuple[int, int, int], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name}: got .*allowed is 0 to"):
        combine(*arguments)


def test_other_threads_run_while_native_works() -> None:
    common = pytest.importorskip("lowtide._native").common
    data = np.zeros(1 << 26, np.uint8)

    def is_released() -> bool:
        started, is_done = threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            common.crc32c_portable(data)
            is_done.set()

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        saw_it_working = not is_done.is_set()
        thread.join()
        return saw_it_working

    # No thread is asked to give its turn away, so this one sees the other between `started` and
    # `is_done` only if the native code lets go of the GIL. A busy machine may wake this thread
    # too late to see it, hence the tries; with the GIL held, no number of them helps.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        assert any(is_released() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def test_buffer_cannot_be_resized_while_in_use() -> None:
    pytest.importorskip("lowtide._native")
    data = bytearray(64)
    native.crc32c(data)
    data.extend(b"free again")  # would raise BufferError if the view had leaked
    assert len(data) == 74


@pytest.mark.usefixtures("without_native")
def test_switch_selects_reference_and_warns_once() -> None:
    assert not native.status().available
    assert "LOWTIDE_NATIVE=0" in str(native.status().reason)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert native.crc32c(b"123456789") == 0xE3069283
        assert native.crc32c(b"123456789") == 0xE3069283
        assert native.crc32c_combine(1, 2, 3) == native.crc32c_combine_reference(1, 2, 3)
        assert native.crc32(b"123456789") == 0xCBF43926
        assert native.crc32_combine(1, 2, 3) == native.crc32_combine_reference(1, 2, 3)
    texts = [(w.category, str(w.message), w.filename) for w in seen]
    assert len(texts) == 1
    assert texts[0][0] is RuntimeWarning
    assert "LOWTIDE_NATIVE=0" in texts[0][1]
    assert texts[0][2] == __file__
    with pytest.raises(NativeUnavailableError, match="LOWTIDE_NATIVE=0"):
        native.native()


def test_missing_cuda_part_says_why() -> None:
    status = native.status_cuda()
    if status.available:
        pytest.skip("the CUDA part is built here")
    assert status.reason
    with pytest.raises(NativeUnavailableError, match="_native_cuda"):
        native.native_cuda()


@pytest.mark.parametrize(
    ("info", "module", "message"),
    [
        (None, None, r"nothing was built.*pip install"),
        (
            {"native": {"is_built": False, "reason": "no C++ compiler: 'c9'"}},
            None,
            r"compiler: 'c9'",
        ),
        ({"native": {"is_built": True}}, None, r"no module for this Python \(found: none\)"),
        ({"native": {"is_built": True}}, "_native.cpython-27.so", r"found: _native.cpython-27.so"),
        ({"native": {"is_built": True}}, "_native.abi3.so", r"_native.abi3.so does not load: "),
    ],
    ids=["nothing", "no-compiler", "lost", "other-python", "damaged"],
)
def test_status_tells_why_a_copy_without_native_has_none(
    tmp_path: Path, info: dict[str, Any] | None, module: str | None, message: str
) -> None:
    package = tmp_path / "lowtide"
    source = Path(native.__file__).parents[1]
    (package / "core").mkdir(parents=True)
    for name in ("__init__.py", "core/__init__.py", "core/errors.py", "core/native.py"):
        shutil.copy(source / name, package / name)
    if info is not None:
        (package / "_build_info.json").write_text(json.dumps(info))
    if module is not None:
        (package / module).write_bytes(b"not a library")
    code = (
        "from lowtide.core import native; s = native.status(); assert not s.available; "
        "print(s.reason); import warnings; warnings.simplefilter('ignore'); "
        "assert native.crc32c(b'123456789') == 0xE3069283"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(message, done.stdout), done.stdout
