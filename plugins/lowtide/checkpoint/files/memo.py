"""What tensors are, read at once; and what a file was made of, so that the next one is made faster.

Nothing here refers to a tensor or its memory: facts are numbers and names, and what follows from
them is the same whenever they are. So a memo is never stale, it only fits or does not.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lowtide.checkpoint.files import opcodes


class Metadata(NamedTuple):
    """What torch tells about a tensor by one name each."""

    dtype: torch.dtype
    shape: torch.Size
    requires_grad: bool
    is_cpu: bool
    grad_fn: Any
    nbytes: int


class Facts(NamedTuple):
    """All that matters about a strided tensor, and where it is."""

    kind: type
    metadata: Metadata
    stride: tuple[int, ...]
    offset: int
    is_neg: bool
    has_attributes: bool
    has_hooks: bool
    storage: int  # its address as an object of torch
    address: int  # of its memory
    storage_bytes: int


_METADATA = operator.attrgetter(*Metadata._fields)
_ATTRIBUTES = operator.attrgetter("__dict__")
_HOOKS = operator.attrgetter("_backward_hooks")
_VERSION = operator.attrgetter("_version")
_CDATA = operator.attrgetter("_cdata")
_Columns = tuple[list[torch.UntypedStorage], list[Any]]
_NO_MEMORY = (RuntimeError, NotImplementedError, AttributeError)  # what sparse or nested ones raise


def look_at(tensors: Sequence[torch.Tensor]) -> _Columns | None:
    """Return the storages and the `Facts` (as bare tuples, for speed) of tensors.

    None if one of them has no storage.
    """
    try:
        storages = list(map(torch.Tensor.untyped_storage, tensors))
        columns = (
            *(map(type, tensors), map(_METADATA, tensors), map(torch.Tensor.stride, tensors)),
            *(map(torch.Tensor.storage_offset, tensors), map(torch.Tensor.is_neg, tensors)),
            *(map(bool, map(_ATTRIBUTES, tensors)), map(bool, map(_HOOKS, tensors))),
            *(map(_CDATA, storages), map(torch.UntypedStorage.data_ptr, storages)),
            map(torch.UntypedStorage.nbytes, storages),
        )
        return storages, list(zip(*columns, strict=True))
    except _NO_MEMORY:
        return None


def has_own_storage(facts: Any) -> bool:
    """Tell whether a tensor is nothing but the whole memory of a storage of the host."""
    kind, (dtype, _, _, is_cpu, grad_fn, size), _, _, is_neg, has_attributes, has_hooks = facts[:7]
    return (
        size == facts[9] > 0
        and (kind is torch.Tensor or kind is torch.nn.Parameter)
        and grad_fn is None  # a memo must not keep a graph
        and is_cpu
        and not (is_neg or has_attributes or has_hooks)
        and dtype in opcodes.STORAGES
    )


def versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return how often each tensor has been changed, as PyTorch counts; 0 where it does not."""
    tensors = list(tensors)
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # one was made in inference mode
        return [0 if each.is_inference() else each._version for each in tensors]


@dataclass
class Memo:
    """A file as it was laid out, by the positions of its tensors among all of them.

    Attributes:
        facts: Of each tensor that has a storage for itself, else None.
        numbers: Of their records.
        opcodes: That push them.
        token: Begins the marks that stand for tensors until their opcodes are put there.
        marks: What pickles a mark, for each tensor.
        stream: The pickle with marks.
        pushed: What the marks stood for.
        pickled: The pickle without marks.
        size_bytes: Of the whole file; 0 before the first. The next one may have another.
    """

    facts: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    opcodes: list[bytes] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    marks: list[Any] = field(default_factory=list)
    stream: bytes = b""
    pushed: list[bytes] = field(default_factory=list)
    pickled: bytes = b""
    size_bytes: int = 0

    def forget_behind(self, count: int) -> None:
        """Forget what is beyond the number of tensors that there are now."""
        for each in (self.facts, self.numbers, self.opcodes, self.marks):
            del each[count:]

    def marks_for(self, count: int, mark: Callable[..., Any]) -> list[Any]:
        """Return at least so many marks."""
        for number in range(len(self.marks), count):
            self.marks.append((mark, (f"{self.token}{number:08x}",)))
        return self.marks

    def make_room(self, count: int) -> None:
        """Make room for so many tensors, of which nothing is known yet."""
        missing = count - len(self.facts)
        self.facts += [None] * missing
        self.numbers += [-1] * missing
        self.opcodes += [b""] * missing

    def forget(self, begin: int, count: int) -> None:
        """Forget what was noted of so many tensors from `begin` on."""
        self.facts[begin : begin + count] = [None] * count

    def note(
        self, begin: int, facts: list[Any], numbers: Sequence[int], opcodes: list[bytes]
    ) -> None:
        """Note tensors from `begin` on that have storages for themselves."""
        end = begin + len(facts)
        self.facts[begin:end], self.numbers[begin:end] = facts, numbers
        self.opcodes[begin:end] = opcodes

    def fits(self, begin: int, facts: list[Any], number: int) -> bool:
        """Tell whether tensors from `begin` on were the same, in records from `number` on."""
        end = begin + len(facts)
        numbers = list(range(number, number + len(facts)))
        return self.facts[begin:end] == facts and self.numbers[begin:end] == numbers
