"""Glue between the lifecycle of a run and the planned update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from lowtide.core.device import Device, open_device
from lowtide.core.errors import ConfigError, StorageError
from lowtide.core.lifecycle import Event, Moment, Plugin, Session
from lowtide.core.native import native_cuda, status_cuda
from lowtide.offload.config import OffloadConfig
from lowtide.offload.one_update import Pace
from lowtide.offload.picture import lane_chart
from lowtide.offload.schedule import Plan
from lowtide.offload.scheduler import Agree, Scheduler
from lowtide.offload.storage.opening import open_tier
from lowtide.offload.storage.tier import Tier
from lowtide.offload.updater import Rule, Updater, outcome_of

logger = logging.getLogger("lowtide")

_BEFORE_OTHERS = -1000  # a checkpoint plugin may load in its own way
_AFTER_OTHERS = 100  # the last that touches the optimizer


def _in_deepspeed(moment: Moment, _is_joint: bool) -> Any:
    from lowtide.offload.adapters.deepspeed import DeepSpeedAdapter

    return DeepSpeedAdapter(moment.data["engine"])


def _in_megatron(moment: Moment, is_joint: bool) -> Any:
    from lowtide.offload.adapters.megatron import open_adapter

    return open_adapter(moment.optimizer, is_joint=is_joint)


_ADAPTERS: dict[str, Callable[[Moment, bool], Any]] = {
    "deepspeed": _in_deepspeed,
    "megatron": _in_megatron,
}


class OffloadPlugin(Plugin):
    """Optimizer updates on host and device, by plan. ``engine.lowtide.offload`` for scripts."""

    name = "offload"
    Config = OffloadConfig
    config: OffloadConfig

    def __init__(self, config: OffloadConfig) -> None:
        super().__init__(config)
        self._session: Session | None = None
        self._device: Device | None = None
        self._adapter: Any = None
        self._updater: Updater | None = None
        self._ended: dict[str, Any] = {}  # the summary, once there is nothing left to sum up

    # -- for scripts ------------------------------------------------------------------------

    def trace(self) -> list[dict[str, Any]]:
        """Return every operation of the last update.

        Returns:
            Dicts with ``subgroup``, ``lane`` (host, prefetch, device, flush, upload), ``nbytes``
            moved, ``params`` updated, ``begin_s`` and ``end_s`` (`time.perf_counter`), by begin.
        """
        return (
            []
            if self._updater is None
            else [each.as_dict() for each in self._updater.trace.operations()]
        )

    def chart(self, columns: int = 64) -> str:
        """Return the last update as a picture in text: who worked when."""
        if self._updater is None:
            return "nothing was updated"
        trace = self._updater.trace
        return lane_chart(trace.shifted(), trace.makespan_s, columns)

    def plan(self) -> Plan | None:
        """Return the plan of the last update."""
        return None if self._updater is None else self._updater.scheduler.plan

    def drain(self) -> None:
        """Bring the newest optimizer state to host memory. The host's own readers do it too."""
        if self._updater is not None:
            self._updater.drain()

    # -- lifecycle --------------------------------------------------------------------------

    def attach(self, session: Session) -> None:
        """Subscribe; nothing is allocated before the optimizer exists."""
        if session.host not in _ADAPTERS:
            raise ConfigError(
                f"lowtide.offload: works inside DeepSpeed's ZeRO optimizers and Megatron-core's "
                f'HybridDeviceOptimizer, and the host is "{session.host}"; remove the key'
            )
        self._session = session
        on = session.hooks.on
        on(Event.OPTIMIZER_BUILT, self._built, plugin=self.name, order=_AFTER_OTHERS)
        on(Event.BEFORE_LOAD, lambda _moment: self.drain(), plugin=self.name, order=_BEFORE_OTHERS)
        on(Event.AFTER_UPDATE, self._updated, plugin=self.name)
        on(Event.CLOSED, lambda _moment: self._release(), plugin=self.name)

    def detach(self) -> None:
        """Give the optimizer its own class back."""
        self._release()

    def summary(self) -> dict[str, Any]:
        """Return plan, rates, and what the last update did."""
        updater = self._updater
        if updater is None:
            return self._ended
        trace = updater.trace
        return {
            "updates": updater.steps,
            "device": None if self._device is None else self._device.name,
            "update_s": trace.makespan_s,
            "busy_s": trace.busy_s(),
            **updater.scheduler.facts(),
            **({} if updater.tier is None else updater.tier.facts()),
        }

    def _built(self, moment: Moment) -> None:
        session, config = self._session, self.config
        if session is None:
            return
        adapter = _ADAPTERS[session.host](moment, config.storage is not None)
        if adapter is None:
            logger.info("offload: this rank has no optimizer state")
            return
        device = self._device = self._open(session)

        def build(holder: Any, rule: Rule) -> Updater:
            masters, agree = holder.masters(), adapter.agree()
            together = None if config.storage is None else adapter.together()
            numels = [each.leaf.numel() for each in masters]
            return Updater(
                masters, rule,
                device=device,
                scheduler=Scheduler(
                    config, device, agree,
                    allows_residents=holder.allows_residents, may_update=self._may_update(device),
                ),
                authority=session.state,
                tier=self._open_storage(numels, together, session.rank),
                together=together,
                subgroup_params=config.subgroup_params,
                pace=Pace(config.emulated.device_params_per_s, config.emulated.host_params_per_s),
            )  # fmt: skip

        self._adapter = adapter  # to be closed even if it cannot be connected
        self._updater = updater = adapter.connect(build)
        if session.host == "deepspeed":
            # Under Megatron-core the host copies masters and weights by itself, both ways.
            session.state.promise(self.name, updater.overwritten)
        if session.rank == 0:
            logger.info(
                "offload: %d masters, %d parameters on this rank, device %s",
                len(self._updater.masters),
                sum(each.leaf.numel() for each in self._updater.masters), device.name,
            )  # fmt: skip

    def _open_storage(self, numels: list[int], agree: Agree | None, rank: int) -> Tier | None:
        """Open the storage tier, if there is one. Collective: ranks fail together."""
        config = self.config
        if config.storage is None or agree is None:
            return None
        storage = config.storage
        found, failure = outcome_of(
            lambda: open_tier(
                storage, numels,
                subgroup_params=config.subgroup_params, rank=rank, meet=lambda: agree([1.0]),
            )
        )  # fmt: skip
        is_well = agree([float(failure is None)])[0] > 0.0
        if failure is not None:
            raise failure
        if not is_well:
            if found is not None:
                found.close()
            raise StorageError(
                "offload.storage: another rank cannot store its optimizer state, and its log says "
                "why; correct lowtide.offload.storage and start again"
            )
        return found

    def _may_update(self, device: Device) -> bool:
        """Whether `device` has kernels; without them, it is where weights go and no more.

        Raises:
            NativeUnavailableError: it has none, and was asked for by name.
        """
        if device.kind != "cuda" or status_cuda().available:
            return True
        if self.config.device == "cuda":
            native_cuda()
        logger.warning("offload: the host updates all, because %s", status_cuda().reason)
        return False

    def _open(self, session: Session) -> Device:
        config = self.config
        if config.device != "emulated":
            # The host has chosen this rank's GPU by now.
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
            if config.device == "cpu":
                index = 0
            device = open_device(config.device, index=index, telemetry=session.telemetry)
            if config.device == "auto":
                session.config.decide("offload.device", device.kind)
            return device
        chosen = config.device_memory_bytes
        return open_device(
            "emulated",
            # A device has memory. With 0, no plan uses any of it.
            memory_bytes=chosen if isinstance(chosen, int) and chosen else None,
            host_to_device_bytes_per_s=config.emulated.host_to_device_bytes_per_s,
            device_to_host_bytes_per_s=config.emulated.device_to_host_bytes_per_s,
            telemetry=session.telemetry,
        )

    def _updated(self, moment: Moment) -> None:
        session, updater = self._session, self._updater
        if session is None or updater is None or not moment.data["applied"]:
            return
        trace, plan = updater.trace, updater.scheduler.plan
        for each in trace.on_host():  # lanes of the device draw themselves
            session.telemetry.add_span(
                each.subgroup, f"offload/{each.lane}", each.begin_s, each.end_s
            )
        session.telemetry.gauge("lowtide.offload.update_s", trace.makespan_s)
        if plan is not None:
            session.telemetry.gauge("lowtide.offload.device_fraction", plan.fraction)
        if trace.is_degraded:
            session.telemetry.count("lowtide.offload.degraded_count")

    def _release(self) -> None:
        self._ended = self.summary()
        self._updater = None  # lets go of the device's memory
        if self._session is not None:
            self._session.state.withdraw(self.name)
        adapter, self._adapter = self._adapter, None
        device, self._device = self._device, None
        try:
            if adapter is not None:
                adapter.close()
        finally:
            if device is not None:
                device.close()
