"""Ranks that hold one model together read the same batches under Accelerate and `Trainer`.

Both know tensor parallelism as ``tensor_parallel.autotp_size`` in the DeepSpeed JSON. That key
stays unset, as DeepSpeed would read it too, and save it; where they ask for it, they are answered
from the block instead: `Trainer` divides batch sizes and token counts by the size, and
`Accelerator.get_state_dict` asks the engine for the whole weights.

What they leave open is done here. Preparing loaders, optimizers and schedulers goes by groups
that share batches instead of ranks (data order, ``"auto"`` for ``train_batch_size``, numbers of
steps, batches to split), what a sampler draws is the same on all ranks, and metrics are gathered
from one rank of each group. Groups are neighbours in the order of ranks. Batches that rank 0 reads
for all ranks (``dispatch_batches``) cannot be shared and are refused.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowtide.core.config import BLOCK, ranks_per_batch
from lowtide.core.errors import ConfigError
from lowtide.hosts._guard import Symbol, check_host
from lowtide.hosts._patches import Patch

_TESTED = {"accelerate": ("1.15.0",), "transformers": ("5.23.0",)}
_SYMBOLS = {
    "accelerate": (
        Symbol("accelerate", "Accelerator.prepare", ("self",)),
        Symbol("accelerate", "Accelerator.prepare_data_loader", ("self", "data_loader")),
        Symbol(
            "accelerate", "Accelerator.gather_for_metrics",
            ("self", "input_data", "use_gather_object"),
        ),
        Symbol("accelerate", "Accelerator.get_state_dict", ("self", "model")),
        Symbol("accelerate.data_loader", "DataLoaderDispatcher"),
        Symbol("accelerate.data_loader", "SeedableRandomSampler"),
        Symbol("accelerate.data_loader", "get_sampler", ("dataloader",)),
        Symbol("accelerate.scheduler", "AcceleratedScheduler.step", ("self",)),
    ),
    "transformers": (
        Symbol(
            "transformers.integrations.deepspeed", "HfTrainerDeepSpeedConfig.fill_match",
            ("self", "ds_key_long", "hf_val"),
        ),
        Symbol("transformers", "Trainer.get_tp_size", ("self",)),
    ),
}  # fmt: skip


def _ranks(config: Any) -> int:
    """Return how many ranks read one batch, by a whole DeepSpeed JSON."""
    is_ours = isinstance(config, dict) and isinstance(config.get(BLOCK), dict)
    return ranks_per_batch(config) if is_ours else 1


def _check(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Look at every configuration as soon as Accelerate or `Trainer` reads it.

    Raises:
        ConfigError: the block cannot be used.
        HostError: the installed version cannot be made to share batches.
    """

    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        stock(self, *args, **kwargs)
        if _ranks(self.config) > 1:
            check_host("accelerate", _TESTED["accelerate"], _SYMBOLS["accelerate"])
            if hasattr(self, "trainer_config_process"):
                check_host("transformers", _TESTED["transformers"], _SYMBOLS["transformers"])

    return __init__


def _get_tp_size(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Tell `Trainer` how many ranks count each batch and each token."""

    @functools.wraps(stock)
    def get_tp_size(self: Any) -> int:
        config = getattr(self.args, "hf_deepspeed_config", None)
        ranks = _ranks(config.config) if self.is_deepspeed_enabled and config is not None else 1
        return ranks if ranks > 1 else int(stock(self))

    return get_tp_size


def _get_state_dict(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ask an engine whose weights are spread for the whole ones, as Accelerate does for its own."""

    @functools.wraps(stock)
    def get_state_dict(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        whole = vars(model).get("_consolidated_16bit_state_dict")  # put there by a plugin
        return stock(self, model, *args, **kwargs) if whole is None else whole()

    return get_state_dict


def _divide_batch(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Make `Trainer` count each batch once in ``train_batch_size``."""

    @functools.wraps(stock)
    def fill_match(self: Any, ds_key_long: str, hf_val: Any, *args: Any, **kwargs: Any) -> Any:
        if ds_key_long == "train_batch_size":
            hf_val //= _ranks(self.config)
        return stock(self, ds_key_long, hf_val, *args, **kwargs)

    return fill_match


class _DataParallelView:
    """Accelerate's state, in which ranks that read the same batches count as one process."""

    def __init__(self, state: Any, ranks: int) -> None:
        if state.num_processes % ranks:
            raise ConfigError(
                f"{BLOCK}: {ranks} ranks shall hold one model and read the same batches, which "
                f"does not divide the {state.num_processes} rank(s) of this job; start with a "
                f"multiple of {ranks}, or change the degree"
            )
        self.__dict__.update(
            _state=state,
            num_processes=state.num_processes // ranks,
            process_index=state.process_index // ranks,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._state, name, value)


def _size(state: Any) -> int:
    plugin = state.deepspeed_plugin
    return 1 if plugin is None else _ranks(plugin.deepspeed_config)


@contextmanager
def _data_parallel(accelerator: Any) -> Iterator[bool]:
    """Show `accelerator` the data-parallel view; tell whether it is one."""
    state = accelerator.state
    if isinstance(state, _DataParallelView):
        yield True
        return
    ranks = _size(state)
    if ranks == 1:
        yield False
        return
    accelerator.state = _DataParallelView(state, ranks)
    try:
        yield True
    finally:
        accelerator.state = state


def _prepare(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _data_parallel(self):
            return stock(self, *args, **kwargs)

    return prepare


def _prepare_data_loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def prepare_data_loader(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _data_parallel(self) as is_shared:
            loader = stock(self, *args, **kwargs)
        if not is_shared:
            return loader
        if isinstance(loader, _loading().DataLoaderDispatcher):
            raise ConfigError(
                "dispatch_batches: rank 0 would read all batches and hand each rank its own, but "
                "the ranks that hold one model need the same ones; set it to False "
                "(DataLoaderConfiguration(dispatch_batches=False), or in TrainingArguments "
                'accelerator_config={"dispatch_batches": False})'
            )
        _synchronise(loader)
        return loader

    return prepare_data_loader


def _synchronise(loader: Any) -> None:
    """Have all ranks draw the same order. All of them prepare a loader that draws one.

    Accelerate does so only for several processes, which the groups need not be, and never for its
    own seedable sampler, which it takes to be seeded alike.
    """
    sampler = _loading().get_sampler(loader)
    if isinstance(sampler, _loading().SeedableRandomSampler):
        (sampler.initial_seed,) = _utils().broadcast_object_list([sampler.initial_seed])
        return
    generator = getattr(loader.dataset if sampler is None else sampler, "generator", None)
    if generator is None and hasattr(sampler, "generator"):
        seed = int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        sampler.generator = generator
    if isinstance(generator, torch.Generator):
        loader.synchronized_generator = generator
        if "generator" not in loader.rng_types:
            loader.rng_types.append("generator")


def _gather_for_metrics(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Gather from the first rank of each group: the others have the same samples."""

    @functools.wraps(stock)
    def gather_for_metrics(self: Any, input_data: Any, use_gather_object: bool = False) -> Any:
        ranks = _size(self.state)
        if ranks == 1:
            return stock(self, input_data, use_gather_object)
        if use_gather_object or not _is_tensors(input_data):
            mine = input_data if self.process_index % ranks == 0 else []
            return stock(self, mine, True)
        gather = self.gather

        def once(tensor: Any) -> Any:  # [world * n, ...] -> [world / ranks * n, ...]
            return tensor.unflatten(0, (self.num_processes, -1))[::ranks].flatten(0, 1)

        self.gather = lambda tensors: _utils().recursively_apply(once, gather(tensors))
        try:
            return stock(self, input_data)
        finally:
            del self.gather

    return gather_for_metrics


def _utils() -> Any:
    return sys.modules["accelerate.utils"]


def _loading() -> Any:
    return sys.modules["accelerate.data_loader"]


def _is_tensors(data: Any) -> bool:
    try:  # the question that Accelerate itself decides by
        _utils().recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _step_scheduler(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Advance a schedule once per batch of a step, not once per rank."""

    @functools.wraps(stock)
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        # What stock asks before it makes Accelerate's state, or needs no number of processes for.
        if (
            not self.step_with_optimizer
            or self.split_batches
            or not self.gradient_state.sync_gradients
            or any(optimizer.step_was_skipped for optimizer in self.optimizers)
        ):
            stock(self, *args, **kwargs)
            return
        state = sys.modules["accelerate.state"].AcceleratorState()
        ranks = _size(state)
        if ranks == 1:
            stock(self, *args, **kwargs)
            return
        total = getattr(self.scheduler, "total_steps", None)  # of a schedule that must not go on
        self.split_batches = True  # one step per call
        try:
            for _ in range(state.num_processes // ranks):
                if total is None or self.scheduler._step_count <= total:
                    stock(self, *args, **kwargs)
        finally:
            self.split_batches = False

    return step


def _ignore(_name: str) -> None:
    """Say nothing: who needs the method checks all of them before it is used."""


PATCHES = (
    Patch("accelerate.utils", "HfDeepSpeedConfig", "__init__", _check, _ignore),
    Patch("accelerate.accelerator", "Accelerator", "prepare", _prepare, _ignore),
    Patch(
        "accelerate.accelerator", "Accelerator", "prepare_data_loader",
        _prepare_data_loader, _ignore,
    ),
    Patch(
        "accelerate.accelerator", "Accelerator", "gather_for_metrics",
        _gather_for_metrics, _ignore,
    ),
    Patch("accelerate.accelerator", "Accelerator", "get_state_dict", _get_state_dict, _ignore),
    Patch("accelerate.scheduler", "AcceleratedScheduler", "step", _step_scheduler, _ignore),
    Patch(
        "transformers.integrations.deepspeed", "HfTrainerDeepSpeedConfig", "fill_match",
        _divide_batch, _ignore,
    ),
    Patch("transformers.trainer", "Trainer", "get_tp_size", _get_tp_size, _ignore),
)  # fmt: skip
