"""The thread that has device memory copied, and the fallback for when it cannot."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from typing import TypeAlias

from lowtide.checkpoint.config import CHUNK_BYTES, MIB
from lowtide.checkpoint.staging.cut import Transfer
from lowtide.checkpoint.staging.feed import Feed, State
from lowtide.checkpoint.staging.movers import CallerMover, LaneMover, Mover
from lowtide.checkpoint.staging.ring import Ring
from lowtide.checkpoint.writer import Ticket
from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.core.device import DeviceEvent
from lowtide.core.device.homes import Homes
from lowtide.core.errors import CheckpointError, DeviceError

logger = logging.getLogger("lowtide")

DEFAULT_PINNED_BYTES = 16 * MIB
_LOOK_S = 0.05  # longest wait without a look at whether the file is still wanted
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.01  # between two looks for a free slot

# Chunks that are being copied: what, into which slot of which ring, and until when.
_Flying: TypeAlias = "deque[tuple[Transfer, Ring, int, list[DeviceEvent]]]"


class _CannotCopyError(Exception):
    """Device memory cannot be copied this way; the cause is chained. Never leaves this file."""


class Stager:
    """Brings tensors on devices to a writer (see this package's page for how).

    Args:
        homes: Where tensors live; closed with the stager.
        pinned_bytes: Most that the ring has; two chunks it has always.
        chunk_bytes: Size of the writer's chunks.
    """

    def __init__(
        self,
        homes: Homes | None = None,
        *,
        pinned_bytes: int = DEFAULT_PINNED_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.homes = Homes() if homes is None else homes
        self.fallbacks = 0  # files that the training thread had to copy
        self._chunk_bytes = chunk_bytes
        self._by_lane = LaneMover(pinned_bytes, chunk_bytes)
        self._by_caller = CallerMover(self._by_lane, chunk_bytes)
        self._changed = threading.Condition()
        self._feeds: deque[Feed] = deque()
        self._current: Feed | None = None  # some thread moves it just now
        self._is_closing = False
        self._thread: threading.Thread | None = None

    # -- the training thread ------------------------------------------------------------------

    def open(self, ticket: Ticket) -> Feed:
        """Begin to bring a file, of which the writer knows only the beginning, if that."""
        feed = Feed(self, ticket, self._chunk_bytes)
        with self._changed:
            if self._is_closing:
                feed.end()
                return feed
            self._feeds.append(feed)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="lowtide-checkpoint-stage", daemon=True
                )
                self._thread.start()
        return feed

    def put(self, feed: Feed, plan: FilePlan, *, is_partial: bool) -> None:
        """Give a plan of a file; notes how far the training thread's device work is queued."""
        events = dict(feed.events)
        failure: BaseException | None = None
        for device in {where.device for where in plan.elsewhere.values()} - set(events):
            try:
                events[device] = device.record_event("save")
            except (DeviceError, RuntimeError) as error:
                failure = error
        if failure is not None:
            self._hand_over(feed, failure)
        with self._changed:
            if feed.state is not State.OVER:
                feed.events = events
                feed.give(plan, is_partial=is_partial)
                self._changed.notify_all()

    def wait_captured(self, feed: Feed, timeout_s: float) -> bool:
        """See `Feed.wait_captured`; where the lane has failed, this copies the rest at once."""
        end_s = time.monotonic() + timeout_s
        while True:
            if feed.state is State.CALLER:
                self._bring_here(feed, end_s)
            left_s = max(0.0, end_s - time.monotonic())
            if feed.ticket.wait_captured(min(left_s, _LOOK_S)):
                if feed.ticket.error is not None:  # nobody reads host memory, but a lane may
                    self.cancel(feed)
                return self.wait_over(feed, max(left_s, _LOOK_S))
            if left_s == 0.0:
                return False

    def _bring_here(self, feed: Feed, end_s: float) -> None:
        """Move `feed` in the calling thread, until it is over or the time is."""

        def is_mine() -> bool:
            is_next = bool(self._feeds) and self._feeds[0] is feed
            return feed.state is State.OVER or (self._current is None and is_next)

        with self._changed:
            is_free = self._changed.wait_for(is_mine, max(0.0, end_s - time.monotonic()))
            if not is_free or feed.state is State.OVER:
                return
            self._current = feed
        try:
            self._bring(feed, self._by_caller, end_s)
        except _CannotCopyError as error:
            self._fail(feed, error.__cause__ or error)
        except (ValueError, CheckpointError) as error:
            self._fail(feed, error)
        finally:
            self._release(feed)

    # -- any thread ---------------------------------------------------------------------------

    def cancel(self, feed: Feed) -> None:
        """See `Feed.cancel`."""
        with self._changed:
            feed.is_cancelled = True
            if feed is not self._current:
                self._end(feed)
            self._changed.notify_all()

    def wait_over(self, feed: Feed, timeout_s: float | None) -> bool:
        """See `Feed.wait_over`."""
        with self._changed:
            return self._changed.wait_for(lambda: feed.state is State.OVER, timeout_s)

    def close(self, *, timeout_s: float) -> bool:
        """Give up what is on its way, end the thread, let go of the ring. Idempotent.

        Returns:
            False if a copy hangs; then its thread is left behind, with the ring.
        """
        with self._changed:
            self._is_closing = True
            for feed in list(self._feeds):
                feed.is_cancelled = True
                if feed is not self._current:
                    self._end(feed)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        self._by_lane.let_go()
        self._by_caller.ring = None
        with contextlib.suppress(DeviceError):  # what failed was told when it failed
            self.homes.close(timeout_s=timeout_s)
        return True

    # -- the stager's thread ------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._has_work())
                if self._is_closing:
                    return
                feed = self._current = self._feeds[0]
            self._bring_by_lane(feed)
            del feed  # or it would be kept until the next one comes

    def _has_work(self) -> bool:
        return bool(self._feeds) and self._feeds[0].state is State.LANE

    def _bring_by_lane(self, feed: Feed) -> None:
        try:
            self._bring(feed, self._by_lane, math.inf)
        except _CannotCopyError as error:
            self._by_lane.recover(feed)
            self._hand_over(feed, error.__cause__ or error)
        except Exception as error:  # noqa: BLE001 - must not end the thread in silence
            self._fail(feed, error)
        finally:
            self._release(feed)

    # -- whoever moves a file -----------------------------------------------------------------

    def _bring(self, feed: Feed, mover: Mover, end_s: float) -> None:
        """Move a file until it is told, given up or handed over, or the time is over.

        Raises:
            _CannotCopyError: device memory cannot be copied this way.
            ValueError, CheckpointError: the writer does not take it.
        """
        state, pause_s = feed.state, _FIRST_PAUSE_S
        flying: _Flying = deque()
        try:
            while self._is_wanted(feed) and feed.state is state and time.monotonic() < end_s:
                with self._changed:
                    feed.adopt()
                is_starved = self._fill(feed, mover, flying)
                has_landed = self._land(feed, flying)
                feed.tell()
                if feed.is_told:
                    return
                if has_landed or flying:
                    pause_s = _FIRST_PAUSE_S
                    continue
                with self._changed:  # a plan is announced, a free slot has to be looked for
                    if not feed.has_news:
                        self._changed.wait(pause_s if is_starved else _LOOK_S)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._come_to_rest(feed, flying)

    def _fill(self, feed: Feed, mover: Mover, flying: _Flying) -> bool:
        """Have chunks copied into the free slots; tell whether a slot is all that lacks."""
        while (transfer := feed.next_transfer()) is not None:
            try:
                ring = mover.open_ring(feed)
                number = ring.take()
                if number is None:
                    return True
                try:
                    events = mover.issue(feed, transfer, ring.slot(number))
                except BaseException:
                    ring.give(number)
                    raise
            except CheckpointError:
                raise
            except (DeviceError, RuntimeError, MemoryError) as error:
                raise _CannotCopyError from error
            flying.append((transfer, ring, number, events))
            if not events:  # it is there already: tell the writer before the next one is copied
                return False
        return False

    def _land(self, feed: Feed, flying: _Flying) -> bool:
        """Note what has arrived, waiting for the first of it; tell whether anything has."""
        has_landed = False
        while flying:
            transfer, ring, number, events = flying[0]
            try:
                if not all(event.wait(0.0 if has_landed else _LOOK_S) for event in events):
                    break
            except (DeviceError, RuntimeError) as error:
                raise _CannotCopyError from error
            flying.popleft()
            feed.land(transfer, ring.address(number), ring.memory)
            ring.hold(number, feed.ticket, transfer.chunk)
            has_landed = True
        return has_landed

    def _come_to_rest(self, feed: Feed, flying: _Flying) -> None:
        """Wait until no copy is under way; what had not landed will begin anew."""
        while flying:
            _, ring, number, events = flying.popleft()
            for event in events:
                with contextlib.suppress(DeviceError, RuntimeError):
                    while not event.wait(_LOOK_S):
                        pass
            ring.give(number)
        feed.rewind()

    def _is_wanted(self, feed: Feed) -> bool:
        return not (self._is_closing or feed.is_cancelled or feed.ticket.error is not None)

    # -- states of a file ---------------------------------------------------------------------

    def _hand_over(self, feed: Feed, error: BaseException) -> None:
        """Leave the rest to the training thread, because of `error`."""
        with self._changed:
            if feed.state is not State.LANE or feed.is_cancelled:
                return
            feed.state = State.CALLER
            self.fallbacks += 1
            self._changed.notify_all()
        logger.warning(
            "checkpoint: tensors on a device cannot be copied beside the training (%s); what is "
            "left of this file is copied before the next update instead, while training waits",
            str(error) or type(error).__name__,
        )

    def _fail(self, feed: Feed, error: BaseException) -> None:
        """Give a file up; `Saving` says so for the checkpoint."""
        feed.error = CheckpointError(
            f"{feed.path}: tensors on a device cannot be copied: "
            f"{str(error) or type(error).__name__}; save again once the cause is removed"
        )
        feed.ticket.cancel()

    def _release(self, feed: Feed) -> None:
        """Note that nobody moves `feed` any more; it is over unless there is more to do."""
        is_over = feed.is_told or feed.error is not None or not self._is_wanted(feed)
        with self._changed:
            self._current = None
            if is_over or feed.is_cancelled or feed.state is State.LANE:
                self._end(feed)
            self._changed.notify_all()

    def _end(self, feed: Feed) -> None:
        if feed.state is not State.OVER:
            feed.end()
            self._feeds.remove(feed)
            self._changed.notify_all()
