"""Puts a planned update into a DeepSpeed engine's ZeRO optimizer, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowtide.core.errors import ConfigError, HostError
from lowtide.offload.adapters import zero3, zero12
from lowtide.offload.adapters.cpu_adam import CpuAdam
from lowtide.offload.adapters.zero3 import Zero3
from lowtide.offload.adapters.zero12 import Zero12
from lowtide.offload.scheduler import Agree
from lowtide.offload.updater import Updater

STATE = "_lowtide_offload"
_ADAPTERS: dict[int, Any] = {1: zero12, 2: zero12, 3: zero3}


class DeepSpeedAdapter:
    """One engine's optimizer under planned updates."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        stage = int(engine.zero_optimization_stage())
        if stage not in _ADAPTERS:
            raise ConfigError(f"lowtide.offload: ZeRO stage {stage}, allowed are 1, 2 and 3")
        adapter = _ADAPTERS[stage]
        _refuse(self._optimizer, adapter)
        missing = [n for n in adapter.METHODS if not hasattr(type(self._optimizer), n)]
        if missing:
            raise HostError(
                f"offload: {type(self._optimizer).__name__} has no {', '.join(missing)}; this "
                f"version of DeepSpeed is not one that Lowtide knows"
            )
        self._base = type(self._optimizer)
        self._body = adapter.planned_class
        self.holder = (adapter.Zero3 if stage == 3 else adapter.Zero12)(self._optimizer)

    def connect(self, build: Callable[[Zero3 | Zero12, CpuAdam], Updater]) -> Updater:
        """Build the updater and put it in charge."""
        updater = build(self.holder, CpuAdam(self._optimizer.optimizer))
        self.holder.updater = updater
        setattr(self._optimizer, STATE, self.holder)
        base = self._base
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        self._optimizer.__class__ = type(base.__name__, (base,), {**self._body(base), **names})
        self.holder.connected()
        return updater

    def agree(self) -> Agree:
        """Return what finds the smallest numbers over the ranks that share the optimizer."""
        from deepspeed import comm
        from deepspeed.accelerator import get_accelerator

        group = self._optimizer.dp_process_group
        place = get_accelerator().current_device_name()

        def smallest(numbers: list[float]) -> list[float]:
            tensor = torch.tensor(numbers, dtype=torch.float64, device=place)
            comm.all_reduce(tensor, op=comm.ReduceOp.MIN, group=group)
            return [float(each) for each in tensor.tolist()]

        return smallest

    together = agree  # who plans together fails together

    def close(self) -> None:
        """Give the optimizer its class back, with all its state on the host."""
        optimizer = self._optimizer
        if STATE not in optimizer.__dict__:
            return
        try:
            if self.holder.updater is not None:
                self.holder.updater.end()
                self.holder.updater = None
            self.holder.give_back()
        finally:
            optimizer.__class__ = self._base
            delattr(optimizer, STATE)


def _refuse(optimizer: Any, adapter: Any) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    base: Any = getattr(optimizer, "optimizer", None)
    if base is None:
        raise ConfigError(
            'lowtide.offload: the engine has no optimizer to update; add "optimizer": {"type": '
            '"AdamW", ...} to the DeepSpeed JSON, or remove lowtide.offload'
        )
    if type(base) is not DeepSpeedCPUAdam:
        raise ConfigError(
            f"lowtide.offload: the optimizer is {type(base).__module__}.{type(base).__name__}, "
            f"and the plugin reproduces DeepSpeedCPUAdam; use optimizer.type Adam or AdamW "
            f'without "torch_adam"'
        )
    if type(optimizer).__name__ != adapter.CLASS:
        raise ConfigError(
            f"lowtide.offload: DeepSpeed made a {type(optimizer).__name__}, and the plugin knows "
            f"{adapter.CLASS}; change the settings that asked for it or remove lowtide.offload"
        )
    found = {
        "16-bit optimizer states": not base.fp32_optimizer_states,
        "torch.autocast's gradient scaler": bool(optimizer.torch_autocast_gradscaler),
        "ZenFlow": bool(optimizer.zenflow),
        **adapter.refusals(optimizer),
    }
    for what, is_so in found.items():
        if is_so:
            raise ConfigError(
                f"lowtide.offload: this engine runs with {what}, which the plugin cannot update "
                f"with stock's bits; change it or remove lowtide.offload"
            )
