"""DeepSpeed host: fires the lifecycle events from an unmodified engine.

DeepSpeed has no plugin interface, so an engine whose JSON has a ``"lowtide"`` block gets its class
replaced by a subclass made from its actual class; only the methods below are overridden. Without
the block the engine is whatever stock DeepSpeed made, the very same object.

Where the events come from (DeepSpeed 0.19.8):

- forward: `DeepSpeedEngine.forward`; under pipeline parallelism the ForwardPass instruction.
- backward: `_backward_prologue`/`_backward_epilogue`, which both ``engine.backward(loss)`` and
  ``loss.backward()`` pass through; under pipeline parallelism the BackwardPass instruction.
- update: `_take_model_step`, which both the ordinary and the pipeline engine call, and only at a
  gradient accumulation boundary.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lowtide.core.config import load_block, load_config
from lowtide.core.errors import ConfigError, HostError
from lowtide.core.lifecycle import Event, Session
from lowtide.hosts import accelerate, deepspeed_ops
from lowtide.hosts._deepspeed_needs import operators_of
from lowtide.hosts._deepspeed_save import UNCERTIFIED, certify, checkpoint_methods, end_step
from lowtide.hosts._guard import Symbol, check_host, process_rank

logger = logging.getLogger("lowtide")

TESTED = ("0.19.8",)
_ENGINE = "deepspeed.runtime.engine"
_SYMBOLS = (
    Symbol(_ENGINE, "DeepSpeedEngine.forward"),  # decorated: no parameter names to check
    Symbol(_ENGINE, "DeepSpeedEngine._backward_prologue", ("self",)),
    Symbol(_ENGINE, "DeepSpeedEngine._backward_epilogue", ("self",)),
    Symbol(_ENGINE, "DeepSpeedEngine._take_model_step", ("self", "lr_kwargs")),
    Symbol(_ENGINE, "DeepSpeedEngine.step", ("self", "lr_kwargs")),
    Symbol(_ENGINE, "DeepSpeedEngine.save_checkpoint", ("self", "save_dir", "tag", "client_state")),
    Symbol(_ENGINE, "DeepSpeedEngine.load_checkpoint", ("self", "load_dir", "tag")),
    Symbol(_ENGINE, "DeepSpeedEngine._commit_decoupled_checkpoint", ("self",)),
    Symbol(_ENGINE, "DeepSpeedEngine.destroy", ("self",)),
    Symbol("deepspeed.runtime.pipe.engine", "PipelineEngine._INSTRUCTION_MAP"),
    Symbol("deepspeed.runtime.pipe.engine", "PipelineEngine.train_batch", ("self",)),
    Symbol("deepspeed.runtime.pipe.schedule", "ForwardPass"),
    Symbol("deepspeed.runtime.pipe.schedule", "BackwardPass"),
)
_STOCK = "_lowtide_stock"  # attribute of our wrapper that holds deepspeed's own function


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Do what `deepspeed.initialize` does, honouring the ``"lowtide"`` block of its configuration.

    Args:
        *args: As `deepspeed.initialize`.
        **kwargs: As `deepspeed.initialize`.

    Returns:
        ``(engine, optimizer, loader, scheduler)``. With a block, ``engine.lowtide`` is the
        `Session`; without one, the engine is untouched stock DeepSpeed.

    Raises:
        ConfigError: the block cannot be used; raised before any process group is formed.
        HostError: DeepSpeed is missing, or its inner interface has moved.
        StaleLockError: a killed extension build would make this start hang.
    """
    return _initialize(_stock_initialize(), args, kwargs)


def enable() -> None:
    """From here on `deepspeed.initialize` itself honours the ``"lowtide"`` block.

    For programs that call it inside a library (Hugging Face Trainer, Accelerate, Lightning).
    Calling it again changes nothing. A script that did ``from deepspeed import initialize``
    before must call `enable` earlier, or be started by ``python -m lowtide.run``.
    """
    deepspeed = _import_deepspeed()
    accelerate.install()
    if hasattr(deepspeed.initialize, _STOCK):
        return
    stock = deepspeed.initialize

    @functools.wraps(stock)
    def initialize_with_lowtide(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        return _initialize(stock, args, kwargs)

    setattr(initialize_with_lowtide, _STOCK, stock)
    deepspeed.initialize = initialize_with_lowtide


def disable() -> None:
    """Undo `enable`: `deepspeed.initialize` is DeepSpeed's own function again.

    Engines that exist already keep their plugins until they are destroyed (or `detach`ed).
    """
    deepspeed = _import_deepspeed()
    accelerate.uninstall()
    if hasattr(deepspeed.initialize, _STOCK):
        deepspeed.initialize = _stock_initialize()


def detach(engine: Any) -> None:
    """Close the engine's session and give the engine its own class back."""
    session = engine.__dict__.get("lowtide")
    if session is None:
        return
    try:
        session.close()
    finally:
        engine.__class__ = type(engine).__mro__[1]
        del engine.lowtide


def _import_deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise HostError(
            f"deepspeed cannot be imported: {error}; install deepspeed=={TESTED[-1]}"
        ) from error
    return deepspeed


def _stock_initialize() -> Callable[..., Any]:
    current = _import_deepspeed().initialize
    stock: Callable[..., Any] = getattr(current, _STOCK, current)
    return stock


def _initialize(
    stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    call = inspect.signature(stock).bind(*args, **kwargs)
    host_config = _find_config(call.arguments)
    block = load_block(host_config) if host_config is not None else None
    if block is None or host_config is None:
        return stock(*args, **kwargs)
    # First what the user can get wrong, then what the machine can: one clear error either way,
    # and no process group has been formed yet.
    rank, world_size = process_rank()
    session = Session.open(
        block, host="deepspeed", rank=rank, world_size=world_size, host_config=host_config
    )
    try:
        check_host("deepspeed", TESTED, _SYMBOLS)
        makes_optimizer = callable(call.arguments.get("optimizer"))
        operators = operators_of(host_config, makes_optimizer=makes_optimizer)
        others = deepspeed_ops.check_locks(deepspeed_ops.extensions_dir(), operators)
        if others is not None and rank == 0:
            logger.warning("%s", others)
        moment = session.fire(
            Event.MODEL_BUILT,
            model=call.arguments.get("model"),
            optimizer=call.arguments.get("optimizer"),
            model_parameters=call.arguments.get("model_parameters"),
            mpu=call.arguments.get("mpu"),
        )
        _put_back(call.arguments, "model", moment.model)
        _put_back(call.arguments, "optimizer", moment.optimizer)
        _put_back(call.arguments, "model_parameters", moment.data["model_parameters"])
        _put_back(call.arguments, "mpu", moment.data["mpu"])
        result = stock(*call.args, **call.kwargs)
        attach(result[0], session)
    except BaseException:
        session.close(status="failed")
        raise
    # A plugin may have wrapped the optimizer: hand out the engine's own.
    return (result[0], result[0].optimizer, *result[2:])


def _put_back(arguments: dict[str, Any], name: str, value: Any) -> None:
    # An argument that was not given and that no plugin set must stay not given.
    if value is not None or name in arguments:
        arguments[name] = value


def _find_config(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    from_args = getattr(arguments.get("args"), "deepspeed_config", None)
    from_call = arguments.get("config")
    if from_call is None:
        from_call = arguments.get("config_params")
    if from_args is not None and from_call is not None:
        raise ConfigError(
            "config: given twice, as args.deepspeed_config and as config=; DeepSpeed takes one"
        )
    source = from_call if from_call is not None else from_args
    return None if source is None else load_config(source)


def attach(engine: Any, session: Session) -> None:
    """Make `engine` fire `session`'s events from now on, and fire OPTIMIZER_BUILT."""
    session.rank, session.world_size = process_rank()
    engine.__class__ = _engine_class(type(engine))
    engine.lowtide = session
    session.step = engine.global_steps
    if session.stop is not None:
        session.stop.connect()
    if session.config.telemetry.monitor and engine.monitor.enabled and engine.global_rank == 0:
        session.telemetry.sinks.append(_monitor_sink(engine))
    session.fire(
        Event.OPTIMIZER_BUILT, model=engine.module, optimizer=engine.optimizer, engine=engine
    )


def _monitor_sink(engine: Any) -> Callable[[str, float, int], None]:
    to_engine = weakref.ref(engine)

    def write(name: str, value: float, _step: int) -> None:
        engine = to_engine()
        if engine is not None:
            engine.monitor.write_events([(f"Lowtide/{name}", value, engine.global_samples)])

    return write


_engine_classes: dict[type, type] = {}


def _engine_class(base: type) -> type:
    """Return the subclass of `base` (an engine class) whose instances fire events."""
    if base in _engine_classes:
        return _engine_classes[base]
    from deepspeed.runtime.pipe.engine import PipelineEngine

    micro_batch = (
        _pipeline_methods(base) if issubclass(base, PipelineEngine) else _plain_methods(base)
    )
    body = {**micro_batch, **_step_methods(base), **checkpoint_methods(base)}
    # Same name: logs, isinstance checks and type(engine).__name__ read as they did.
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    _engine_classes[base] = type(base.__name__, (base,), body)
    return _engine_classes[base]


def _plain_methods(base: Any) -> dict[str, Any]:
    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        begin_s = _begin_forward(self)
        outputs = base.forward(self, *inputs, **kwargs)
        _end_forward(self, begin_s)
        return outputs

    def _backward_prologue(self: Any) -> Any:
        # Into __dict__: an engine is a torch module, whose __setattr__ takes microseconds.
        self.__dict__["_lowtide_backward_begin_s"] = time.perf_counter()
        return base._backward_prologue(self)

    def _backward_epilogue(self: Any) -> Any:
        result = base._backward_epilogue(self)
        session = self.lowtide
        begin_s = self.__dict__.pop("_lowtide_backward_begin_s", None)
        if begin_s is not None:
            session.telemetry.add_span("backward", "host", begin_s, time.perf_counter())
        session.fire(Event.AFTER_BACKWARD, model=self.module, optimizer=self.optimizer)
        return result

    def step(self: Any, lr_kwargs: Any = None) -> Any:
        finished = self.global_steps
        result = base.step(self, lr_kwargs)
        if self.global_steps != finished:  # not only a micro-batch
            end_step(self)
        return result

    return {
        "forward": forward,
        "step": step,
        "_backward_prologue": _backward_prologue,
        "_backward_epilogue": _backward_epilogue,
    }


def _pipeline_methods(base: Any) -> dict[str, Any]:
    from deepspeed.runtime.pipe import schedule

    def forward_pass(self: Any, **kwargs: Any) -> Any:
        begin_s = _begin_forward(self)
        result = base._INSTRUCTION_MAP[schedule.ForwardPass](self, **kwargs)
        _end_forward(self, begin_s)
        return result

    def backward_pass(self: Any, **kwargs: Any) -> Any:
        session = self.lowtide
        with session.telemetry.span("backward"):
            result = base._INSTRUCTION_MAP[schedule.BackwardPass](self, **kwargs)
        session.fire(Event.AFTER_BACKWARD, model=self.module, optimizer=self.optimizer)
        return result

    instructions = {
        **base._INSTRUCTION_MAP,
        schedule.ForwardPass: forward_pass,
        schedule.BackwardPass: backward_pass,
    }

    def train_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.train_batch(self, *args, **kwargs)
        end_step(self)
        return result

    return {"_INSTRUCTION_MAP": instructions, "train_batch": train_batch}


# Not a context manager: this runs with caches that a large step has left cold, where each Python
# call costs microseconds.
def _begin_forward(engine: Any) -> float:
    session: Session = engine.lowtide
    module = engine.module
    session.fire(Event.BEFORE_FORWARD, model=module, training=module.training)
    return time.perf_counter()


def _end_forward(engine: Any, begin_s: float) -> None:
    session: Session = engine.lowtide
    module = engine.module
    name = "forward" if module.training else "evaluation"
    session.telemetry.add_span(name, "host", begin_s, time.perf_counter())
    session.fire(Event.AFTER_FORWARD, model=module, training=module.training)


def _step_methods(base: Any) -> dict[str, Any]:
    def _take_model_step(self: Any, lr_kwargs: Any) -> Any:
        session: Session = self.lowtide
        if UNCERTIFIED in self.__dict__:  # of a decoupled checkpoint engine
            certify(self)
        session.before_update(model=self.module, optimizer=self.optimizer)
        result = base._take_model_step(self, lr_kwargs)
        session.after_update(
            applied=self._step_applied, model=self.module, optimizer=self.optimizer
        )
        return result

    def destroy(self: Any) -> Any:
        try:
            detach(self)
        finally:
            base.destroy(self)

    return {"_take_model_step": _take_model_step, "destroy": destroy}
