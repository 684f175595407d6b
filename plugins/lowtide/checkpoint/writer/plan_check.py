"""Checks of a plan for the writer in Python; the native writer has the same in file_spec.cpp."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from lowtide.checkpoint.writer.plan import LITERAL, FilePlan

PATCH_BYTES = 4


def check_plan(plan: FilePlan) -> None:
    """Raise ValueError if the arrays of `plan` contradict each other."""
    for name, kind, dimensions in (
        ("offsets", np.uint64, 1),
        ("lengths", np.uint64, 1),
        ("addresses", np.uint64, 1),
        ("entries", np.int32, 1),
        ("literals", np.uint8, 1),
        ("patches", np.uint64, 2),
    ):
        _check_array(plan, name, kind, dimensions)
    pieces = len(plan.offsets)
    if not len(plan.lengths) == len(plan.addresses) == len(plan.entries) == pieces:
        _fail(plan, "offsets, lengths, addresses and entries differ in their number of elements")
    if plan.patches.shape[1] != 2:
        _fail(plan, f"patches: got shape {plan.patches.shape}, allowed is (n, 2)")
    _check_pieces(plan)
    _check_patches(plan)


def check_begins_with(plan: FilePlan, begin: FilePlan) -> None:
    """Raise ValueError unless `plan` begins with all pieces of `begin`; literals may have moved."""
    count = len(begin.offsets)
    is_literal = begin.entries == LITERAL
    is_same = (
        plan.path == begin.path
        and np.array_equal(plan.offsets[:count], begin.offsets)
        and np.array_equal(plan.lengths[:count], begin.lengths)
        and np.array_equal(plan.entries[:count], begin.entries)
        and bool(np.all(is_literal | (plan.addresses[:count] == begin.addresses)))
    )
    if not is_same:
        _fail(plan, "it does not begin with the pieces that were submitted")


def _fail(plan: FilePlan, text: str) -> NoReturn:
    raise ValueError(f"plan of {plan.path}: {text}")


def _check_array(plan: FilePlan, name: str, kind: Any, dimensions: int) -> None:
    array = getattr(plan, name)
    is_right = (
        isinstance(array, np.ndarray)
        and array.dtype == kind
        and array.ndim == dimensions
        and array.flags.c_contiguous
    )
    if not is_right:
        found = (
            f"{array.dtype} array of shape {array.shape}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        wanted = np.dtype(kind)
        _fail(
            plan,
            f"{name}: got {found}, allowed is a C-contiguous numpy array of {wanted} with "
            f"{dimensions} dimension(s)",
        )


def _check_pieces(plan: FilePlan) -> None:
    covered = 0
    allowed = len(plan.offsets) + len(plan.patches)
    begin, size = plan.literals.ctypes.data, plan.literals.size
    for i, (offset, length, address, entry) in enumerate(pieces_of(plan)):
        if offset != covered:
            _fail(
                plan,
                f"offsets[{i}]: got {offset}, allowed is {covered}: pieces follow each other "
                "without gaps",
            )
        left = plan.size_bytes - covered
        if not 1 <= length <= left:
            _fail(
                plan,
                f"lengths[{i}]: got {length}, allowed is 1 to {left}, what is left of the file's "
                "size",
            )
        covered += length
        if address == 0 or address + length > 2**64 - 1:
            _fail(plan, f"addresses[{i}]: got {address}, allowed is the address of memory")
        if entry == LITERAL and not begin <= address <= begin + size - length:
            _fail(
                plan,
                f"addresses[{i}]: got {address}, allowed for a literal is a place in the memory "
                "of the literals",
            )
        if not LITERAL <= entry < allowed:
            _fail(plan, f"entries[{i}]: got {entry}, allowed is -1 to {allowed - 1}")
    if covered != plan.size_bytes:
        _fail(
            plan,
            f"the pieces cover {covered} bytes, allowed is the size, {plan.size_bytes}",
        )


def _check_patches(plan: FilePlan) -> None:
    allowed, before = len(plan.offsets) + len(plan.patches), -PATCH_BYTES
    for position, entry in sorted(plan.patches.tolist()):
        if entry >= allowed:
            _fail(plan, f"patches: got {entry} as entry, allowed is 0 to {allowed - 1}")
        if position > plan.literals.size - PATCH_BYTES:
            _fail(
                plan,
                f"a patch at {position}, allowed is a place for 4 bytes in "
                f"{plan.literals.size} bytes of literals",
            )
        if position - before < PATCH_BYTES:
            _fail(
                plan,
                f"patches at {before} and {position}, allowed are places that do not overlap",
            )
        before = position
    ends = {entry: offset + length for offset, length, _, entry in pieces_of(plan)}
    patches = plan.patches[np.argsort(plan.patches[:, 0])]
    for offset, length, address, entry in pieces_of(plan):
        if entry == LITERAL:
            for position, of in patches_in(plan, patches, address, length):
                if offset < ends.get(of, 0):
                    _fail(
                        plan,
                        f"a patch at {position} lies in the literal at file offset {offset}, "
                        f"allowed is one behind the end of its entry {of}, {ends[of]}",
                    )


def pieces_of(plan: FilePlan) -> list[tuple[int, int, int, int]]:
    """Return (offset, length, address, entry) of each piece."""
    columns = (plan.offsets, plan.lengths, plan.addresses, plan.entries)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def patches_in(plan: FilePlan, patches: Any, address: int, length: int) -> list[tuple[int, int]]:
    """Return those of `patches` (ascending) that touch a literal at `address`."""
    begin = address - plan.literals.ctypes.data
    first = np.searchsorted(patches[:, 0], max(begin - PATCH_BYTES + 1, 0))
    last = np.searchsorted(patches[:, 0], begin + length)
    return [(position, entry) for position, entry in patches[first:last].tolist()]
