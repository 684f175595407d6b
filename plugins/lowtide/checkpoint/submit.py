"""Giving a state to the writer, whose threads begin while it is still being laid out."""

from __future__ import annotations

from lowtide.checkpoint.files.torch_file import Layout, TorchFile
from lowtide.checkpoint.saving import CANCEL_S
from lowtide.checkpoint.writer import Ticket, Writer


def submit(writer: Writer, layout: Layout) -> tuple[Ticket, TorchFile]:
    """Lay a file out; its tensors are on their way meanwhile.

    Raises:
        pickle.PicklingError, TypeError: The state holds something that cannot be pickled. No
            memory is read any more, then.
    """
    ticket: Ticket | None = None
    try:
        for plan in layout.beginnings():
            if ticket is None:
                ticket = writer.submit([plan], is_partial=True)
            else:
                ticket.extend(plan, is_partial=True)
        laid_out = layout.finish()
        if ticket is None:
            return writer.submit([laid_out.plan]), laid_out
        ticket.extend(laid_out.plan)
    except BaseException:
        if ticket is not None:
            ticket.cancel()
            ticket.wait_captured(CANCEL_S)
        raise
    return ticket, laid_out
