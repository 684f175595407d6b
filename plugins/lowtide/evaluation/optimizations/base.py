"""What an inference optimization is: parameters, where it acts, how it is applied and undone.

Everything an optimization changes goes through a `Handle`, which keeps the replaced objects
themselves. Undoing puts them back, so the model computes the same bits as before.
"""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowtide.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lowtide.evaluation.optimizations.cache.policies import Policy
    from lowtide.evaluation.optimizations.cache.quantised import CacheQuantiser
    from lowtide.evaluation.optimizations.prompt.compressors import PromptCompressor
    from lowtide.evaluation.optimizations.prompt.skipping import TokenSkipping

Stage = Literal["weights", "prompt", "prefill", "cache"]


@dataclass(kw_only=True)
class Runtime:
    """What the stages after the weights do while a prompt is read; None where a stage is off."""

    prompt: PromptCompressor | None = None
    skipping: TokenSkipping | None = None
    policy: Policy | None = None
    quantiser: CacheQuantiser | None = None


@dataclass(kw_only=True)
class Context:
    """What the optimizations of one stack share while they are applied.

    Attributes:
        calibration: Tokens, (N, T) int64, for methods that look at activations. They must be
            others than those that are evaluated.
        seed: Of methods that draw at random.
        masked: Linear layers whose zeros are a mask, so that later methods keep them zero.
        runtime: Filled by optimizations that act while a prompt is read.
    """

    calibration: Tensor | None = None
    seed: int = 0
    masked: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    runtime: Runtime = field(default_factory=Runtime)

    def calibration_for(self, name: str) -> Tensor:
        """Return the calibration tokens.

        Raises:
            DataError: There are none, or they are no (N, T) tensor of token numbers.
        """
        tokens = self.calibration
        if tokens is None:
            raise DataError(
                f"{name} looks at activations, and no calibration tokens were given; "
                f"pass Context(calibration=tokens) with tokens that are not evaluated"
            )
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise DataError(
                f"calibration tokens for {name}: found shape {tuple(tokens.shape)} of "
                f"{tokens.dtype}; allowed is (N, T) of torch.int64 with N and T above 0"
            )
        return tokens


class Handle:
    """One optimization that is in force on a model.

    Attributes:
        name: The optimization as it is spelled in a stack.
        facts: What it found out about itself, for reports (for example the sparsity reached).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts: dict[str, float] = {}
        self._changes: list[tuple[Any, str, Any, Any]] = []
        self._last_steps: list[Callable[[], object]] = []
        self._is_applied = True

    def replace(self, owner: Any, attribute: str, new: Any) -> None:
        """Set ``owner.attribute`` and remember the object that stood there."""
        self._changes.append((owner, attribute, getattr(owner, attribute), new))
        setattr(owner, attribute, new)

    def replace_weight(self, linear: nn.Module, weight: Tensor) -> None:
        """Give `linear` a new weight, which asks for gradients when the old one did."""
        old = linear.weight
        fresh = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)  # type: ignore[arg-type]
        self.replace(linear, "weight", fresh)

    def on_undo(self, step: Callable[[], object]) -> None:
        """Call `step` when the optimization is undone, for what is not an attribute."""
        self._last_steps.append(step)

    def undo(self) -> None:
        """Put every replaced object back, last change first. A second call does nothing."""
        if self._is_applied:
            for step in reversed(self._last_steps):
                step()
            for owner, attribute, old, _ in reversed(self._changes):
                setattr(owner, attribute, old)
        self._is_applied = False

    def bytes_report(self) -> dict[str, int]:
        """Return bytes of the storages that were replaced and of those that replace them.

        Storages are counted, each once: a mask on a dense weight and a simulated quantisation
        save nothing. ``undo_bytes`` is what is kept only to be able to undo.
        """
        before = storages(old for _, _, old, _ in self._changes)
        after = storages(new for _, _, _, new in self._changes)
        kept = {key: size for key, size in before.items() if key not in after}
        return {
            "before_bytes": sum(before.values()),
            "after_bytes": sum(after.values()),
            "undo_bytes": sum(kept.values()),
        }


def storages(objects: Any) -> dict[int, int]:
    """Return address and bytes of each distinct storage under tensors and modules."""
    found: dict[int, int] = {}
    for tensor in _tensors(objects):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def weight_bytes(model: nn.Module) -> int:
    """Return bytes of all distinct storages that parameters and buffers of `model` keep alive."""
    return sum(storages([model]).values())


def _tensors(objects: Any) -> Iterator[Tensor]:
    for each in objects:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, nn.Module):
            yield from each.parameters()
            yield from each.buffers()


@dataclass(frozen=True, kw_only=True)
class Optimization(ABC):
    """An optimization with its parameters; the fields of a subclass are the parameters.

    Attributes:
        name: As in a stack, "family.method".
        stage: Where it acts.
        needs_calibration: It looks at activations of calibration tokens.
        needs_attention_weights: It needs attention weights, which fused attention does not give;
            they are then computed apart, and the time is charged to it.
        positional: Parameters that a stack may give without their names, in order.
        letters: One-letter prefixes of parameters, as in ``g128``.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    needs_calibration: ClassVar[bool] = False
    needs_attention_weights: ClassVar[bool] = False
    positional: ClassVar[tuple[str, ...]] = ()
    letters: ClassVar[dict[str, str]] = {}

    @property
    def family(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]

    @property
    def spelled(self) -> str:
        """The optimization as a stack spells it: name, then every parameter that is set."""
        short = {value: key for key, value in self.letters.items()}
        words = [f"{getattr(self, name)}" for name in self.positional]
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in self.positional or value == each.default:
                continue
            if value is True:
                words.append(each.name)
            elif each.name in short:
                words.append(f"{short[each.name]}{value}")
            else:
                words.append(f"{each.name}={value}")
        return self.name + (":" + ",".join(words) if words else "")

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> Handle:
        """Change `model`, or `context.runtime`, and return how to undo it.

        Raises:
            ModelError: The model has not the parts that this needs.
            DataError: It needs calibration tokens and `context` has none.
        """

    def check(self, condition: bool, parameter: str, allowed: str) -> None:
        """Raise a `ConfigError` that names `parameter` unless `condition` holds."""
        if not condition:
            found = getattr(self, parameter)
            raise ConfigError(f"{self.name}: {parameter} is {found!r}; allowed is {allowed}")
