"""Glue between the lifecycle of a run and a model that is spread over ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowtide.core.errors import ConfigError, ModelError
from lowtide.core.lifecycle import Event, Moment, Plugin, Session
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.factorisation import Factorisation, factorise
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layout import Layout, build_layout
from lowtide.tensor_parallel.parameters import Successors, listed_groups
from lowtide.tensor_parallel.sharding import Shards, shard, unsharded_state_dict

logger = logging.getLogger("lowtide")

_BEFORE_OTHERS = -100  # all that others see of the model is the converted one
_BEFORE_LOADERS = -200  # whoever loads by itself must not load what does not fit


class TensorParallelPlugin(Plugin):
    """Low-rank models over several ranks. ``engine.lowtide.tensor_parallel`` for scripts."""

    name = "tensor_parallel"
    Config = TensorParallelConfig
    config: TensorParallelConfig

    def __init__(self, config: TensorParallelConfig) -> None:
        super().__init__(config)
        self._session: Session | None = None
        self._engine: Any = None
        self._shards: Shards | None = None
        self._factorisation: Factorisation | None = None
        self._is_pipeline = False
        self._counted: dict[str, int] = {}

    # -- for scripts ------------------------------------------------------------------------

    @property
    def group(self) -> TensorGroup:
        """The ranks that hold one model together."""
        return self._converted().group

    def _converted(self) -> Shards:
        if self._shards is None:
            raise ModelError("lowtide.tensor_parallel: no model has been converted")
        return self._shards

    def state_dict(self, *, on_rank: int | None = 0) -> dict[str, Tensor]:
        """Return the unsharded low-rank model's state dict. Every rank calls it.

        Args:
            on_rank: The rank of each tensor-parallel group that gets it, the others get an empty
                dict; None: all of them.

        Returns:
            Tensors in host memory, by the names of the model before it was sharded (each linear
            as ``down.weight``, ``up.weight`` of a `BottleneckLinear`).
        """
        shards = self._converted()
        if self._is_pipeline:
            from lowtide.tensor_parallel.adapters import pipeline

            return pipeline.whole_state_dict(shards.model, shards.group, on_rank=on_rank)
        fetch: Callable[[Tensor], Tensor] = Tensor.detach
        if self._engine is not None:
            from lowtide.tensor_parallel.adapters.deepspeed import fetcher

            fetch = fetcher(self._engine)
        return unsharded_state_dict(shards.model, shards.group, fetch=fetch, on_rank=on_rank)

    # -- lifecycle --------------------------------------------------------------------------

    def attach(self, session: Session) -> None:
        """Subscribe; the model is converted when it is there, before the host takes it."""
        if session.host not in ("deepspeed", "torch"):
            raise ConfigError(
                f"lowtide.tensor_parallel: converts models for DeepSpeed and plain loops, and the "
                f'host is "{session.host}"; in Megatron-core build the model with '
                f"lowtide.tensor_parallel.adapters.megatron.bottleneck_layer_spec"
            )
        self._session = session
        on = session.hooks.on
        on(Event.MODEL_BUILT, self._convert, plugin=self.name, order=_BEFORE_OTHERS)
        on(Event.OPTIMIZER_BUILT, self._built, plugin=self.name)
        on(Event.BEFORE_LOAD, self._before_load, plugin=self.name, order=_BEFORE_LOADERS)
        on(Event.BEFORE_UPDATE, self._before_update, plugin=self.name)
        on(Event.AFTER_UPDATE, self._updated, plugin=self.name)

    def detach(self) -> None:
        """Give the engine its own ways to save back, and let go of it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            from lowtide.tensor_parallel.adapters import deepspeed

            deepspeed.restore_savers(engine)

    def summary(self) -> dict[str, Any]:
        """Return sizes, ranks and what was sent."""
        if self._shards is None:
            return {}
        traffic = self._shards.group.traffic
        found = {
            "degree": self._shards.group.size,
            "pattern": self._shards.pattern.name,
            **traffic.as_dict(),
            "wire_bytes": traffic.wire_bytes(self._shards.group.size),
        }
        if self._factorisation is not None:
            found["factorisation"] = self._factorisation.as_dict()
        return found

    def _convert(self, moment: Moment) -> None:
        session = self._session
        if session is None:
            return
        if session.host == "deepspeed":
            from lowtide.tensor_parallel.adapters import pipeline

            if pipeline.is_pipeline(moment.model):
                self._shards, self._factorisation = pipeline.adopt(moment.model, self.config)
                self._is_pipeline = True
                return
        layout = self._layout(moment)
        group = TensorGroup(layout.tensor_group if len(layout.tensor_ranks) > 1 else None)
        group.check_data = self.config.check_data
        # A generator such as model.parameters() would yield what it finds after the conversion.
        given = listed_groups(moment.data.get("model_parameters"))
        successors = Successors(moment.model)
        factorisation = factorise(moment.model, self.config, group=group.process_group)
        shards = shard(
            moment.model,
            group,
            tier=self.config.activation_checkpointing,
            overlaps_forward=self.config.overlap_forward,
            shape=factorisation.shape,
        )
        successors.follow(
            moment.model,
            factorisation.renamed,
            {old: (new,) for old, new in shards.renamed.items()},
        )
        self._replace_parameters(moment, given, successors)
        self._shards, self._factorisation = shards, factorisation
        if session.host == "deepspeed":
            from lowtide.tensor_parallel.adapters import deepspeed

            deepspeed.prepare(moment, shards, layout)
        if session.rank == 0:
            logger.info(
                "tensor_parallel: %s model of %d layers, %d parameters (before: %d), on %d rank(s)",
                shards.pattern.name, shards.shape.layers, factorisation.parameters_after,
                factorisation.parameters_before, group.size,
            )  # fmt: skip

    def _layout(self, moment: Moment) -> Layout:
        degree = self.config.degree
        if self._session is not None and self._session.host == "deepspeed":
            from lowtide.tensor_parallel.adapters import deepspeed

            return deepspeed.layout(moment, degree)
        if not dist.is_initialized():
            if degree > 1:
                raise ConfigError(
                    f"lowtide.tensor_parallel.degree: got {degree}, and this process is alone; "
                    f"start with torchrun and call torch.distributed.init_process_group first"
                )
            return Layout(None, None, (0,), (0,))
        return build_layout(degree)

    @staticmethod
    def _replace_parameters(
        moment: Moment, given: list[Any] | None, successors: Successors
    ) -> None:
        if given is not None:
            moment.data["model_parameters"] = successors.groups(given)
        optimizer = moment.optimizer
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:  # none, or a function that builds one from model_parameters
            return
        if optimizer.state:
            raise ModelError(
                "lowtide.tensor_parallel: the optimizer has already made steps with the model as "
                "it was; hand over a new optimizer"
            )
        for old, new in zip(groups, successors.groups(groups), strict=True):
            old["params"] = new["params"]

    def _built(self, moment: Moment) -> None:
        self._engine = moment.data.get("engine")
        if self._is_pipeline:
            from lowtide.tensor_parallel.adapters import pipeline

            pipeline.prepare_engine(self._engine)
        elif self._engine is not None:
            from lowtide.tensor_parallel.adapters import deepspeed

            deepspeed.replace_savers(self._engine, self.state_dict, self.group.size)

    def _before_load(self, moment: Moment) -> None:
        if moment.session.host == "deepspeed":
            from lowtide.tensor_parallel.adapters.deepspeed import check_saved

            check_saved(moment, self.config)

    def _before_update(self, _moment: Moment) -> None:
        if self._engine is not None:
            from lowtide.tensor_parallel.adapters.deepspeed import mark_gradients

            mark_gradients(self._engine)

    def _updated(self, _moment: Moment) -> None:
        session, shards = self._session, self._shards
        if session is None or shards is None or shards.group.size == 1:
            return
        traffic = shards.group.traffic
        for what, counts in (("bytes", traffic.payload_bytes), ("count", traffic.messages)):
            for key, value in counts.items():
                name = f"lowtide.tensor_parallel.{key.replace('/', '_')}_{what}"
                session.telemetry.count(name, value - self._counted.get(name, 0))
                self._counted[name] = value
