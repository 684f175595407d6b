"""Giving a state to the writer, whose threads begin while it is still being laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lowtide.checkpoint.files.torch_file import Layout, TorchFile, lay_out
from lowtide.checkpoint.saving import CANCEL_S
from lowtide.checkpoint.staging import Feed, Stager
from lowtide.checkpoint.store.commit import wait_durable
from lowtide.checkpoint.writer import Ticket, Writer
from lowtide.checkpoint.writer.plan import FilePlan


class _Way:
    """How one file gets to the writer: directly, until a plan names bytes that are on a device."""

    def __init__(self, writer: Writer, stager: Stager) -> None:
        self._writer = writer
        self._stager = stager
        self.ticket: Ticket | None = None
        self.feed: Feed | None = None

    def tell(self, plan: FilePlan, *, is_partial: bool) -> Ticket:
        if self.ticket is None:
            # The place among the writer's jobs is taken now; the stager keeps the same order.
            first, is_begun = (_nothing(plan), True) if plan.elsewhere else (plan, is_partial)
            self.ticket = self._writer.submit([first], is_partial=is_begun)
        elif not plan.elsewhere:
            self.ticket.extend(plan, is_partial=is_partial)
        if plan.elsewhere:
            if self.feed is None:
                self.feed = self._stager.open(self.ticket)
            self.feed.put(plan, is_partial=is_partial)
        return self.ticket

    def cancel(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()
            self.ticket.wait_captured(CANCEL_S)
        if self.feed is not None:
            self.feed.cancel()
            self.feed.wait_over(CANCEL_S)


def submit(writer: Writer, layout: Layout, stager: Stager) -> tuple[Ticket, TorchFile, Feed | None]:
    """Lay a file out; its tensors are on their way meanwhile.

    Args:
        writer: Writes it.
        layout: What it is.
        stager: Brings what is on a GPU.

    Returns:
        The writer's ticket, the file, and, if some of it is on a device, what brings that.

    Raises:
        pickle.PicklingError, TypeError: The state holds something that cannot be pickled. No
            memory is read any more, then.
    """
    way = _Way(writer, stager)
    try:
        for plan in layout.beginnings():
            way.tell(plan, is_partial=True)
        laid_out = layout.finish()
        ticket = way.tell(laid_out.plan, is_partial=False)
    except BaseException:
        way.cancel()
        raise
    return ticket, laid_out, way.feed


def write_file(writer: Writer, state: Any, path: Path, *, stall_s: float) -> None:
    """Write one torch file and return when it is on storage under its name.

    Raises:
        CheckpointError: it cannot be written, or nothing has moved for `stall_s` seconds.
    """
    scratch = path.with_name(f".{path.name}.part")
    laid_out = lay_out(state, scratch, is_stable=lambda _tensor: True)
    ticket = writer.submit([laid_out.plan])
    try:
        wait_durable(ticket, what=str(path), stall_s=stall_s)
        scratch.replace(path)
    finally:
        ticket.cancel()
        ticket.wait_captured(CANCEL_S)
        scratch.unlink(missing_ok=True)


def _nothing(plan: FilePlan) -> FilePlan:
    """Return a plan of `plan`'s file that says nothing but how large it will be."""
    numbers = np.empty(0, np.uint64)
    return FilePlan(
        path=plan.path,
        size_bytes=0,
        expected_bytes=max(plan.size_bytes, plan.expected_bytes),
        offsets=numbers,
        lengths=numbers,
        addresses=numbers,
        entries=np.empty(0, np.int32),
        literals=np.empty(0, np.uint8),
        patches=np.empty((0, 2), np.uint64),
    )
