"""Lifecycle events: hosts fire them, plugins listen, in an order that is explicit and printed.

A host (DeepSpeed, Megatron-core, a plain torch loop) opens one `Session` per engine and fires its
events; a plugin subscribes in `attach` and needs to know nothing about the host. That is also why
every plugin can be tested in a plain loop on a CPU.
"""

from __future__ import annotations

import enum
import logging
import math
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowtide.core.config import PluginConfig, Resolved, resolve
from lowtide.core.errors import LowtideError, PluginError, listed
from lowtide.core.registry import plugins
from lowtide.core.restart import StopControl
from lowtide.core.state import StateAuthority
from lowtide.core.telemetry import Telemetry

logger = logging.getLogger("lowtide")


class Event(str, enum.Enum):
    """What a host tells its plugins, in the order of a run."""

    CONFIGURED = "configured"  # settings are known; no model, no process group yet
    MODEL_BUILT = "model_built"  # the user's model, before the host wraps it; may be replaced
    OPTIMIZER_BUILT = "optimizer_built"  # the host's optimizer exists; data: engine (DeepSpeed)
    BEFORE_FORWARD = "before_forward"  # once per micro-batch
    AFTER_FORWARD = "after_forward"
    AFTER_BACKWARD = "after_backward"  # gradients of one micro-batch are complete on this rank
    BEFORE_UPDATE = "before_update"  # last moment at which parameters still have their old values
    AFTER_UPDATE = "after_update"  # data["applied"] is False when the host skipped the update
    AFTER_STEP = "after_step"  # the step is over in every respect: a checkpoint may be saved
    BEFORE_SAVE = "before_save"  # data: path, tag, client_keys, is_certified (see below)
    AFTER_SAVE = "after_save"
    BEFORE_LOAD = "before_load"  # data: path, tag, options, engine; see below
    LOADED = "loaded"  # data: path, tag
    STOP_REQUESTED = "stop_requested"  # all ranks stop after this step; data: reason
    CLOSED = "closed"  # listeners run in reverse order

    # Enum's own is a Python function, called at every look-up.
    __hash__ = str.__hash__


@dataclass(slots=True)
class Moment:
    """What a listener receives.

    Attributes:
        event: The event being fired.
        session: The session that fires it.
        step: Optimizer steps finished so far, skipped ones included.
        model: The model, where the event concerns it. Listeners of MODEL_BUILT may replace it.
        optimizer: The optimizer, where the event concerns it.
        data: Further facts, by event (see `Event`). A listener of BEFORE_SAVE that writes the
            completion record itself, later, sets "is_certified" to False. A listener of BEFORE_LOAD
            may change "path" and "tag", set "is_empty" where there is nothing to load, or load by
            itself and set "result" to what the host's function returns.
    """

    event: Event
    session: Session
    step: int
    model: Any = None
    optimizer: Any = None
    data: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Moment], None]


@dataclass(frozen=True, slots=True)
class _Subscription:
    order: int
    serial: int
    plugin: str
    listener: Listener


class Hooks:
    """Who listens to what, in which order (smaller `order` first, then order of subscription)."""

    def __init__(self) -> None:
        self._by_event: dict[Event, tuple[_Subscription, ...]] = {}
        self._serial = 0

    def on(self, event: Event, listener: Listener, *, plugin: str, order: int = 0) -> None:
        """Call `listener` at every `event`, on behalf of `plugin`."""
        event = Event(event)
        self._serial += 1
        entries = [*self._by_event.get(event, ())]
        entries.append(_Subscription(order, self._serial, plugin, listener))
        self._by_event[event] = tuple(sorted(entries, key=lambda s: (s.order, s.serial)))

    def off(self, plugin: str) -> None:
        """Remove every listener of `plugin`."""
        for event, entries in list(self._by_event.items()):
            kept = tuple(entry for entry in entries if entry.plugin != plugin)
            if kept:
                self._by_event[event] = kept
            else:
                del self._by_event[event]

    def listeners(self, event: Event) -> tuple[_Subscription, ...]:
        """Return the subscriptions of `event`, in calling order."""
        return self._by_event.get(event, ())

    def describe(self) -> list[str]:
        """Return one line per listened event: ``"before_update: offload(0), checkpoint(10)"``."""
        return [
            f"{event.value}: " + ", ".join(f"{s.plugin}({s.order})" for s in self._by_event[event])
            for event in Event
            if event in self._by_event
        ]


class Plugin(ABC):
    """One switchable behaviour. Subclasses set `name` (the JSON key) and `Config`.

    The constructor may check and allocate nothing but plain memory; work starts in `attach`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[PluginConfig]] = PluginConfig

    def __init__(self, config: PluginConfig) -> None:
        self.config = config

    @abstractmethod
    def attach(self, session: Session) -> None:
        """Subscribe to events through ``session.hooks.on(..., plugin=self.name)``."""

    def detach(self) -> None:  # noqa: B027 - optional, many plugins own nothing to release
        """Release threads, files and patches. Listeners are removed by the session itself."""

    def summary(self) -> dict[str, Any]:
        """Return what this plugin did so far, as plain JSON, for `Session.report`."""
        return {}


class Session:
    """One engine's Lowtide: what is active, what it records, and the events.

    This is the handle that users reach as ``engine.lowtide``; a plugin is reached by its name
    (``engine.lowtide.checkpoint``).
    """

    def __init__(
        self, resolved: Resolved, *, host: str, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config = resolved
        self.host = host
        self.rank = rank
        self.world_size = world_size
        self.hooks = Hooks()
        self.state = StateAuthority()
        self.telemetry = Telemetry(resolved.telemetry, rank=rank, world_size=world_size)
        self.stop = StopControl(resolved.stop, rank=rank) if resolved.stop is not None else None
        self.plugins: dict[str, Plugin] = {}
        self.step = 0
        self.is_closed = False
        self._update_begin_s: float | None = None
        self._owner_pid = os.getpid()
        # An engine that is dropped without destroy() must still end its files properly.
        self._finalizer = weakref.finalize(self, _end, self.telemetry, self.stop)

    @classmethod
    def open(
        cls,
        block: Mapping[str, Any],
        *,
        host: str,
        rank: int = 0,
        world_size: int = 1,
        host_config: Mapping[str, Any] | None = None,
    ) -> Session:
        """Validate `block`, attach its plugins and fire CONFIGURED.

        Raises:
            ConfigError: the block cannot be used.
            PluginError: a plugin could not attach; those attached before it are detached again.
        """
        _make_visible()
        resolved = resolve(block, host_config=host_config, host=host)
        session = cls(resolved, host=host, rank=rank, world_size=world_size)
        try:
            if session.stop is not None:
                session.stop.listen()
            session.attach_plugins()
            session.telemetry.begin_run(
                host=host,
                plugins=list(session.plugins),
                listeners=session.hooks.describe(),
                config=resolved.as_dict(),
                host_config=_plain(resolved.host_config),
            )
            session.fire(Event.CONFIGURED)
        except BaseException:
            session.close(status="failed")
            raise
        if rank == 0:
            logger.info(session.describe())
        return session

    def attach_plugins(self) -> None:
        """Build and attach every plugin of the resolved block, in the block's order."""
        for name, config in self.config.plugins.items():
            try:
                plugin = plugins.get(name)(config)
                self.plugins[name] = plugin
                plugin.attach(self)
            except LowtideError:
                raise
            except Exception as error:
                raise PluginError(f'plugin "{name}" failed in attach: {error}') from error

    def describe(self) -> str:
        """Return one line for the log: active plugins and the order of their listeners."""
        active = ", ".join(self.plugins) or "no plugin (telemetry only)"
        order = "; ".join(self.hooks.describe())
        return f"host {self.host}, active: {active}" + (f"; order: {order}" if order else "")

    def fire(
        self, event: Event, *, model: Any = None, optimizer: Any = None, **data: Any
    ) -> Moment:
        """Tell every listener of `event`; returns the moment, with what listeners changed in it.

        Raises:
            LowtideError: a listener raised it on purpose.
            PluginError: a listener failed otherwise, or any one of CLOSED, after all others ran.
        """
        moment = Moment(event, self, self.step, model, optimizer, data)
        entries = self.hooks.listeners(event)
        if event is Event.CLOSED:
            self._fire_closed(moment, entries)
            return moment
        for entry in entries:
            try:
                entry.listener(moment)
            except LowtideError:  # says by itself where and what
                raise
            except Exception as error:
                raise _listener_error(entry, event, error) from error
        return moment

    def _fire_closed(self, moment: Moment, entries: tuple[_Subscription, ...]) -> None:
        first: tuple[PluginError, Exception] | None = None
        for entry in reversed(entries):
            try:
                entry.listener(moment)
            except Exception as error:
                logger.exception("plugin %s failed in closed", entry.plugin)
                first = first or (_listener_error(entry, moment.event, error), error)
        if first is not None:
            raise first[0] from first[1]

    def before_update(self, *, model: Any = None, optimizer: Any = None) -> None:
        """Fire BEFORE_UPDATE. Called by hosts right before parameters can start to change."""
        self.fire(Event.BEFORE_UPDATE, model=model, optimizer=optimizer)
        self._update_begin_s = time.perf_counter()

    def after_update(
        self, *, applied: bool = True, model: Any = None, optimizer: Any = None
    ) -> None:
        """Count the step, fire AFTER_UPDATE and close the step's telemetry record.

        A host that knows of a skip before parameters could change calls this alone.

        Args:
            applied: False when the host skipped the update (overflow, not a finite norm).
            model: As in `Moment`.
            optimizer: As in `Moment`.
        """
        begin_s, self._update_begin_s = self._update_begin_s, None
        if begin_s is not None:
            self.telemetry.add_span("update", "host", begin_s, time.perf_counter())
        self.step += 1
        if not applied:
            self.telemetry.count("lowtide.core.skipped_updates_count")
        self.fire(Event.AFTER_UPDATE, model=model, optimizer=optimizer, applied=applied)
        self.telemetry.end_step(self.step)

    def end_step(self, *, model: Any = None, optimizer: Any = None) -> bool:
        """Fire AFTER_STEP; tell whether all ranks stop now, and fire STOP_REQUESTED if they do.

        Called by hosts when a step is over in every respect, by every rank.
        """
        if self.hooks.listeners(Event.AFTER_STEP):
            self.fire(Event.AFTER_STEP, model=model, optimizer=optimizer)
        if self.stop is None or not self.stop.poll(self.step):
            return False
        if self.rank == 0:
            logger.info("stopping after step %d: %s", self.step, self.stop.reason)
        reason = self.stop.reason
        self.fire(Event.STOP_REQUESTED, model=model, optimizer=optimizer, reason=reason)
        return True

    def report(self) -> dict[str, Any]:
        """Return active plugins, resolved settings, recorded figures and each plugin's summary."""
        return {
            "host": self.host,
            "step": self.step,
            "config": self.config.as_dict(),
            "listeners": self.hooks.describe(),
            "telemetry": self.telemetry.snapshot(),
            "plugins": {name: plugin.summary() for name, plugin in self.plugins.items()},
        }

    def close(self, *, status: str = "done") -> None:
        """Fire CLOSED (reverse order), detach every plugin, end the telemetry. Idempotent.

        Raises:
            PluginError: the first failure, after everything else has been closed.
        """
        if self.is_closed or os.getpid() != self._owner_pid:
            return
        self.is_closed = True
        failure: PluginError | None = None
        try:
            self.fire(Event.CLOSED)
        except PluginError as error:
            failure = error
        for name, plugin in reversed(self.plugins.items()):
            try:
                plugin.detach()
            except Exception as error:
                logger.exception("plugin %s failed in detach", name)
                if failure is None:
                    failure = PluginError(f'plugin "{name}" failed in detach: {error}')
                    failure.__cause__ = error
            self.hooks.off(name)
        if self.stop is not None:
            self.stop.finish(self.step)
        self._finalizer.detach()
        self.telemetry.close(status=status if failure is None else "failed")
        if failure is not None:
            raise failure

    def __getattr__(self, name: str) -> Plugin:
        active: dict[str, Plugin] = self.__dict__.get("plugins", {})
        if name in active:
            return active[name]
        raise AttributeError(
            f'no active plugin "{name}"; active in this run: {listed(active)}. '
            f'Add "{name}" to the "lowtide" block to switch it on'
        )


def _end(telemetry: Telemetry, stop: StopControl | None) -> None:
    if stop is not None:
        stop.end()
    telemetry.close(status="exited")


def _plain(value: Any) -> Any:
    """Return `value` as strict JSON: Accelerate sets steps_per_print to infinity, users dtypes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else repr(value)


def _make_visible() -> None:
    """Let the start line and warnings be seen where the program has not set up logging itself."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("lowtide: %(message)s"))
        logger.addHandler(handler)


def _listener_error(entry: _Subscription, event: Event, error: Exception) -> PluginError:
    return PluginError(f'plugin "{entry.plugin}" failed in {event.value}: {error}')
