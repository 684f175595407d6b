"""Which implementation of Lloyd's steps runs: by name, or the fastest that takes the samples."""

from __future__ import annotations

from typing import Any

import torch

from lowtide.core.errors import ConfigError, NativeUnavailableError, listed, near
from lowtide.core.native import native_or_none, status
from lowtide.kmeans.backend import Backend

NAMES = ("auto", "native", "torch", "reference")


def choose(name: str = "auto", samples: Any = None) -> Backend:
    """Return a backend.

    Args:
        name: "native" (compiled, host memory), "torch" (any device), "reference" (float64, slow,
            without checks), or "auto": torch for tensors that are not in host memory, else native
            where it is built, else torch.
        samples: What it is to work on.

    Raises:
        ConfigError: no such backend, or it cannot take these samples.
        NativeUnavailableError: "native" is asked for and not built.
    """
    if name not in NAMES:
        raise ConfigError(
            f'backend: "{name}" is unknown.{near(str(name), NAMES)} Allowed: {listed(NAMES)}'
        )
    is_on_device = isinstance(samples, torch.Tensor) and samples.device.type != "cpu"
    if is_on_device and name in ("native", "reference"):
        raise ConfigError(
            f'backend: "{name}" works in host memory, the samples are on {samples.device}; pass '
            f'"torch" or "auto", or samples.cpu()'
        )
    if name == "reference":
        from lowtide.kmeans.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "native" and not _is_native_there():
        raise NativeUnavailableError(
            f'backend: "native" is not built here ({status().reason or "without csrc/kmeans"}); '
            f'install again, or pass "auto"'
        )
    if name == "native" or (name == "auto" and not is_on_device and _is_native_there()):
        from lowtide.kmeans.native import NativeBackend

        return NativeBackend()
    from lowtide.kmeans.portable import TorchBackend

    return TorchBackend()


def _is_native_there() -> bool:
    return hasattr(native_or_none(), "kmeans")
