"""Where a decoder keeps its parts, as data: one pattern per model family.

Everything else in this plugin asks a pattern and never looks into a model by itself, so another
family needs a pattern and no other code.

Shape letters: B batch, T sequence position, D model width, K width of one head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lowtide.core.errors import ModelError, listed

Undo = Callable[[], None]


@dataclass(frozen=True)
class Projection:
    """One module that stands for one linear map.

    Attributes:
        path: Where it is, relative to its decoder layer.
        roles: What its output holds, one block of rows after another: ``("q",)`` alone, fused
            ``("k", "v")`` or ``("gate", "up")``.
    """

    path: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class LayerPattern:
    """The parts of one pre-norm decoder layer; paths are relative to the layer.

    The layer computes ``h = x + output(attention(inputs(norm(x))))``, then the same with the
    gated feed-forward block ``mlp_output(act(gate) * up)``.

    Attributes:
        attention_norm: Norm before attention.
        attention_inputs: Projections that read it; together the roles q, k and v.
        attention_output: Projection of the heads back to the model width; role o.
        mlp_norm: Norm before the feed-forward block.
        mlp_inputs: Projections that read it; together the roles gate and up.
        mlp_output: Projection back to the model width; role down.
        query_norm: RMSNorm over each query head before its rotation, of width K.
        key_norm: The same for key heads.
        mlp_activation: Module that is applied to gate, where it is a module.

    Raises:
        ModelError: A role is missing, repeated or unknown.
    """

    attention_norm: str
    attention_inputs: tuple[Projection, ...]
    attention_output: Projection
    mlp_norm: str
    mlp_inputs: tuple[Projection, ...]
    mlp_output: Projection
    query_norm: str | None = None
    key_norm: str | None = None
    mlp_activation: str | None = None

    def __post_init__(self) -> None:
        for place, projections, wanted in (
            ("attention_inputs", self.attention_inputs, ("q", "k", "v")),
            ("attention_output", (self.attention_output,), ("o",)),
            ("mlp_inputs", self.mlp_inputs, ("gate", "up")),
            ("mlp_output", (self.mlp_output,), ("down",)),
        ):
            found = [role for projection in projections for role in projection.roles]
            if sorted(found) != sorted(wanted):
                raise ModelError(
                    f"LayerPattern.{place}: got roles {found}, allowed is each of {list(wanted)} "
                    f"once"
                )

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of the layer, in the order of its computation."""
        return (
            *self.attention_inputs,
            self.attention_output,
            *self.mlp_inputs,
            self.mlp_output,
        )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, the same for all its layers.

    Attributes:
        width: Model width D.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_width: Width K of one head.
        mlp_width: Width of the feed-forward block.
        vocabulary: Rows of the embedding.
        norm: ``rms`` or ``layer`` (LayerNorm): all norms over the model width.
        epsilon: Added to their mean square or variance.
        mlp_activation: Applied to gate, a name from `bottleneck.ACTIVATIONS`; None multiplies
            gate and up as they are.
        is_tied: Whether the head's weight is the embedding's.
        attention_scale: Factor of the products of queries and keys.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    norm: Literal["rms", "layer"]
    epsilon: float
    mlp_activation: str | None
    is_tied: bool
    attention_scale: float

    def rows(self, role: str) -> int:
        """Return how many output rows a role has (q, k, v, o, gate, up, down)."""
        return {
            "q": self.heads * self.head_width,
            "k": self.kv_heads * self.head_width,
            "v": self.kv_heads * self.head_width,
            "o": self.width,
            "gate": self.mlp_width,
            "up": self.mlp_width,
            "down": self.width,
        }[role]

    def columns(self, role: str) -> int:
        """Return the input width of a role."""
        inner = {"o": self.heads * self.head_width, "down": self.mlp_width}
        return inner.get(role, self.width)


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a decoder layer was called with, by name.

    Attributes:
        hidden: Residual stream, (B, T, D) in the ordinary model.
        cos: Cosines of the rotary embedding, (T, R), (1, T, R) or (B, T, R); the second half of R
            repeats the first. Element k turns together with element k + R/2. R is K, or less: then
            the rest of each head does not turn.
        sin: Sines, alike.
        attention_mask: What scaled dot-product attention takes: (B or 1, heads or 1, T, S), bool
            or added to the scores. None: causal.
        cache: Keys and values of earlier positions, with ``update(key, value, layer_index)``, or
            None.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    attention_mask: Tensor | None = None
    cache: Any = None


@dataclass(frozen=True, kw_only=True)
class ModelPattern(ABC):
    """A family of decoders. Subclass it for your own model and call `register_pattern`.

    Attributes:
        name: For messages.
        classes: Names of model classes; a model is matched when its class or one of that class's
            bases has one of these names.
        embedding: Path of the token embedding.
        layers: Path of the list of decoder layers.
        final_norm: Path of the norm after the last layer.
        head: Path of the linear map to the vocabulary.
        layer: The parts of each decoder layer.
        gives_logits: Whether a call that computes the loss returns the logits too. If so they are
            gathered on every rank in evaluation; in training a rank keeps its part of them.
    """

    name: str
    classes: tuple[str, ...]
    embedding: str
    layers: str
    final_norm: str
    head: str
    layer: LayerPattern
    gives_logits: bool = True

    def matches(self, model: nn.Module) -> bool:
        """Return whether `model` is of this family."""
        return any(each.__name__ in self.classes for each in type(model).__mro__)

    @abstractmethod
    def shape(self, model: nn.Module) -> ModelShape:
        """Return the sizes of an unsharded `model`.

        Raises:
            ModelError: The model has a feature that no `ModelShape` can express.
        """

    @abstractmethod
    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerInputs:
        """Return the arguments of a decoder layer's forward by name.

        Raises:
            ModelError: They hold something that no `LayerInputs` can express.
        """

    def inputs_of_layers(self, model: nn.Module) -> Callable[[Tensor], LayerInputs]:
        """Return what makes a decoder layer's inputs from the residual stream alone.

        For stages of a pipeline, which have no model around them: positions count from 0, every
        token sees itself and those before it, and the residual stream enters the first layer as
        it leaves the embedding.

        Args:
            model: Unsharded; what is returned must not hold it.

        Raises:
            ModelError: The pattern or the model cannot do that.
        """
        raise ModelError(
            f'pattern "{self.name}" ({type(model).__name__}): does not say how to run its decoder '
            f"layers alone, which stages of a pipeline need; override "
            f"ModelPattern.inputs_of_layers"
        )

    def check_call(  # noqa: B027
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse a call of the sharded model that it cannot answer.

        Raises:
            ModelError: It asks for something that no rank has.
        """

    def inputs_of_call(
        self, _args: Sequence[Any], _kwargs: Mapping[str, Any]
    ) -> Mapping[str, Tensor | None]:
        """Return what has to be the same on all ranks of a group in a call of the model, by name.

        Tokens that an embedding gets are compared there as long as there is nothing here.

        Returns:
            The same names in every call; None for what this call has not. Of ``inputs_embeds``
            only the shape is compared, since each rank has columns of its own.
        """
        return {}

    def computes_loss(self, _args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call of the model with these arguments will ask for the loss.

        Then its head gives each rank's part of the logits to the function of `set_loss` (in
        evaluation only if nobody else sees them, see `gives_logits`), and whole logits otherwise.
        """
        return kwargs.get("labels") is not None

    def set_loss(
        self,
        model: nn.Module,  # noqa: ARG002 -- what a subclass needs
        function: Callable[..., Tensor],  # noqa: ARG002
    ) -> Undo | None:
        """Have `model` call `function` for its loss.

        Args:
            model: The model.
            function: Called as the model calls its own, with ``logits`` and ``labels``. Kept as an
                attribute or in a ``functools.partial``, not in a closure, it is copied with the
                model.

        Returns:
            What puts the model's own function back. None where the loss is no replaceable part
            of the model; its head then has to give whole logits.
        """
        return None


_registered: list[ModelPattern] = []


def register_pattern(pattern: ModelPattern) -> None:
    """Make a pattern known. The newest one is asked first, so it may refine a built-in one.

    Raises:
        ModelError: The name is taken by a different pattern.
    """
    for known in known_patterns():
        if known.name == pattern.name and known != pattern:
            raise ModelError(
                f'register_pattern: the name "{pattern.name}" is taken by another pattern '
                f"({type(known).__name__}); choose another name"
            )
    if pattern not in _registered:
        _registered.insert(0, pattern)


def unregister_pattern(name: str) -> None:
    """Forget a registered pattern. Meant for tests."""
    _registered[:] = [each for each in _registered if each.name != name]


def known_patterns() -> tuple[ModelPattern, ...]:
    """Return all patterns in the order in which they are asked."""
    from lowtide.tensor_parallel.adapters.hf import PATTERNS

    return (*_registered, *PATTERNS)


def find_pattern(model: nn.Module) -> ModelPattern:
    """Return the pattern of an unsharded model, after checking that the model fits it.

    Args:
        model: Full-rank or low-rank; it is only looked at.

    Raises:
        ModelError: No pattern matches, or the one that matches names parts or sizes that the
            model does not have; the message names the layer and the part.
    """
    from lowtide.tensor_parallel.pattern_checks import check_model, nearest_misfit

    for pattern in known_patterns():
        if pattern.matches(model):
            check_model(pattern, model)
            return pattern
    raise ModelError(
        f"{type(model).__name__}: no pattern matches this model. "
        f"Known: {listed(each.name for each in known_patterns())}. "
        f"{nearest_misfit(known_patterns(), model)}"
        f"Describe the model in a subclass of ModelPattern and pass it to "
        f"lowtide.tensor_parallel.patterns.register_pattern"
    )
