"""Host memory that a GPU copies from and to at full speed, of exactly the size asked for.

torch's own pinned memory comes in powers of two: 33 GB of optimizer state would take 64 GiB of
memory that can never be swapped. Larger blocks are mapped here, on huge pages where the system has
them, and registered with CUDA. Not run on a GPU yet.

The mapping is private, as Linux gives huge pages to shared ones only where an administrator has
asked for that. A fork does not inherit it: the kernel would copy every pinned page for the child,
and older kernels would leave the GPU with pages that are the parent's no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REGISTERED_BYTES = 2 << 20
"""Blocks from this size on are registered; smaller ones are torch's."""

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all GPUs
_foreign: list[_Block] = []  # blocks of the process that this one is a fork of


class _Block(mmap.mmap):
    """A mapping that is given back to CUDA before it goes."""

    address: int | None = None
    owner: int | None = None  # the process that has the mapping
    device: int | None = None  # the GPU that works with it

    def register(self) -> None:
        """Pin it.

        Raises:
            RuntimeError: CUDA refuses, as for lack of memory that may be locked.
        """
        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        status = int(_runtime().cudaHostRegister(address, len(self), _PORTABLE))
        if status != 0:
            # The runtime would hand the error to the next launch, which has no part in it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            raise RuntimeError(f"CUDA cannot pin {len(self)} bytes: cudaHostRegister gave {status}")
        self.address, self.owner = address, os.getpid()
        with contextlib.suppress(Exception):  # without it, the current one is waited for
            self.device = torch.cuda.current_device()

    def __del__(self) -> None:
        if self.address is None:
            return
        if self.owner != os.getpid():
            # Nothing of it is here, and what has taken its place must not be unmapped.
            _foreign.append(self)
            return
        # torch defers the end of its own pinned memory until copies are through; of this it knows
        # nothing, so a copy that somebody has started without waiting may be under way.
        with contextlib.suppress(Exception):  # CUDA may have been shut down
            torch.cuda.synchronize(self.device)
        with contextlib.suppress(Exception):
            _runtime().cudaHostUnregister(self.address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pinned_empty(shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate a contiguous pinned tensor; it is unpinned when the last view of it is gone.

    Raises:
        RuntimeError: CUDA refuses to pin so much, or the system has not so much.
    """
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(dims)
    nbytes = count * dtype.itemsize
    if nbytes < REGISTERED_BYTES:
        return torch.empty(dims, dtype=dtype, pin_memory=True)
    try:
        block = _Block(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"no {nbytes} bytes of host memory to pin: {error}") from error
    with contextlib.suppress(OSError):  # a system without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    block.madvise(mmap.MADV_DONTFORK)
    block.register()
    return torch.frombuffer(block, dtype=dtype, count=count).view(dims)
