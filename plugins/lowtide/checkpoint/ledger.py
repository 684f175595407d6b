"""What a run's checkpoints have come to: told to telemetry, to a stop in progress, to the user."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lowtide.checkpoint.saving import Saving, Stage
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import StopControl
from lowtide.core.telemetry import Telemetry

if TYPE_CHECKING:
    from lowtide.checkpoint.saver import Saver
    from lowtide.checkpoint.scrub import Scrub


class Ledger:
    """Notes checkpoints that have ended. Used by the training thread alone.

    It knows neither the model nor the session, so it can be kept for the end of the process.

    Args:
        telemetry: Takes counters and spans.
        stop: The stop control of the run, or None.
    """

    def __init__(self, telemetry: Telemetry, stop: StopControl | None) -> None:
        self._telemetry = telemetry
        self._stop = stop
        self._open: list[Saving] = []
        self._totals = {
            "requested": 0, "committed": 0, "failed": 0, "bytes": 0,
            "direct_bytes": 0, "hurried_bytes": 0,
        }  # fmt: skip
        self._blocked_s: list[float] = []
        self._update_waits_s: list[float] = []
        self._unraised: dict[str, str] = {}  # by attempt; older ones may fail after newer ones
        self._told: set[str] = set()  # failures that were raised before they were noted here

    @property
    def is_waiting(self) -> bool:
        """Whether there is a checkpoint that has not been noted as ended."""
        return bool(self._open)

    def open(self, saving: Saving) -> None:
        """Note that a checkpoint was requested."""
        self._open.append(saving)
        self._totals["requested"] += 1
        self._telemetry.count("lowtide.checkpoint.eager_bytes", saving.eager_bytes)

    def settle(self) -> None:
        """Note what has ended since."""
        for saving in [each for each in self._open if each.has_ended]:
            self._open.remove(saving)
            self._close(saving)

    def _close(self, saving: Saving) -> None:
        telemetry, times_s = self._telemetry, saving.times_s
        self._blocked_s.append(saving.blocked_s)
        telemetry.count("lowtide.checkpoint.blocked_s", saving.blocked_s)
        self._update_waits_s += saving.update_waits_s
        for name in ("direct_bytes", "hurried_bytes"):
            count = sum(getattr(p.ticket.progress(), name) for p in saving.parts)
            self._totals[name] += count
            telemetry.count(f"lowtide.checkpoint.{name}", count)
        if saving.error is not None:
            self._note(saving.attempt, saving.error)
        if saving.stage is Stage.FAILED:
            self._totals["failed"] += 1
            telemetry.count("lowtide.checkpoint.failed_count")
            return
        self._totals["committed"] += 1
        self._totals["bytes"] += saving.total_bytes
        telemetry.count("lowtide.checkpoint.committed_count")
        telemetry.count("lowtide.checkpoint.written_bytes", saving.total_bytes)
        begin_s = times_s[Stage.REQUESTED]
        telemetry.gauge("lowtide.checkpoint.commit_s", times_s[Stage.COMMITTED] - begin_s)
        for stage in (Stage.CAPTURED, Stage.DURABLE, Stage.COMMITTED, Stage.DRAINED):
            end_s = times_s.get(stage)
            if end_s is not None:
                telemetry.add_span(saving.tag, f"checkpoint {stage.value}", begin_s, end_s)
                begin_s = end_s
        if self._stop is not None:
            self._stop.saved(saving.step, str(saving.final()))

    @property
    def unraised(self) -> dict[str, str]:
        """Why checkpoints have failed, by attempt, as far as the script was not told yet."""
        return dict(self._unraised)

    def take_unraised(self, attempts: Iterable[str]) -> None:
        """Note that the script is told of these failures, on this rank or on all."""
        for attempt in attempts:
            if self._unraised.pop(attempt, None) is None:
                self._told.add(attempt)

    def _note(self, attempt: str, error: CheckpointError) -> None:
        # Another rank may have known first, and this one been told with it.
        if attempt in self._told:
            self._told.remove(attempt)
        else:
            self._unraised[attempt] = str(error)

    def summary(self) -> dict[str, Any]:
        """Return counts, bytes and the time that training waited, as plain JSON."""
        summary: dict[str, Any] = {**self._totals}
        if self._blocked_s:
            waits_s = sorted(self._blocked_s)
            summary["blocked_median_s"] = statistics.median(waits_s)
            if self._update_waits_s:
                summary["update_wait_median_s"] = statistics.median(self._update_waits_s)
                summary["update_wait_max_s"] = max(self._update_waits_s)
            summary["blocked_p99_s"] = waits_s[math.ceil(0.99 * len(waits_s)) - 1]
        return summary


def end_of_process(saver: Saver, ledger: Ledger, scrub: Scrub | None, timeout_s: float) -> None:
    """Finish what is on its way, for a script that just ends."""
    if scrub is not None:
        scrub.close()
    saver.close(timeout_s)
    ledger.settle()
