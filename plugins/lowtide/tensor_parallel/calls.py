"""What happens around a call of a sharded model: the loss, the data check, shared random numbers.

All of it are objects that the model holds, not closures, so that a deep copy of the model (an
average of its weights, say) has its own, with its own head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.ends import VocabularyHead
from lowtide.tensor_parallel.group import TensorGroup, fingerprint
from lowtide.tensor_parallel.loss import IGNORED, vocabulary_cross_entropy
from lowtide.tensor_parallel.patterns import ModelPattern

_DIMENSIONS = 7  # whose lengths are compared
_EMBEDDED = "inputs_embeds"


class SpreadLoss:
    """Stand in for the loss of a Hugging Face model: labels are shifted here.

    Args:
        pattern: The model's family.
        vocabulary: V.
        head: The model's own.
        group: The ranks.
    """

    def __init__(
        self, pattern: ModelPattern, vocabulary: int, head: VocabularyHead, group: TensorGroup
    ) -> None:
        self.pattern = pattern
        self.vocabulary = vocabulary
        self.head = head
        self.group = group
        self.alone = TensorGroup()

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the mean cross-entropy, or the sum over `num_items_in_batch`.

        Raises:
            ModelError: there are no labels.
        """
        if shift_labels is None:
            if labels is None:
                raise ModelError("a loss was asked for without labels; pass labels to the model")
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return vocabulary_cross_entropy(
            logits,
            shift_labels,
            self.vocabulary,
            self.group if self.head.is_spread else self.alone,
            ignored=ignore_index,
            denominator=num_items_in_batch,
        )

    def choose(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide whether the head's logits stay spread in this call: a forward pre-hook."""
        hides_logits = module.training or not self.pattern.gives_logits
        self.head.is_spread = hides_logits and self.pattern.computes_loss(args, kwargs)


class CallCheck:
    """Refuse a call that cannot be answered, or whose inputs differ between the ranks.

    Args:
        pattern: The model's family.
        group: The ranks.
    """

    def __init__(self, pattern: ModelPattern, group: TensorGroup) -> None:
        self.pattern = pattern
        self.group = group

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at one call: a forward pre-hook. One message, whatever the call has.

        Raises:
            ModelError: see above; on every rank.
        """
        self.pattern.check_call(module, args, kwargs)
        inputs = self.pattern.inputs_of_call(args, kwargs)
        if inputs and self.group.size > 1 and self.group.check_data:
            given = [each for each in inputs.values() if each is not None]
            device = given[0].device if given else next(module.parameters()).device
            self._compare(inputs, device)

    def _compare(self, inputs: Mapping[str, Tensor | None], device: torch.device) -> None:
        values = torch.tensor([_shape(*each) for each in inputs.items()], device=device)
        for row, (name, tensor) in zip(values, inputs.items(), strict=True):
            if tensor is not None and name != _EMBEDDED:
                row[-1] = fingerprint(tensor)
        differing = self.group.where_different(values).any(-1).tolist()
        names = [name for name, differs in zip(inputs, differing, strict=True) if differs]
        if names:
            found = ", ".join(f"{name} of shape {_shape_text(inputs[name])}" for name in names)
            raise ModelError(
                f"lowtide.tensor_parallel: the {self.group.size} ranks of one tensor-parallel "
                f"group got different batches (this rank: {found}); all of them must read the "
                f"same: let the sampler go by the data-parallel rank, not by the global rank"
            )
        # Where there are no tokens, the embedding is called by others, for other calls.
        self.group.is_call_checked = inputs.get(_EMBEDDED) is None


def _shape(name: str, tensor: Tensor | None) -> list[int]:
    """Return number of dimensions and their lengths, with room for what is in it."""
    result = [0] * (_DIMENSIONS + 2)
    if tensor is not None:
        # Of embeddings each rank has columns of its own, so their last dimension is left out.
        shape = tensor.shape[:-1] if name == _EMBEDDED else tensor.shape
        result[: len(shape) + 1] = [1 + len(shape), *shape]
    return result


def _shape_text(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


class SameDraws:
    """Stand in for ``generate``: all ranks of a group draw the first one's random numbers.

    A rank whose state was the first one's goes on with it, as without this class: ranks seeded
    alike stay alike. A rank with another state has it back after.

    Args:
        model: Sharded, with a ``generate`` of its own.
        group: The ranks.
    """

    def __init__(self, model: Any, group: TensorGroup) -> None:
        self.model = model
        self.group = group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does."""
        device = next(self.model.parameters()).device
        states = [(torch.get_rng_state, torch.set_rng_state)]
        if device.type == "cuda":
            states.append((partial(torch.cuda.get_rng_state, device), partial(_set_cuda, device)))
        own = []  # states to be put back, and how
        for get, put in states:
            mine = get()
            first = self._of_first_rank(mine, device)
            # Not a state that was the same: it moves on everywhere, as the first rank's does.
            if not torch.equal(mine, first):
                own.append((mine, put))
                put(first)
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            for mine, put in own:
                put(mine)

    def _of_first_rank(self, state: Tensor, device: torch.device) -> Tensor:
        rows = self.group.gather_rows(state.to(device).unsqueeze(0), phase="generate")
        return rows[0].cpu()


def _set_cuda(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device)
