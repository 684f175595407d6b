"""Puts a planned update behind Megatron-core's `HybridDeviceOptimizer`, and takes it out again.

That optimizer keeps some parameters' masters and moments on the host (OptimizerConfig's
``optimizer_cpu_offload`` and ``optimizer_offload_fraction``) and steps one torch AdamW per
parameter there, or one for all of them; what it keeps on the GPU stays its own business. Its
`step` stays as it is and brings the gradients to the host. Inside its loop over the AdamWs, ours
take their turns: the last one updates all at once, and writes the rounded parameters where stock
would copy them to afterwards (Megatron-core 0.16.1, ``optimizer/cpu_offloading/hybrid_optimizer``).

Megatron reads and replaces the optimizer's ``state`` in many places without calling anybody. So
``state`` is a property here: whoever reads it gets the newest copies, on the host.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowtide.core.errors import ConfigError, HostError
from lowtide.offload.adapters.torch_adamw import TorchAdamW
from lowtide.offload.gradients import LeafGradients
from lowtide.offload.scheduler import Agree
from lowtide.offload.updater import Master, Updater, outcome_of

HOLDER = "_lowtide_offload"
# Entry points, beside ``state``, that read or write masters on the host.
_READERS = ("state_dict", "load_state_dict", "update_fp32_param_by_new_param")
METHODS = (*_READERS, "step", "_init_sub_optimizers", "_sync_hdo_state_to_sub_optimizers")
ATTRIBUTES = (
    "state",
    "param_groups",
    "cpu_optimizers",
    "cpu_copys_map_gpu_param",
    "param_to_inner_param",
)


def open_adapter(optimizer: Any, *, is_joint: bool = False) -> MegatronAdapter | None:
    """Return the adapter of what `get_megatron_optimizer` returned; None: nothing on this rank.

    Args:
        optimizer: Of this rank.
        is_joint: Whether all ranks fail together from now on; then this is collective, and no rank
            may be without an adapter.

    Raises:
        ConfigError: there is no offloaded optimizer in it, or one that cannot be updated by plan.
            Where `is_joint`, on any rank.
        HostError: this version of Megatron-core is not one that Lowtide knows.
    """
    if not is_joint or not dist.is_initialized():
        return _open(optimizer)
    # Numbers of the host, which NCCL does not take.
    group = dist.new_group(backend="gloo")
    try:
        adapter, failure = outcome_of(lambda: _open(optimizer))
        are_all = _smallest(group, [float(adapter is not None)])[0] > 0.0
        if failure is not None:
            raise failure
        if adapter is None or not are_all:
            raise ConfigError(
                "lowtide.offload.storage: a rank has no optimizer state in host memory, or cannot "
                "plan its update, and then its log says why; all ranks need some, as those with "
                "storage wait for each other: correct that, or remove lowtide.offload.storage"
            )
    except BaseException:
        _free(group)
        raise
    adapter.group = group
    return adapter


def _free(group: Any) -> None:
    """End a group of this rank; another one that still waits in it finds what was sent."""
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # all groups have gone
        dist.destroy_process_group(group)


def _smallest(group: Any, numbers: list[float]) -> list[float]:
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
    return [float(each) for each in tensor.tolist()]


def _open(optimizer: Any) -> MegatronAdapter | None:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        _refuse_settings(part)
    found = [part.optimizer for part in parts if part.optimizer is not None]
    if len(found) > 1:
        raise ConfigError(
            f"lowtide.offload: Megatron made {len(found)} optimizers on this rank (experts have "
            f"their own, and so has the first chunk with overlap_param_gather_with_optimizer_step),"
            f" allowed is 1; remove lowtide.offload"
        )
    return MegatronAdapter(found[0]) if found else None


class MegatronAdapter:
    """One `HybridDeviceOptimizer` under planned updates."""

    def __init__(self, hybrid: Any) -> None:
        missing = [n for n in METHODS if not callable(getattr(hybrid, n, None))]
        missing += [n for n in ATTRIBUTES if not hasattr(hybrid, n)]
        if missing:
            raise HostError(
                f"offload: {type(hybrid).__name__} has no {', '.join(missing)}; this version of "
                f"Megatron-core is not one that Lowtide knows, install megatron-core 0.16.1"
            )
        self.holder = Hybrid(hybrid)
        self.group: Any = None  # of ranks that fail together
        self._hybrid = hybrid
        self._base = type(hybrid)

    def connect(self, build: Callable[[Hybrid, TorchAdamW], Updater]) -> Updater:
        """Build the updater and put it in charge."""
        holder, base = self.holder, self._base
        updater = holder.updater = build(holder, holder.rule)
        setattr(self._hybrid, HOLDER, holder)
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        self._hybrid.__class__ = type(base.__name__, (base,), {**planned_class(base), **names})
        holder.take_turns()
        return updater

    def agree(self) -> Agree:
        """Return what keeps each rank's own numbers.

        Ranks own different parameters, and their updates share nothing: each plans by what it
        measures.
        """
        return list

    def together(self) -> Agree:
        """Return what finds the smallest numbers over all ranks, where they fail together.

        Megatron steps on all ranks or on none: it looks for infinities on all of them.
        """
        return self.agree() if self.group is None else functools.partial(_smallest, self.group)

    def close(self) -> None:
        """Give the optimizer its class back, with all its state on the host. Free the group."""
        group, self.group = self.group, None
        try:
            self._give_back()
        finally:
            if group is not None:
                _free(group)

    def _give_back(self) -> None:
        if HOLDER not in self._hybrid.__dict__:
            return
        try:
            if self.holder.updater is not None:
                self.holder.updater.end()
        finally:
            self.holder.give_back()
            self._hybrid.__class__ = self._base
            delattr(self._hybrid, HOLDER)


class Hybrid:
    """What the methods of one `HybridDeviceOptimizer` need."""

    allows_residents = True

    def __init__(self, hybrid: Any) -> None:
        self._hybrid = hybrid
        self.updater: Updater | None = None
        self.is_stale = False  # Megatron has made new AdamWs on the host
        self._turns: list[Any] = []
        _refuse(hybrid)
        self.rule = TorchAdamW(dict(self._owners()))

    # -- what the updater works on ----------------------------------------------------------

    def masters(self) -> list[Master]:
        """Return the parameters whose state is on the host, in Megatron's order."""
        there = self._hybrid.cpu_copys_map_gpu_param
        return [
            Master(leaf, group, _gradients(leaf), there[leaf].detach().view(-1))
            for leaf, (_, group) in self._owners()
        ]

    def _owners(self) -> Iterator[tuple[Tensor, tuple[Any, int]]]:
        for optimizer in self._hybrid.cpu_optimizers:
            for number, group in enumerate(optimizer.param_groups):
                for leaf in group["params"]:
                    yield leaf, (optimizer, number)

    def take_turns(self) -> None:
        """Stand in for the AdamWs' own steps."""
        self._turns = list(self._hybrid.cpu_optimizers)
        for turn, optimizer in enumerate(self._turns):
            optimizer.step = functools.partial(self._step, turn)

    def _step(self, turn: int, closure: Any = None) -> None:
        if closure is not None:
            raise HostError("offload: step(closure) cannot be planned; call step() without one")
        if self.updater is None:
            raise HostError("offload: no updater is connected")
        if turn == len(self._turns) - 1:
            self.updater.update(1.0)

    def give_back(self) -> None:
        """Undo what was done to the optimizer beside its class."""
        for optimizer in self._turns:
            vars(optimizer).pop("step", None)
        self._turns = []

    # -- what the subclass calls --------------------------------------------------------------

    def begin_step(self) -> None:
        """Go on with new AdamWs, where loading a checkpoint has made some."""
        if not self.is_stale or self.updater is None:
            return
        self.is_stale = False
        self.give_back()
        self.rule.owners = dict(self._owners())
        self.updater.replace_masters(self.masters())
        self.take_turns()

    def drain(self) -> None:
        """Bring the newest state to the host."""
        if self.updater is not None:
            self.updater.drain()


def planned_class(base: Any) -> dict[str, Any]:
    """Return the members of the subclass; instances keep a `Hybrid` in ``_lowtide_offload``."""

    def step(self: Any, closure: Any = None) -> Any:
        self._lowtide_offload.begin_step()
        return base.step(self, closure)

    def _init_sub_optimizers(self: Any) -> None:
        base._init_sub_optimizers(self)
        self._lowtide_offload.is_stale = True

    def get_state(self: Any) -> Any:
        self._lowtide_offload.drain()
        return self.__dict__["state"]

    def set_state(self: Any, value: Any) -> None:
        self.__dict__["state"] = value

    body: dict[str, Any] = {
        "step": step,
        "_init_sub_optimizers": _init_sub_optimizers,
        "state": property(get_state, set_state),
    }
    return body | {name: _after_drain(base, name) for name in _READERS}


def _after_drain(base: Any, name: str) -> Callable[..., Any]:
    stock = getattr(base, name)

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._lowtide_offload.drain()
        return stock(self, *args, **kwargs)

    return method


def _refuse_settings(part: Any) -> None:
    """Refuse a Megatron optimizer whose settings leave nothing for a plan."""
    settings: Any = getattr(part, "config", None)
    remove = "or remove lowtide.offload"
    if not getattr(settings, "optimizer_cpu_offload", False):
        raise ConfigError(
            f"lowtide.offload: {type(part).__name__} keeps its state where the model is, and the "
            f"plugin schedules an optimizer in host memory; set OptimizerConfig."
            f"optimizer_cpu_offload=True and optimizer_offload_fraction=1.0, {remove}"
        )
    fraction = settings.optimizer_offload_fraction
    if not fraction > 0.0:
        raise ConfigError(
            f"lowtide.offload: OptimizerConfig.optimizer_offload_fraction is {fraction}, so no "
            f"state is in host memory; set it to 1.0 (the plan chooses what the GPU does), {remove}"
        )
    if getattr(getattr(part, "ddp_config", None), "use_megatron_fsdp", False):
        raise ConfigError(
            f"lowtide.offload: DistributedDataParallelConfig.use_megatron_fsdp is True, allowed is "
            f"False: its optimizer works on DTensors; set it so {remove}"
        )


def _refuse(hybrid: Any) -> None:
    known = hybrid.param_to_inner_param
    if any(each not in known for group in hybrid.param_groups for each in group["params"]):
        raise ConfigError(
            "lowtide.offload: Megatron has replaced the parameters of its HybridDeviceOptimizer, "
            "whose own step fails then (bf16 or fp16 without the distributed optimizer in "
            "Megatron-core 0.16.1); set OptimizerConfig.use_distributed_optimizer=True"
        )
    there = hybrid.cpu_copys_map_gpu_param
    for optimizer in hybrid.cpu_optimizers:
        for group in optimizer.param_groups:
            for leaf in group["params"]:
                if leaf not in there:
                    raise ConfigError(
                        "lowtide.offload: a model parameter is in host memory, which Megatron's "
                        "HybridDeviceOptimizer cannot step; move the model to the GPU first"
                    )
                _refuse_parameter(leaf, there[leaf])


def _refuse_parameter(leaf: Tensor, weights: Tensor) -> None:
    found = f"lowtide.offload: a parameter of shape {tuple(leaf.shape)} is "
    if leaf.dtype != torch.float32:
        raise ConfigError(
            f"{found}{leaf.dtype} on the host, allowed is torch.float32; build the "
            f"HybridDeviceOptimizer with param_update_in_fp32=True, as Megatron does"
        )
    if not (leaf.is_contiguous() and weights.is_contiguous()):
        raise ConfigError(f"{found}not contiguous; make it so before the optimizer is built")


def _gradients(leaf: Tensor) -> LeafGradients:
    return LeafGradients(
        leaf,
        f"a parameter of shape {tuple(leaf.shape)} has never had a gradient; Megatron would leave "
        f"it out, the planned update cannot: freeze the parameter before the optimizer is built, "
        f"or remove lowtide.offload",
    )
