"""Tensors on a device on their way to the writer: device -> pinned ring -> writer.

The training thread lays a file out (`files/torch_file.py`). Bytes that lie on a device are named in
the plan, not read. `submit.py` gives such a plan to the `Stager`, which has one thread and one lane
per device:

1. At the save the training thread records an event on its stream. The lane waits for it, so it
   reads what the work queued before the save has made of the tensors.
2. For each chunk of the file in turn, the stager's thread takes a slot of the ring, has the lane
   copy the chunk's device bytes into it, and waits for the lane's event. The slot is an image of
   the chunk: what comes from host memory or is literal stays empty in it. Small neighbours are put
   side by side on the device first and lie side by side in the slot: two operations, not hundreds.
3. It tells the writer as much of the file as has landed (`Ticket.extend`). The slot is free when
   the writer has captured that chunk (`Ticket.captured_chunks`); until then the next chunk waits.
   So a ring that is smaller than the state is filled as fast as the writer empties it.
4. Before the update the training thread waits until the writer has captured everything
   (`Feed.wait_captured`). What is captured has landed, and what has landed has been waited for on
   the host, so nothing that the training thread queues afterwards can overtake a copy: no stream
   has to wait.

If the lane fails, or there is no pinned memory, the stager's thread steps back and the training
thread copies the rest at once, through the same slots (or two plain ones), the next time it waits.
Nothing else reads device memory. Files are told in the order in which they were submitted, which is
the order in which the writer captures, so no file waits for one behind it.
"""

from lowtide.checkpoint.staging.feed import Feed
from lowtide.checkpoint.staging.stager import Stager

__all__ = ["Feed", "Stager"]
