"""Finds the native code, says why it is missing, and falls back to readable references.

The extension modules are built from ``csrc/`` when the package is installed and are optional:
each native operation has a reference in Python that gives the same bits. `status` answers for
``lowtide doctor``; nothing is loaded before the first use.

Environment: ``LOWTIDE_NATIVE=0`` forces the references (for tests and for doubts).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from lowtide.core.errors import NativeUnavailableError

Buffer: TypeAlias = Any
"""Any C-contiguous object with the buffer protocol: bytes, bytearray, memoryview, numpy array."""

_PACKAGE = Path(__file__).resolve().parent.parent
_CRC32 = 0xEDB88320  # both polynomials with their bits reversed
_CRC32C = 0x82F63B78
_INSTALL_AGAIN = "install again with: pip install --no-build-isolation -e ."


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeStatus:
    """What is known about one native extension module.

    Attributes:
        available: Whether it is loaded and used.
        path: The loaded file, or None.
        reason: Why it is not available and what to do, or None.
        features: Instruction sets of this processor that its kernels choose between.
        compiler: Name and version of the compiler that built it, or None.
        folders: The folders of ``csrc/`` in it.
    """

    available: bool
    path: Path | None = None
    reason: str | None = None
    features: tuple[str, ...] = ()
    compiler: str | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Loaded:
    module: ModuleType | None
    status: NativeStatus
    cause: ImportError | None = field(default=None, compare=False)


def native() -> ModuleType:
    """Return the extension module ``lowtide._native``, one submodule per folder of ``csrc/``.

    Raises:
        NativeUnavailableError: It is not built, does not load here or is switched off.
    """
    return _require(_load("_native"))


def native_cuda() -> ModuleType:
    """Return the extension module with the CUDA code, ``lowtide._native_cuda``.

    Raises:
        NativeUnavailableError: As for `native`; also where the build found no CUDA compiler.
    """
    return _require(_load("_native_cuda"))


def native_or_none() -> ModuleType | None:
    """Return what `native` returns, or None after one warning: the caller runs its reference."""
    loaded = _load("_native")
    if loaded.module is None:
        _warn_of_fallback()
    return loaded.module


def status() -> NativeStatus:
    """Return whether ``lowtide._native`` is in use, and the reason when it is not."""
    return _load("_native").status


def status_cuda() -> NativeStatus:
    """Return whether ``lowtide._native_cuda`` is in use, and the reason when it is not."""
    return _load("_native_cuda").status


def crc32c(data: Buffer, seed: int = 0) -> int:
    """Return the CRC32C (Castagnoli) checksum of the bytes of `data`.

    Args:
        data: C-contiguous object with the buffer protocol; for a torch tensor its ``.numpy()``.
        seed: Checksum of the bytes that come before, 0 to 2**32 - 1.

    Returns:
        0 to 2**32 - 1.

    Raises:
        TypeError: `data` has no buffer protocol or holds Python objects.
        ValueError: `data` is not C-contiguous or `seed` is out of range.
    """
    loaded = _load("_native")
    if loaded.module is None:
        _warn_of_fallback()
        return crc32c_reference(data, seed)
    return int(loaded.module.common.crc32c(data, seed))


def crc32c_combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """Return the CRC32C of A followed by B from their checksums, without their bytes.

    Args:
        crc_a: CRC32C of A.
        crc_b: CRC32C of B (with seed 0).
        length_b: Length of B in bytes.

    Raises:
        ValueError: A checksum is not in 0 to 2**32 - 1 or the length not in 0 to 2**64 - 1.
    """
    loaded = _load("_native")
    if loaded.module is None:
        _warn_of_fallback()
        return crc32c_combine_reference(crc_a, crc_b, length_b)
    return int(loaded.module.common.crc32c_combine(crc_a, crc_b, length_b))


def crc32(data: Buffer, seed: int = 0) -> int:
    """Return the CRC-32 of zip and zlib of the bytes of `data`; otherwise as `crc32c`."""
    loaded = _load("_native")
    if loaded.module is None:
        _warn_of_fallback()
        return crc32_reference(data, seed)
    return int(loaded.module.common.crc32(data, seed))


def crc32_combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """Return the CRC-32 of A followed by B; otherwise as `crc32c_combine`."""
    loaded = _load("_native")
    if loaded.module is None:
        _warn_of_fallback()
        return crc32_combine_reference(crc_a, crc_b, length_b)
    return int(loaded.module.common.crc32_combine(crc_a, crc_b, length_b))


def crc32_reference(data: Buffer, seed: int = 0) -> int:
    """Compute what `crc32` computes, with zlib (about a gigabyte a second)."""
    return zlib.crc32(_as_bytes(data), _checked("seed", seed, bits=32))


def crc32_combine_reference(crc_a: int, crc_b: int, length_b: int) -> int:
    """Compute what `crc32_combine` computes."""
    return _combine(crc_a, crc_b, length_b, polynomial=_CRC32)


def crc32c_reference(data: Buffer, seed: int = 0) -> int:
    """Compute what `crc32c` computes, one byte at a time in Python (some megabytes a second)."""
    view = _as_bytes(data)
    table = _crc_table()
    state = _checked("seed", seed, bits=32) ^ 0xFFFFFFFF
    for byte in view:
        state = (state >> 8) ^ table[(state ^ byte) & 0xFF]
    return state ^ 0xFFFFFFFF


def crc32c_combine_reference(crc_a: int, crc_b: int, length_b: int) -> int:
    """Compute what `crc32c_combine` computes."""
    return _combine(crc_a, crc_b, length_b, polynomial=_CRC32C)


def _require(loaded: _Loaded) -> ModuleType:
    if loaded.module is None:
        raise NativeUnavailableError(loaded.status.reason) from loaded.cause
    return loaded.module


def _load(name: str) -> _Loaded:
    # The environment is part of the key: a test may switch the native code off and on again.
    return _load_cached(name, os.environ.get("LOWTIDE_NATIVE") == "0")


@functools.cache
def _load_cached(name: str, is_switched_off: bool) -> _Loaded:
    built = build_info().get(name.removeprefix("_native").lstrip("_") or "native", {})
    known = {"compiler": built.get("compiler"), "folders": tuple(built.get("folders", ()))}
    if is_switched_off:
        reason = f"lowtide.{name} is switched off by LOWTIDE_NATIVE=0 in the environment"
        return _Loaded(module=None, status=NativeStatus(available=False, reason=reason, **known))
    try:
        module = importlib.import_module(f"lowtide.{name}")
    except ImportError as error:
        reason = f"lowtide.{name} is not available: {_why_missing(name, built, error)}"
        status = NativeStatus(available=False, reason=reason, **known)
        return _Loaded(module=None, status=status, cause=error)
    path = Path(str(module.__file__))
    features = tuple(module.common.cpu_features()) if name == "_native" else ()
    return _Loaded(
        module=module, status=NativeStatus(available=True, path=path, features=features, **known)
    )


def _why_missing(name: str, built: Mapping[str, Any], error: ImportError) -> str:
    if not built:
        return f"nothing was built beside {_PACKAGE}; {_INSTALL_AGAIN}"
    if built.get("reason"):
        return str(built["reason"])
    found = sorted(path.name for path in _PACKAGE.glob(f"{name}.*"))
    if isinstance(error, ModuleNotFoundError):
        return (
            f"it was built, but {_PACKAGE} holds no module for this Python "
            f"(found: {', '.join(found) or 'none'}); {_INSTALL_AGAIN}"
        )
    return f"{', '.join(found)} does not load: {error}; {_INSTALL_AGAIN}"


def build_info() -> Mapping[str, Any]:
    """Return what the build wrote about itself; empty where nothing was built."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


@functools.cache
def _warn_of_fallback() -> None:
    warnings.warn(
        f"{status().reason}. The Python references run instead: same results, much slower.",
        RuntimeWarning,
        stacklevel=3,
    )


def _as_bytes(data: Buffer) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(
            f"data: got {type(data).__name__}, allowed is any object with the buffer protocol "
            "(bytes, bytearray, memoryview, numpy array); for a torch tensor pass tensor.numpy()"
        ) from None
    if "O" in view.format:
        raise TypeError(
            f"data: got {type(data).__name__} that holds Python objects, allowed are plain "
            "numbers or bytes"
        )
    if not view.c_contiguous:
        raise ValueError(
            f"data: got a {type(data).__name__} that is not C-contiguous; pass "
            "numpy.ascontiguousarray(x) or bytes(x)"
        )
    # cast() knows neither empty shapes nor record formats; tobytes() does, at the cost of a copy.
    return memoryview(view.tobytes())


def _checked(name: str, value: int, *, bits: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is int")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: got {value}, allowed is 0 to {(1 << bits) - 1}")
    return value


def _combine(crc_a: int, crc_b: int, length_b: int, *, polynomial: int) -> int:
    crc_a = _checked("crc_a", crc_a, bits=32)
    crc_b = _checked("crc_b", crc_b, bits=32)
    length_b = _checked("length_b", length_b, bits=64)
    # Appending zeros is linear over GF(2), so it is a 32 x 32 bit matrix, kept as its columns;
    # squaring the matrix doubles the number of zeros.
    zeros = [_after_zero_byte(1 << bit, polynomial) for bit in range(32)]
    while length_b:
        if length_b & 1:
            crc_a = _apply(zeros, crc_a)
        zeros = [_apply(zeros, column) for column in zeros]
        length_b >>= 1
    return crc_a ^ crc_b


@functools.cache
def _crc_table() -> tuple[int, ...]:
    return tuple(_after_zero_byte(byte, _CRC32C) for byte in range(256))


def _after_zero_byte(state: int, polynomial: int) -> int:
    for _ in range(8):
        state = (state >> 1) ^ (polynomial if state & 1 else 0)
    return state


def _apply(columns: list[int], vector: int) -> int:
    result = 0
    for column in columns:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
