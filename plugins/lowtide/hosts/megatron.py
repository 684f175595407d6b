"""Megatron-core host: fires the lifecycle events from a user's own training loop.

    loop = megatron.attach(model_chunks, optimizer, config="ds.json")
    forward_backward = loop.wrap(get_forward_backward_func())
    for _ in range(steps):
        losses = forward_backward(forward_step_func=..., model=model_chunks, ...)
        optimizer.step()
    loop.close()

Where the events come from (Megatron-core 0.16.1):

- forward: torch's own hooks on every model chunk, so each micro-batch of every pipeline schedule.
- backward: autograd's end-of-backward callback, queued by a hook on the chunk's output. Schedules
  call their ``backward_step`` by name inside the module; this needs no patch in there, and it
  fires after Megatron's own gradient hooks have filled ``main_grad``.
- update: `step_with_ready_grads` of the outermost optimizer, which every Megatron optimizer calls
  once the check for infinities, clipping and scaling are done and nowhere else. A step that never
  comes that far was skipped. A plain torch optimizer is watched through torch's step hooks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import Variable

from lowtide.core.errors import HostError
from lowtide.core.lifecycle import Event, Session
from lowtide.hosts._guard import Symbol, check_host, open_session

TESTED = ("0.16.1",)
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_SYMBOLS = (
    Symbol("megatron.core.pipeline_parallel", "get_forward_backward_func"),
    Symbol(_OPTIMIZER, "MegatronOptimizer.step", ("self",)),
    Symbol(_OPTIMIZER, "MegatronOptimizer.prepare_grads", ("self",)),
    Symbol(_OPTIMIZER, "MegatronOptimizer.step_with_ready_grads", ("self",)),
    Symbol(_OPTIMIZER, "ChainedOptimizer.step_with_ready_grads", ("self",)),
)
_attached: weakref.WeakSet[Any] = weakref.WeakSet()


def attach(
    model_chunks: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Any,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any],
) -> MegatronLoop:
    """Bind a session to a Megatron-core loop.

    Args:
        model_chunks: The chunks given to the forward-backward function, as they are called there
            (wrapped in `DistributedDataParallel` if you do so); one module or a list.
        optimizer: What `get_megatron_optimizer` returned, or a `torch.optim.Optimizer`.
        config: A JSON file or dict with a ``"lowtide"`` block.

    Raises:
        ConfigError: there is no block, or it cannot be used.
        HostError: Megatron-core is missing, its inner interface has moved, or the chunks run in a
            mode in which no module is called per micro-batch.
    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else [*model_chunks]
    session = open_session(config, host="megatron")
    loop: MegatronLoop | None = None
    try:
        check_host("megatron-core", TESTED, _SYMBOLS)
        _check_supported(chunks, optimizer)
        for index, chunk in enumerate(chunks):
            moment = session.fire(
                Event.MODEL_BUILT, model=chunk, optimizer=optimizer, chunk=index, chunks=len(chunks)
            )
            if moment.model is not chunk or moment.optimizer is not optimizer:
                raise HostError(
                    "megatron.attach: a plugin wants to replace the model or the optimizer, but "
                    "the loop has already built both; apply that plugin before building them"
                )
        loop = MegatronLoop(chunks, optimizer, session)
        session.fire(Event.OPTIMIZER_BUILT, model=_whole(chunks), optimizer=optimizer)
    except BaseException:
        if loop is not None:
            loop.detach()
        session.close(status="failed")
        raise
    return loop


def _check_supported(chunks: Sequence[torch.nn.Module], optimizer: Any) -> None:
    if optimizer in _attached:
        raise HostError(
            "megatron.attach: this optimizer is attached already; close that loop first"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        for name in ("step", "step_with_ready_grads"):
            if not callable(getattr(optimizer, name, None)):
                raise HostError(
                    f"megatron.attach: {type(optimizer).__name__} has no method {name}; give what "
                    f"get_megatron_optimizer returned, or a torch.optim.Optimizer"
                )
    for index, chunk in enumerate(chunks):
        setting = _blinding_setting(getattr(chunk, "config", None))
        if setting is not None:
            raise HostError(
                f"megatron.attach: chunk {index} is configured with {setting}, under which no "
                f"module is called per micro-batch, so events would be missing; switch it off"
            )


def _blinding_setting(settings: Any) -> str | None:
    if getattr(settings, "overlap_moe_expert_parallel_comm", False):
        return "overlap_moe_expert_parallel_comm=True"  # a schedule plan instead of module calls
    scopes = getattr(settings, "cuda_graph_scope", None)
    for scope in scopes if isinstance(scopes, (list, tuple)) else [scopes]:
        if getattr(scope, "name", scope) == "full_iteration":
            return "cuda_graph_scope full_iteration"  # replayed without running Python
    return None


def _whole(chunks: Sequence[torch.nn.Module]) -> Any:
    """Return what events about the whole model carry: the chunk, or the list of several."""
    return chunks[0] if len(chunks) == 1 else list(chunks)


class MegatronLoop:
    """A session bound to model chunks and their optimizer. Made by `attach`."""

    def __init__(
        self, model_chunks: Sequence[torch.nn.Module], optimizer: Any, session: Session
    ) -> None:
        self.model_chunks = list(model_chunks)
        self.optimizer = optimizer
        self.session = session
        is_torch = isinstance(optimizer, torch.optim.Optimizer)
        model = _whole(self.model_chunks)
        self._watches = [_ChunkWatch(session, c, i) for i, c in enumerate(self.model_chunks)]
        self._update: _TorchUpdate | _MegatronUpdate
        self._update = (_TorchUpdate if is_torch else _MegatronUpdate)(session, model, optimizer)
        _attached.add(optimizer)

    def wrap(self, forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the schedule function, telling events about each of its calls.

        Events fire without it too; ``micro_batch`` then goes on counting from call to call instead
        of starting at 0, and ``forward_only=True`` counts as training unless gradients are off.
        """

        @functools.wraps(forward_backward_func)
        def run(*args: Any, **kwargs: Any) -> Any:
            for watch in self._watches:
                watch.micro_batch = 0
                watch.is_forward_only = bool(kwargs.get("forward_only", False))
            return forward_backward_func(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def save(self, path: str | os.PathLike[str], *, tag: str | None = None) -> Iterator[None]:
        """Fire BEFORE_SAVE and AFTER_SAVE around your own saving in the ``with`` body."""
        where = {"path": os.fspath(path), "tag": tag}
        model = _whole(self.model_chunks)
        self.session.fire(Event.BEFORE_SAVE, model=model, optimizer=self.optimizer, **where)
        with self.session.telemetry.span("save"):
            yield
        if self.session.stop is not None:
            self.session.stop.saved(self.session.step, os.fspath(path))
        self.session.fire(Event.AFTER_SAVE, model=model, optimizer=self.optimizer, **where)

    @contextlib.contextmanager
    def load(
        self, path: str | os.PathLike[str], *, tag: str | None = None
    ) -> Iterator[Callable[[int], None]]:
        """Fire LOADED after your own loading in the ``with`` body.

        Yields a function to call there with the number of optimizer steps the checkpoint holds.
        """
        with self.session.telemetry.span("load"):
            yield self._resume_from
        self.session.fire(
            Event.LOADED,
            model=_whole(self.model_chunks),
            optimizer=self.optimizer,
            path=os.fspath(path),
            tag=tag,
        )

    def _resume_from(self, step: int) -> None:
        self.session.step = step
        self.session.telemetry.start_from(step)

    def detach(self) -> None:
        """Remove every hook and wrapper; chunks and optimizer are as before `attach`."""
        for watch in self._watches:
            watch.close()
        self._update.close()
        _attached.discard(self.optimizer)

    def close(self) -> None:
        """`detach` and close the session. Idempotent."""
        self.detach()
        self.session.close()


class _ChunkWatch:
    """Fires the forward and backward events of one model chunk."""

    def __init__(self, session: Session, chunk: torch.nn.Module, index: int) -> None:
        self.micro_batch = 0
        self.is_forward_only = False
        self._session = session
        self._chunk = chunk
        self._index = index
        self._begin_s = 0.0
        self._is_closed = False
        self._handles = [
            chunk.register_forward_pre_hook(self._before_forward),
            chunk.register_forward_hook(self._after_forward),
        ]

    def close(self) -> None:
        self._is_closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _facts(self) -> dict[str, Any]:
        return {"chunk": self._index, "micro_batch": self.micro_batch}

    def _is_training(self) -> bool:
        return self._chunk.training and torch.is_grad_enabled() and not self.is_forward_only

    def _before_forward(self, module: torch.nn.Module, _inputs: Any) -> None:
        facts = self._facts()
        self._session.fire(
            Event.BEFORE_FORWARD, model=module, training=self._is_training(), **facts
        )
        self._begin_s = time.perf_counter()

    def _after_forward(self, module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
        facts, is_training = self._facts(), self._is_training()
        name = "forward" if is_training else "evaluation"
        end_s = time.perf_counter()
        self._session.telemetry.add_span(name, "host", self._begin_s, end_s, **facts)
        if is_training:
            self._await_backward(outputs, facts)
        self.micro_batch += 1
        self._session.fire(Event.AFTER_FORWARD, model=module, training=is_training, **facts)

    def _await_backward(self, outputs: Any, facts: dict[str, Any]) -> None:
        has_begun = False

        def begin(_gradient: torch.Tensor) -> None:
            nonlocal has_begun
            if has_begun or self._is_closed:  # several outputs, one backward
                return
            has_begun = True
            end = functools.partial(self._after_backward, time.perf_counter(), facts)
            # The same engine call that Megatron's and torch's own data parallelism build on.
            Variable._execution_engine.queue_callback(end)

        for tensor in _differentiable(outputs):
            tensor.register_hook(begin)

    def _after_backward(self, begin_s: float, facts: dict[str, Any]) -> None:
        self._session.telemetry.add_span("backward", "host", begin_s, time.perf_counter(), **facts)
        self._session.fire(Event.AFTER_BACKWARD, model=self._chunk, **facts)


def _differentiable(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        if outputs.requires_grad:
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _differentiable(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _differentiable(value)


class _TorchUpdate:
    """Fires the update events of a plain torch optimizer."""

    def __init__(self, session: Session, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self._session = session
        self._model = model
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: Any, *_: Any) -> None:
        self._session.before_update(model=self._model, optimizer=optimizer)

    def _after(self, optimizer: Any, *_: Any) -> None:
        self._session.after_update(model=self._model, optimizer=optimizer)
        self._session.end_step(model=self._model, optimizer=optimizer)


class _MegatronUpdate:
    """Fires the update events of a Megatron optimizer, by two wrappers on this one instance."""

    def __init__(self, session: Session, model: Any, optimizer: Any) -> None:
        self._session = session
        self._model = model
        self._optimizer = optimizer
        self._is_closed = False
        self._is_stepping = False
        self._applied = False
        self._undo = [
            _set_on_instance(optimizer, "step_with_ready_grads", self._wrap_ready),
            _set_on_instance(optimizer, "step", self._wrap_step),
        ]

    def close(self) -> None:
        self._is_closed = True
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrap_ready(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def step_with_ready_grads(*args: Any, **kwargs: Any) -> Any:
            if self._is_closed:
                return stock(*args, **kwargs)
            self._session.before_update(model=self._model, optimizer=self._optimizer)
            success = stock(*args, **kwargs)
            self._applied = bool(success)
            if not self._is_stepping:  # called by a loop that does the parts of step() itself
                self._finish()
            return success

        return step_with_ready_grads

    def _wrap_step(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._is_closed:
                return stock(*args, **kwargs)
            self._is_stepping, self._applied = True, False
            try:
                result = stock(*args, **kwargs)
            finally:
                self._is_stepping = False
            # Only here: the layer-wise optimizer still gathers parameters after its inner step.
            self._finish()
            return result

        return step

    def _finish(self) -> None:
        self._session.after_update(
            applied=self._applied, model=self._model, optimizer=self._optimizer
        )
        self._session.end_step(model=self._model, optimizer=self._optimizer)


def _set_on_instance(
    target: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put ``wrap(target.name)`` on the instance `target`; return what takes it off again."""
    had_own = name in vars(target)
    stock = getattr(target, name)
    ours = wrap(stock)
    setattr(target, name, ours)

    def undo() -> None:
        # Someone may have wrapped ours since: then it stays below theirs and only passes calls on.
        if vars(target).get(name) is not ours:
            return
        if had_own:
            setattr(target, name, stock)
        else:
            delattr(target, name)

    return undo
