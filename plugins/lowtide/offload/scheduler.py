"""Which plan the next update follows: measured at first, corrected while training goes on."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowtide.core.device import Device
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError
from lowtide.offload.config import OffloadConfig
from lowtide.offload.executor import Executor
from lowtide.offload.plan import host_only_plan, make_plan, predict, random_plan
from lowtide.offload.probe import measure, measure_host
from lowtide.offload.rates import PathRates, Rates
from lowtide.offload.schedule import Piece, Plan
from lowtide.offload.storage.placement import LEAST_GAIN, Homes, Placement, random_moves
from lowtide.offload.trace import StepTrace

logger = logging.getLogger("lowtide")

MISFIT = 0.10  # of prediction and measurement, that is worth a new plan ...
PATIENCE = 3  # ... when it was so in this many of the last updates
SMOOTHING = 0.5
_UNUSED = 1e15  # of a lane that has nothing to do
SAFETY_SHARE = 0.05  # of the device's memory, left alone when Lowtide chooses how much to use

# Smallest of a list of numbers over all ranks, for each place. Collective.
Agree = Callable[[list[float]], list[float]]


class Scheduler:
    """Makes plans from rates that all ranks agree on; ranks with equal pieces get equal plans.

    Args:
        config: The plugin's settings.
        device: Where subgroups may be updated beside the host.
        agree: Returns the smallest of each number over all ranks; called by all at the same steps.
        allows_residents: Whether state may stay on the device from step to step.
        may_update: Whether the device can update at all; if not, it only receives.
    """

    def __init__(
        self,
        config: OffloadConfig,
        device: Device,
        agree: Agree,
        *,
        allows_residents: bool = True,
        may_update: bool = True,
    ) -> None:
        self._may_update = may_update and device.kind != "cpu"
        self._config = config
        self._keep_residents = config.residents and allows_residents
        self._device = device
        self._agree = agree
        self._step = 0
        self._pieces: list[Piece] = []
        self._misfits = 0
        self._known_memory = 0.0  # of this rank when it was planned
        self._budget = 0.0
        self._lasting = 0.0
        self._placement = (
            Placement(config.replan_every_n_steps)
            if config.storage is not None and config.storage.adapt
            else None
        )
        self._share = 1.0  # of the memory that seems free: less where it turned out to be split up
        self._is_host_only = True
        self._buffers = 1
        self._all_can = False  # every rank's device can update
        self._host_pieces: list[Piece] = []
        self._host_rates: Rates | None = None  # of a rank with storage and no device to use
        self.rates: Rates | None = None
        self.plan: Plan | None = None
        self.plans = 0  # made so far

    def next_plan(self, executor: Executor) -> Plan:
        """Return the plan of the coming update. Collective at steps that all ranks know."""
        self._step += 1
        pieces = executor.pieces()
        can = self._may_update and executor.failure is None
        if self._config.random_seed is not None:
            self.plan = self._random(executor, pieces, can=can)
            return self.plan
        is_new = pieces != self._pieces
        self._pieces, self._buffers = pieces, executor.buffers
        # Never by what only this rank knows: the others would wait for it, or it for them.
        is_due = self._step == 1 or self._step % self._config.replan_every_n_steps == 0
        if is_due and self._config.device != "cpu":
            is_new = self._confer(executor, can=can) or is_new
        self._is_host_only = not can or not self._all_can
        if self._is_host_only:
            if is_new or self.plan is None or not self.plan.is_host_only or self._is_wrong():
                self.plan = self._host_plan(executor, pieces)
        elif self.plan is None or is_new:
            self._make_plan()
        if self.plan is None:
            raise AssertionError("unreachable: every branch makes a plan or keeps one")
        self._place(executor, pieces)
        return self.plan

    def _is_wrong(self) -> bool:
        """Whether a plan that this rank alone decides on no longer fits what is measured."""
        return self._misfits >= PATIENCE and self._host_rates is not None

    def _host_plan(self, executor: Executor, pieces: list[Piece]) -> Plan:
        """Return a plan without the device. With storage there is something to predict."""
        if not executor.path_rates():
            return host_only_plan(pieces)
        self._misfits = 0
        if self._host_rates is None:
            # The device's rates do not count: nothing may move.
            self._host_rates = Rates(
                host_to_device_bytes_per_s=_UNUSED, device_to_host_bytes_per_s=_UNUSED,
                device_params_per_s=_UNUSED, host_params_per_s=measure_host(executor),
                paths=executor.path_rates(),
            )  # fmt: skip
        self.plans += 1
        self._host_pieces = _for_the_host(pieces)
        return make_plan(
            self._host_pieces, self._host_rates, memory_bytes=0, buffers=executor.buffers
        )

    def _place(self, executor: Executor, pieces: list[Piece]) -> None:
        """Say which stored pieces change paths in the coming update. This rank's own affair."""
        tier, rates = executor.tier, self._known_rates()
        if self._placement is None or tier is None or rates is None:
            return
        tier.rates = list(rates.paths)

        def update_s(homes: Homes) -> float:
            numbers = [each.stored for each in executor.subgroups]
            moved = [
                p if n is None or homes[n] is None else dataclasses.replace(p, path=homes[n])
                for p, n in zip(pieces, numbers, strict=True)
            ]
            return self._best_s(moved, rates)

        homes = tier.homes()
        goals = self._placement.goals(
            homes, [each.nbytes for each in tier.pieces], rates.paths, tier.takes(),
            lambda changed: update_s(changed) <= (1 - LEAST_GAIN) * update_s(homes),
        )  # fmt: skip
        if goals:
            logger.info(
                "offload: %d of %d stored pieces go to other paths, by what was measured",
                len(goals), len(homes),
            )  # fmt: skip
            tier.move(goals)

    def _best_s(self, pieces: list[Piece], rates: Rates) -> float:
        """Return how long the best plan for some pieces would take."""
        if self._is_host_only:
            host = _for_the_host(pieces)
            plan = make_plan(host, rates, memory_bytes=0, buffers=self._buffers)
        else:
            plan = self._planned(self._keep_residents, pieces)
        return plan.makespan_s or 0.0

    def _random(self, executor: Executor, pieces: list[Piece], *, can: bool) -> Plan:
        seed = (self._config.random_seed or 0) * 1_000_003 + self._step
        if self._placement is not None and (tier := executor.tier) is not None:
            tier.move(random_moves(tier.homes(), len(tier.files), seed))
        return random_plan(
            pieces, seed, memory_bytes=self._memory(executor) if can else 0.0,
            max_slots=self._config.max_slots, keep_residents=self._keep_residents,
            buffers=executor.buffers,
        )  # fmt: skip

    def observe(self, trace: StepTrace) -> None:
        """Correct the rates by what an update took; at most once per plan and few steps."""
        plan, rates = self.plan, self._known_rates()
        if trace.is_degraded:
            self._misfits, self._share = PATIENCE, 0.8 * self._share
        if plan is None or rates is None or plan.makespan_s is None or trace.is_degraded:
            return
        if not trace.is_typical:  # other work than was predicted says nothing about the rates
            return
        rates = self._observe_paths(rates, trace)
        if abs(trace.makespan_s - plan.makespan_s) > MISFIT * plan.makespan_s:
            self._misfits += 1
        due = (
            self._step % self._config.replan_every_n_steps == self._config.replan_every_n_steps - 1
        )
        if due or self._is_host_only:  # reading a GPU's clocks costs time
            better = corrected(rates, dict(plan.busy_s), trace.busy_s())
            if self._is_host_only:
                # Corrections are ratios to the prediction, so that has to follow at once.
                self._host_rates = better
                self.plan = predict(self._host_pieces, plan, better, memory_bytes=0)
            else:
                self.rates = better

    def _observe_paths(self, rates: Rates, trace: StepTrace) -> Rates:
        """Correct the paths' rates; after every update, as it takes no look at a GPU's clocks."""
        if not rates.paths:
            return rates
        better = rates.replace(paths=corrected_paths(rates.paths, trace.transfers()))
        if self._is_host_only:
            self._host_rates = better
        else:
            self.rates = better
        if self._placement is not None:
            self._placement.observe(trace.makespan_s)
        return better

    def _known_rates(self) -> Rates | None:
        return self._host_rates if self._is_host_only else self.rates

    # -- plans --------------------------------------------------------------------------------

    def _confer(self, executor: Executor, *, can: bool) -> bool:
        """Tell the other ranks how it stands here; return whether to plan anew. Collective.

        Every rank makes this one call, whatever has happened to it: a rank that can do nothing
        says so, and then all of them leave their devices alone.
        """
        memory, lasting = self._memory(executor), self._lasting_memory(executor)
        has_moved = abs(memory - self._known_memory) > MISFIT * self._known_memory
        wish = self.plan is None or self._misfits >= PATIENCE or has_moved
        here, self._misfits = memory, 0
        if not executor.subgroups:  # nothing to do here holds nobody back
            own, memory, lasting = [math.inf] * _COUNT, math.inf, math.inf
        elif can:
            own = self._measured(executor)
        else:
            own = [0.0] * _COUNT
        can_here = can and min(own) > 0.0
        all_can, wishes, memory, lasting, *numbers = self._agree(
            [float(can_here or not executor.subgroups), -float(wish), memory, lasting, *own]
        )
        could, self._all_can = self._all_can, all_can > 0.0
        if not self._all_can or (could and wishes >= 0.0) or self.rates is None:
            return False
        self.rates = _with_numbers(self.rates, numbers)
        self._known_memory, self._budget, self._lasting = here, memory, lasting
        return True

    def _measured(self, executor: Executor) -> list[float]:
        """Return this rank's rates as numbers, measured at the first time; zeros: it cannot."""
        if self.rates is None:
            try:
                self.rates = measure(executor).replace(paths=executor.path_rates())
            except DeviceOutOfMemoryError as error:  # perhaps there is more another time
                logger.warning("offload: the host updates all, no room to measure: %s", error)
            except DeviceError as error:
                logger.warning("offload: the host updates all: %s", error)
                self._may_update = False
        return [0.0] * _COUNT if self.rates is None else _numbers(self.rates)

    def _make_plan(self) -> None:
        """Plan with the rates and the memory that all ranks agreed on."""
        self.plans += 1
        self.plan = self._planned(self._keep_residents, self._pieces)
        lasting = self._lasting
        if self.plan.resident_bytes > lasting:  # there is less room in forward than in the update
            kept: list[int] = []
            for index in self.plan.residents:
                lasting -= self._pieces[index].resident_bytes
                if lasting >= 0:
                    kept.append(index)
            self.plan = self._planned(kept, self._pieces)

    def _planned(self, keep_residents: bool | list[int], pieces: list[Piece]) -> Plan:
        if self.rates is None:  # nothing to update on this rank
            return host_only_plan(pieces, buffers=self._buffers)
        return make_plan(
            pieces, self.rates, memory_bytes=self._budget, fraction=self._config.fraction,
            keep_residents=keep_residents, max_slots=self._config.max_slots,
            buffers=self._buffers,
        )  # fmt: skip

    @property
    def most_bytes(self) -> float:
        """Device memory that the settings allow; infinite where Lowtide chooses."""
        chosen = self._config.device_memory_bytes
        return chosen if isinstance(chosen, int) else math.inf

    def _memory(self, executor: Executor) -> float:
        """Return the device memory that an update may use, in bytes."""
        free = self._device.free_bytes() + executor.resident_bytes()
        return min(self.most_bytes, max(0.0, free - self._safety())) * self._share

    def _lasting_memory(self, executor: Executor) -> float:
        """Return the device memory that residents may keep through forward and backward."""
        free = self._device.least_free_bytes() + executor.resident_bytes()
        return min(self._memory(executor), max(0.0, free - self._safety()))

    def _safety(self) -> float:
        chosen = isinstance(self._config.device_memory_bytes, int)
        is_real = self._device.kind == "cuda" and not chosen
        return SAFETY_SHARE * self._device.memory_bytes if is_real else 0.0

    def facts(self) -> dict[str, Any]:
        """Return rates and plan for reports."""
        rates = self._known_rates()
        return {
            "plans": self.plans,
            "rates": None if rates is None else rates.as_dict(),
            "plan": None if self.plan is None else str(self.plan),
        }


_FIELDS = (
    "host_to_device_bytes_per_s",
    "device_to_host_bytes_per_s",
    "host_params_per_s",
    "device_params_per_s",
)
_COUNT = len(_FIELDS) + 1  # numbers that stand for a rank's rates
_OF_LANES = {
    "host_to_device_bytes_per_s": ("prefetch", "upload"),
    "device_to_host_bytes_per_s": ("flush",),
    "host_params_per_s": ("host",),
    "device_params_per_s": ("device",),
}


def corrected(rates: Rates, predicted_s: dict[str, float], measured_s: dict[str, float]) -> Rates:
    """Return `rates` moved towards what was measured.

    Args:
        rates: What the plan was made from.
        predicted_s: Predicted busy seconds of each lane; they contain what lanes do to each other,
            so their ratio to the measured ones is the error of the rate alone.
        measured_s: Measured busy seconds.

    Those of storage paths are left to `corrected_paths`.
    """
    changes: dict[str, Any] = {}
    for name, lanes in _OF_LANES.items():
        predicted = sum(predicted_s.get(lane, 0.0) for lane in lanes)
        measured = sum(measured_s.get(lane, 0.0) for lane in lanes)
        if predicted > 0.0 and measured > 0.0:
            changes[name] = getattr(rates, name) * (predicted / measured) ** SMOOTHING
    return rates.replace(**changes)


def corrected_paths(
    paths: Sequence[PathRates], moved: Mapping[str, tuple[int, float]]
) -> tuple[PathRates, ...]:
    """Return the paths' rates moved towards what was measured.

    By the bytes that were moved, and not by those that were planned: pieces that change paths, or
    that a reader has sent out of their buffers, are read and written elsewhere than planned. (What
    they lose by sharing the host's memory is part of the rates: storage is far slower than that.)

    Args:
        paths: What the plan was made from.
        moved: `StepTrace.transfers`.
    """
    found = []
    for j, path in enumerate(paths):
        rates = dataclasses.asdict(path)
        for kind in ("read", "write"):
            nbytes, busy_s = moved.get(f"{kind}{j}", (0, 0.0))
            if nbytes and busy_s > 0.0:
                known = rates[f"{kind}_bytes_per_s"]
                rates[f"{kind}_bytes_per_s"] = known * (nbytes / busy_s / known) ** SMOOTHING
        found.append(PathRates(**rates))
    return tuple(found)


def _for_the_host(pieces: Sequence[Piece]) -> list[Piece]:
    """Return pieces that a plan leaves to the host, all of them."""
    return [dataclasses.replace(p, is_movable=False, low_precision_bytes=0) for p in pieces]


def _numbers(rates: Rates) -> list[float]:
    memory = rates.host_memory_bytes_per_s
    return [*(getattr(rates, name) for name in _FIELDS), math.inf if memory is None else memory]


def _with_numbers(rates: Rates, numbers: list[float]) -> Rates:
    *values, memory = numbers
    return rates.replace(
        **dict(zip(_FIELDS, values, strict=True)),
        host_memory_bytes_per_s=None if memory == math.inf else memory,
    )
