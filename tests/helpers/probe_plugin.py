"""A plugin that writes down every event it sees; used by host and lifecycle tests."""

from __future__ import annotations

import threading
from typing import Any

from lowtide.core.config import PluginConfig
from lowtide.core.lifecycle import Event, Moment, Plugin, Session


class ProbeConfig(PluginConfig):
    """Settings of the probe."""

    order: int = 0
    """Order of its listeners."""

    fail_in: str | None = None
    """Raise in this event."""

    buffer_bytes: int = 0
    """A size, to test messages about units."""

    interval_s: float = 1.0
    """A time, to test messages about units."""

    is_watching: bool = False
    """Note a checksum of the parameters at every event that carries a model."""

    has_thread: bool = False
    """Start a thread in attach, to test that detach ends it."""


class ProbePlugin(Plugin):
    """Records the events of a session."""

    name = "probe"
    Config = ProbeConfig

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.seen: list[tuple[str, int]] = []
        self.data: list[dict[str, Any]] = []
        self.checksums: list[tuple[str, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self, session: Session) -> None:
        for event in Event:
            session.hooks.on(event, self._see, plugin=self.name, order=self.config.order)
        if self.config.has_thread:
            self._thread = threading.Thread(target=self._stop.wait, name="lowtide-probe")
            self._thread.start()

    def detach(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def summary(self) -> dict[str, Any]:
        return {"events_count": len(self.seen)}

    def _see(self, moment: Moment) -> None:
        self.seen.append((moment.event.value, moment.step))
        self.data.append(dict(moment.data))
        if self.config.is_watching and moment.model is not None:
            # ZeRO-3 keeps the values in the optimizer's flat shards, the module's are empty.
            shards = getattr(moment.optimizer, "fp32_partitioned_groups_flat", None)
            tensors = shards or list(moment.model.parameters())
            total = sum(float(t.detach().double().square().sum()) for t in tensors)
            self.checksums.append((moment.event.value, total))
        if moment.event.value == self.config.fail_in:
            raise ValueError("asked to fail")
