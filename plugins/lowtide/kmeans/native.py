"""The backend in C++: one fused pass on the CPU, its checksums inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError, NativeUnavailableError
from lowtide.core.native import native
from lowtide.kmeans.backend import Assignment, Backend, Floats, Prepared
from lowtide.kmeans.checks import KAPPA_SUMS, kappa_for
from lowtide.kmeans.injection import Injector
from lowtide.kmeans.protection import FaultReport, Protection


class NativeBackend(Backend):
    """Lloyd's two steps by ``csrc/kmeans``, for samples in host memory.

    The samples are copied once, about their mean, in the layout of the kernels. Labels and sums
    have the same bits for any number of threads; distances and inertia too.

    Args:
        threads: At most so many; None is ``torch.get_num_threads()``.
        level: Instruction set: "auto" (the best of the processor), "avx512", "avx2" or "generic".
        injector: Puts faults in, for tests.

    Raises:
        NativeUnavailableError: The native code is not built, or has no K-Means.
    """

    name = "native"

    def __init__(
        self, threads: int | None = None, level: str = "auto", injector: Injector | None = None
    ) -> None:
        module = native()
        if not hasattr(module, "kmeans"):
            raise NativeUnavailableError(
                "this build of the native code has no kmeans; install Lowtide again"
            )
        self._module = module.kmeans
        self._threads = threads
        self._level = level
        self._injector = injector

    def prepare(self, samples: Any, weights: NDArray[np.float64] | None = None) -> Prepared:
        """Return samples made ready; see `Backend.prepare`.

        Raises:
            DataError: The samples are not a C-contiguous float32 or float64 matrix, or not finite.
        """
        rows = samples.numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
        kinds = {np.dtype(np.float32): "SamplesFloat32", np.dtype(np.float64): "SamplesFloat64"}
        if rows.dtype not in kinds or rows.ndim != 2 or not rows.flags.c_contiguous:
            raise DataError(
                f"samples: got {rows.dtype} of shape {rows.shape}"
                f"{'' if rows.flags.c_contiguous else ', not C-contiguous'}, allowed are "
                f"C-contiguous float32 and float64 of shape (samples, features); pass "
                f"numpy.ascontiguousarray(samples, numpy.float32)"
            )
        if rows.shape[1] == 0:
            raise DataError(f"samples: got shape {rows.shape}, allowed is one feature and more")
        threads = torch.get_num_threads() if self._threads is None else self._threads
        kind = getattr(self._module, kinds[rows.dtype])
        try:
            made = kind(rows, weights, self._level, threads)
        except ValueError as error:
            raise DataError(str(error)) from error
        return _Prepared(made, rows, threads, self._injector)


class _Prepared(Prepared):
    def __init__(self, made: Any, rows: Floats, threads: int, injector: Injector | None) -> None:
        self._made = made
        self._rows = rows
        self._threads = threads
        self._injector = injector

    def assign(
        self, centroids: Floats, protection: Protection | None = None, *, distances: bool = True
    ) -> Assignment:
        """See `Prepared.assign`."""
        protection = protection or Protection()
        with np.errstate(over="ignore"):  # refused below
            places = np.ascontiguousarray(centroids, self._rows.dtype)
        if not np.isfinite(places).all():
            raise DataError(
                f"centroids: {int((~np.isfinite(places)).sum())} elements are not finite in "
                f"{places.dtype}, allowed are finite numbers"
            )
        features = self._rows.shape[1]
        faults = self._injector.plan(len(self._rows), places) if self._injector else []
        try:
            found = self._made.assign(
                places,
                protection.mode,
                protection.kappa or kappa_for(features),
                KAPPA_SUMS,
                distances,
                self._threads,
                faults,
            )
        except ValueError as error:
            raise DataError(str(error)) from error
        injected = self._injector.note(found["log"]) if self._injector else 0
        return Assignment(
            labels=found["labels"],
            distances=found["distances"],
            sums=found["sums"],
            counts=found["counts"],
            inertia=found["inertia"],
            report=FaultReport(injected=injected, **found["report"]),
        )
