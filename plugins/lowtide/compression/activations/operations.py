"""Which operation is saving a tensor, and what it must get back exactly.

Autograd hands a tensor to be saved over without saying who saves it. Two places know: a torch
function mode sees every torch function that is called, and a custom autograd function stands in
the caller's Python frame.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

STATISTIC_RATIO = 8
"""A saved tensor with this many times fewer elements than what it is computed from is one."""

# Names of functions, and parts of names of custom autograd functions.
_EXACT = frozenset(
    ("softmax", "log_softmax", "_softmax", "_log_softmax", "special_log_softmax",
     "special_softmax", "gumbel_softmax", "softmin",
     "logsumexp", "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits")
)  # fmt: skip
_EXACT_PARTS = ("softmax", "crossentropy", "logsumexp", "nllloss")
_EXACT_NODES = frozenset(
    ("SoftmaxBackward0", "LogSoftmaxBackward0", "SafeSoftmaxBackward0", "LogsumexpBackward0")
)  # what they made is a probability, whoever saves it
_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))
_ATTENTION_PARTS = ("attention", "attn")
_HAS_STATISTICS = _ATTENTION | frozenset(
    ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "native_layer_norm",
     "native_group_norm", "native_batch_norm", "fused_rms_norm", "_fused_rms_norm")
)  # fmt: skip
_CUSTOM = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
# Softmax and losses called inside a larger function, as in multi_head_attention_forward.
_INNER = {
    function.__code__: function.__name__
    for function in (F.softmax, F.log_softmax, F.gumbel_softmax, F.softmin, F.cross_entropy,
                     F.nll_loss, F.binary_cross_entropy_with_logits)
    if hasattr(function, "__code__")
}  # fmt: skip
_COMPILED = "_aot_autograd"  # the folder of torch that runs compiled graphs
_FRAMES = 4


class Watch(TorchFunctionMode):
    """Knows the torch function that is running now. Changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Any = None
        self.arguments: tuple[Any, ...] = ()
        self.named: Mapping[str, Any] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **named)
        outer = self.function, self.arguments, self.named
        self.function, self.arguments, self.named = func, args, named
        try:
            return func(*args, **named)
        finally:
            self.function, self.arguments, self.named = outer


class Operation:
    """The operation that is saving a tensor, as far as it can be known.

    Attributes:
        name: Of the torch function, or of the class of a custom autograd function.
        is_custom: It is a custom autograd function.
        is_compiled: It is a graph made by torch.compile.
    """

    __slots__ = ("_arguments", "is_compiled", "is_custom", "name")

    def __init__(self, watch: Watch, frame: FrameType) -> None:
        """Look from `frame`, the one that autograd called the pack hook in."""
        self.is_compiled = False
        self.is_custom = frame.f_code is _CUSTOM
        if self.is_custom:
            local = frame.f_locals
            self.name = str(getattr(local.get("cls"), "__name__", ""))
            self._arguments: Iterable[Any] = local.get("args", ())
            self.is_compiled = _is_compiled(frame)
            return
        function = watch.function
        self.name = _INNER.get(frame.f_code) or str(getattr(function, "__name__", ""))
        self._arguments = (*watch.arguments, *watch.named.values())

    def needs_exactly(self, tensor: Tensor) -> bool:
        """Whether `tensor` is, or may be, a probability or the logarithm of one."""
        if tensor.grad_fn is not None and tensor.grad_fn.name() in _EXACT_NODES:
            return True
        return self._is_named(_EXACT, _EXACT_PARTS)

    def is_attention(self) -> bool:
        """Whether it is attention, whose backward pass puts what was saved into an exponential."""
        return self._is_named(_ATTENTION, _ATTENTION_PARTS)

    def _is_named(self, names: frozenset[str], parts: tuple[str, ...]) -> bool:
        if not self.is_custom:
            return self.name in names
        name = self.name.lower().replace("_", "")
        return any(part in name for part in parts)

    def is_statistic(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a statistic of the operation's input.

        Log-sum-exp of attention, mean and reciprocal deviation of norms: small, and much depends
        on them. Norms that are written out in Python reduce to a last dimension of 1.
        """
        if tensor.ndim > 1 and tensor.shape[-1] == 1:
            return True
        if not (self.is_custom or self.name in _HAS_STATISTICS):
            return False
        inputs = (each for each in self._arguments if isinstance(each, Tensor))
        sizes = (each.numel() for each in inputs if not isinstance(each, Parameter))
        return tensor.numel() * STATISTIC_RATIO <= max(sizes, default=0)


def caller(depth: int = 2) -> FrameType:
    """Return the frame in which autograd called the hook that calls this."""
    return sys._getframe(depth)


def _is_compiled(frame: FrameType | None) -> bool:
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if _COMPILED in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
