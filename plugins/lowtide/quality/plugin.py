"""Glue between the lifecycle of a run and selections on some of its tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import LowtideError
from lowtide.core.lifecycle import Event, Moment, Plugin, Session
from lowtide.quality import sampling
from lowtide.quality.config import QualityConfig
from lowtide.quality.ledger import Ledger
from lowtide.quality.predictors import Predictor, predictor_of
from lowtide.quality.selection import select

logger = logging.getLogger("lowtide")


class QualityPlugin(Plugin):
    """How far tensors could be compressed. ``engine.lowtide.quality`` for scripts.

    Rank 0 looks at its tensors and decides; all ranks hear of it. Nothing of the run is changed.
    """

    name = "quality"
    Config = QualityConfig
    config: QualityConfig

    def __init__(self, config: QualityConfig) -> None:
        super().__init__(config)
        self._ledger = Ledger()
        self._predictors: dict[tuple[str, str], Predictor] = {}
        self._handles: list[Any] = []  # hooks of activations, during one forward
        self._waiting: list[dict[str, Any]] = []  # decisions that other ranks have not heard of
        self._failed = 0
        self._seen_forward = -1  # the step whose first forward was looked at
        self._session: Session | None = None
        self._group: Any = None

    def attach(self, session: Session) -> None:
        """Subscribe."""
        self._session = session
        on = session.hooks.on
        on(Event.OPTIMIZER_BUILT, self._connect, plugin=self.name)
        if "activations" in self.config.applies_to:
            on(Event.BEFORE_FORWARD, self._watch, plugin=self.name)
            on(Event.AFTER_FORWARD, self._unwatch, plugin=self.name)
        if "gradients" in self.config.applies_to:
            on(Event.BEFORE_UPDATE, self._look_at_gradients, plugin=self.name)
        on(Event.AFTER_UPDATE, self._finish, plugin=self.name)

    def detach(self) -> None:
        """Take hooks away and leave the group of ranks."""
        self._remove_hooks()
        group, self._group = self._group, None
        if group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(group)

    def summary(self) -> dict[str, Any]:
        """Return what was found so far: by kind, the ratio at the target and how it came about.

        Returns:
            ``target``, ``objective``, ``failed`` (tensors that could not be looked at), and
            ``kinds``: see `KindTotals.as_dict`.
        """
        return {
            "target": [str(target) for target in self.config.goal().targets],
            "objective": self.config.objective,
            "failed": self._failed,
            "kinds": self._ledger.as_dict(),
        }

    def newest(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the newest decision about each tensor of `kind`; layers' numbers are "#"."""
        return self._ledger.newest(kind)

    # -- events -----------------------------------------------------------------------------

    def _connect(self, moment: Moment) -> None:
        import torch.distributed as dist

        # In host memory, and apart from the training's own messages.
        if moment.session.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")

    def _watch(self, moment: Moment) -> None:
        step = moment.step + 1  # the one that this forward belongs to
        self._remove_hooks()  # of a forward that raised
        if not self._looks_at(moment, step) or self._seen_forward == step:
            return
        if not moment.data.get("training", True) or not torch.is_grad_enabled():
            return
        self._seen_forward = step
        for name, module in self._chosen("activations", step, sampling.leaf_modules(moment.model)):
            self._handles.append(module.register_forward_hook(self._hook(name, step)))

    def _hook(self, name: str, step: int) -> Any:
        def look(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = sampling.first_tensor(output)
            if not torch.compiler.is_compiling() and self._is_suitable(tensor):
                self._decide("activations", name, tensor, step)

        return look

    def _unwatch(self, _moment: Moment) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _look_at_gradients(self, moment: Moment) -> None:
        step = moment.step + 1
        if self._looks_at(moment, step):
            self._look("gradients", step, sampling.gradients(moment.model))

    def _finish(self, moment: Moment) -> None:
        step, session = moment.step, moment.session
        if step % self.config.sample.every_n_steps:
            return
        if self._looks_at(moment, step):
            if "parameters" in self.config.applies_to:
                self._look("parameters", step, sampling.parameters(moment.model))
            # Where another plugin keeps optimizer state elsewhere, the tensors here may be old.
            if "moments" in self.config.applies_to and not session.state.keys():
                self._look("moments", step, sampling.moments(moment.model, moment.optimizer))
        for record in self._shared():
            self._take_up(record, session)

    # -- decisions ----------------------------------------------------------------------------

    def _looks_at(self, moment: Moment, step: int) -> bool:
        """Whether this rank looks at tensors in `step`."""
        return moment.session.rank == 0 and step % self.config.sample.every_n_steps == 0

    def _chosen(self, kind: str, step: int, named: Iterable[tuple[str, Any]]) -> Any:
        settings = self.config.sample
        turn = step // settings.every_n_steps
        quotas = sampling.quotas(self.config.applies_to, settings.max_tensors_per_step, turn)
        return sampling.chosen(named, quotas[kind], seed=self.config.seed, step=step, kind=kind)

    def _look(self, kind: str, step: int, named: Iterable[tuple[str, Tensor]]) -> None:
        suitable = [(name, tensor) for name, tensor in named if self._is_suitable(tensor)]
        for name, tensor in self._chosen(kind, step, suitable):
            self._decide(kind, name, tensor, step)

    def _is_suitable(self, tensor: Any) -> bool:
        return sampling.is_suitable(tensor, self.config.sample.min_bytes)

    def _decide(self, kind: str, name: str, tensor: Tensor, step: int) -> None:
        config, role = self.config, sampling.role_of(name)
        predictor = None
        if config.predictor is not None:
            key = (kind, role)
            if key not in self._predictors:
                self._predictors[key] = predictor_of(config.predictor)
            predictor = self._predictors[key]
        session = self._session
        if session is None:
            return
        goal = config.goal()
        try:
            with session.telemetry.span("quality", lane="quality", kind=kind, tensor=name):
                found = select(
                    sampling.host_part(tensor, config.sample.max_bytes), goal.targets,
                    config.candidate_list(), config.objective, predictor,
                    max_tightenings=config.max_bound_tightenings,
                )  # fmt: skip
        except (LowtideError, RuntimeError) as error:
            # Nothing here is worth a run; and rank 0 alone must not leave the others waiting.
            self._failed += 1
            logger.warning("quality: %s %s at step %d: %s", kind, name, step, error)
            return
        place = {"plugin": self.name, "step": step, "tensor_kind": kind, "tensor": name}
        shape = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        self._waiting.append(place | {"role": role} | shape | found.as_dict())

    def _shared(self) -> list[dict[str, Any]]:
        """Return rank 0's decisions on every rank. Collective where there are several ranks."""
        records, self._waiting = self._waiting, []
        if self._group is None:
            return records
        box = [records]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _take_up(self, record: dict[str, Any], session: Session) -> None:
        totals = self._ledger.add(record)
        if session.rank != 0:
            return
        telemetry, kind = session.telemetry, record["tensor_kind"]
        telemetry.count("lowtide.quality.decisions_count")
        telemetry.count("lowtide.quality.measurements_count", record["measurements"])
        telemetry.count("lowtide.quality.looked_at_bytes", record["raw_bytes"])
        if totals.ratio is not None:
            telemetry.gauge(f"lowtide.quality.{kind}_ratio", totals.ratio)
        telemetry.record("decision", **record)
