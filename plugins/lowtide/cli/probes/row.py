"""Findings, and running the probes that make them so that none can break or hang the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "missing", "fail"]
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One finding. `check` names it for machines; "fail": something required is broken."""

    check: str
    status: Status
    found: str
    cost: str = ""
    """What the finding costs the user; empty when it costs nothing."""
    action: str = ""
    """What to do about it; empty when there is nothing to do."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON."""
        return asdict(self)


Probe = Callable[[], list[Row]]


def run_probes(probes: Sequence[Probe], *, timeout_s: float = TIMEOUT_S) -> list[Row]:
    """Run probes side by side and return their rows in order.

    A probe that raises, or that has no answer after `timeout_s`, becomes a "warn" row that says so.
    """
    found: list[list[Row] | None] = [None] * len(probes)

    def run(index: int, probe: Probe) -> None:
        try:
            found[index] = probe()
        except Exception as error:  # noqa: BLE001 - a broken probe must not hide the others
            text = f"the check itself failed: {type(error).__name__}: {error}"
            found[index] = [Row(check=_name(probe), status="warn", found=text)]

    # Daemon threads: a driver that never answers must not keep the command from ending.
    threads = [
        threading.Thread(target=run, args=(index, probe), daemon=True)
        for index, probe in enumerate(probes)
    ]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    late = f"no answer within {timeout_s:g} s"
    rows: list[Row] = []
    for probe, result in zip(probes, found, strict=True):
        rows += result if result is not None else [
            Row(check=_name(probe), status="warn", found=late)
        ]  # fmt: skip
    return rows


def _name(probe: Probe) -> str:
    return getattr(probe, "__name__", "check").strip("<>")
