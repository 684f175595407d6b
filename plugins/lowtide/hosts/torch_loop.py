"""Host for a plain PyTorch loop: the same events without DeepSpeed or Megatron.

    loop = torch_loop.attach(model, optimizer, config={"lowtide": {}})
    for batch in batches:
        loss = model(batch)
        loop.backward(loss)
        optimizer.step()
    loop.close()

Forward and update events come from torch's own hooks, so the loop keeps calling the model and
``optimizer.step()``. Backward goes through `TorchLoop.backward`, because torch has no hook that
fires once when a whole backward is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowtide.core.lifecycle import Event, Session
from lowtide.hosts._guard import open_session


class TorchLoop:
    """A session bound to one model and one optimizer. Made by `attach`."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, session: Session
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.session = session
        self._forward_begin_s = 0.0
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run ``loss.backward(**kwargs)`` and fire AFTER_BACKWARD."""
        with self.session.telemetry.span("backward"):
            loss.backward(**kwargs)
        self.session.fire(Event.AFTER_BACKWARD, model=self.model, optimizer=self.optimizer)

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write model, optimizer, step and `extra` to `path` (torch format), atomically."""
        self.session.fire(Event.BEFORE_SAVE, model=self.model, path=os.fspath(path), tag=None)
        with self.session.telemetry.span("save"):
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.session.step,
                "extra": extra,
            }
            scratch = Path(f"{os.fspath(path)}.part")
            torch.save(state, scratch)
            scratch.replace(path)
        if self.session.stop is not None:
            self.session.stop.saved(self.session.step, os.fspath(path))
        self.session.fire(Event.AFTER_SAVE, model=self.model, path=os.fspath(path), tag=None)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Restore what `save` wrote; returns its `extra`."""
        with self.session.telemetry.span("load"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.session.step = int(state["step"])
        self.session.telemetry.start_from(self.session.step)
        self.session.fire(Event.LOADED, model=self.model, path=os.fspath(path), tag=None)
        extra: dict[str, Any] = state["extra"]
        return extra

    def close(self) -> None:
        """Remove every hook and close the session. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.session.close()

    def _before_forward(self, module: torch.nn.Module, _inputs: Any) -> None:
        self.session.fire(Event.BEFORE_FORWARD, model=module, training=module.training)
        self._forward_begin_s = time.perf_counter()

    def _after_forward(self, module: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
        name = "forward" if module.training else "evaluation"
        self.session.telemetry.add_span(name, "host", self._forward_begin_s, time.perf_counter())
        self.session.fire(Event.AFTER_FORWARD, model=module, training=module.training)

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.session.before_update(model=self.model, optimizer=optimizer)

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.session.after_update(model=self.model, optimizer=optimizer)
        self.session.end_step(model=self.model, optimizer=optimizer)


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any],
) -> TorchLoop:
    """Bind a session to a plain loop.

    Args:
        model: The model; a plugin may replace it, so go on with ``loop.model``.
        optimizer: The optimizer that updates the model.
        config: A JSON file or dict with a ``"lowtide"`` block.

    Raises:
        ConfigError: there is no block, or it cannot be used.
    """
    session = open_session(config, host="torch")
    try:
        moment = session.fire(Event.MODEL_BUILT, model=model, optimizer=optimizer)
        loop = TorchLoop(moment.model, moment.optimizer, session)
        session.fire(Event.OPTIMIZER_BUILT, model=loop.model, optimizer=loop.optimizer)
    except BaseException:
        session.close(status="failed")
        raise
    return loop
