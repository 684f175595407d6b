"""What autograd holds in place of a saved tensor, and how several readers share it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lowtide.compression.activations.layout import Form, Region
from lowtide.compression.activations.quantiser import Codes
from lowtide.core.errors import SavedTensorError


class Held:
    """The elements of one region: their codes, or None where readers hold them as they are.

    Ends with its last reader.
    """

    __slots__ = ("__weakref__", "codes")

    def __init__(self, codes: Codes | None) -> None:
        self.codes = codes


class Reader:
    """What the pack hook gives to autograd: the saved tensor can be made from it.

    It shares the tensor's version counter, but, where there are codes, not its memory, so that a
    change in place is noticed as stock notices it: hooks switch autograd's own check off.
    """

    __slots__ = ("_form", "_held", "_version", "_witness")

    def __init__(self, tensor: Tensor, held: Held | None = None, form: Form | None = None) -> None:
        """Read `tensor` in `form` from the codes of `held`, or as it is."""
        self._held = held
        self._form = form
        self._version = tensor._version
        is_coded = held is not None and held.codes is not None
        # Detached: an operation's output would hold the node that holds it, for ever if no
        # backward pass comes.
        self._witness = tensor.detach()
        if is_coded:
            self._witness.data = tensor.new_empty(0)

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            SavedTensorError: it was changed in place after it had been saved.
        """
        version = self._witness._version
        if version != self._version:
            raise SavedTensorError(
                f"one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: it is at version {version}; expected version {self._version} "
                f"instead. Stock PyTorch refuses this too; without lowtide.compression its "
                f"message names the operation"
            )
        codes = None if self._held is None else self._held.codes
        if codes is None or self._form is None:
            return self._witness
        with torch.no_grad():
            return self._form.of(codes.decode())


class Released:
    """A parameter that its host takes away between forward and backward, in place of its memory."""

    __slots__ = ("_fetch",)

    def __init__(self, fetch: Callable[[], Tensor]) -> None:
        self._fetch = fetch

    def read(self) -> Tensor:
        """Return the tensor, from the parameter's memory of this moment."""
        with torch.no_grad():
            return self._fetch()


_Key = tuple[int, torch.dtype, int, Region]


class Shared:
    """Finds what is held of a region already. Keeps neither tensors nor what is held alive."""

    def __init__(self) -> None:
        self._entries: dict[_Key, tuple[StorageWeakRef, weakref.ref[Held]]] = {}
        self._sweep_at = 256

    def key(self, tensor: Tensor, region: Region) -> _Key:
        """Return what stays the same as long as the region's elements do."""
        return tensor.untyped_storage()._cdata, tensor.dtype, tensor._version, region

    def find(self, key: _Key) -> Held | None:
        """Return what is held of the region, if it still is and the storage is the same one."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        storage, held = entry
        # The address of a storage is not used again while a weak reference to it exists.
        return None if storage.expired() else held()

    def put(self, key: _Key, tensor: Tensor, held: Held) -> None:
        """Remember `held`."""
        if len(self._entries) >= self._sweep_at:
            self._sweep()
        self._entries[key] = (StorageWeakRef(tensor.untyped_storage()), weakref.ref(held))

    def _sweep(self) -> None:
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if entry[1]() is not None and not entry[0].expired()
        }
        self._sweep_at = max(256, 2 * len(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
