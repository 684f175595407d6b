"""A GPU that is not there, for Megatron-core's `HybridDeviceOptimizer`.

That optimizer offloads what `is_cuda` and refuses anything else, and Megatron's mixed-precision
optimizers insist on the names of CUDA tensor types. Inside `pretend_gpu` every tensor says that it
is on the GPU, except those that came from ``.cpu()`` (or were made from such); streams and events
do nothing. All numbers are computed by the host, by the code that a GPU run would call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_IS_CUDA: Any = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
_MARK = "_is_on_pretended_host"


class _Event:
    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class _Stream:
    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()


class _PretendGpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        is_host = first is not None and getattr(first, _MARK, False)
        if func == _IS_CUDA:
            return not is_host
        if func == Tensor.type and len(args) == 1 and args[0].dtype in _NAMES:
            return f"torch.{'' if is_host else 'cuda.'}{_NAMES[args[0].dtype]}Tensor"
        if func == Tensor.pin_memory:
            return first
        if func == Tensor.cpu and first is not None:
            return _marked(first.detach().clone())
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        result = func(*("cpu" if _is_cuda_name(each) else each for each in args), **kwargs)
        if is_host and isinstance(result, Tensor) and result is not first:
            _marked(result)
        return result


def _is_cuda_name(value: Any) -> bool:
    return isinstance(value, str) and value == "cuda"


def _marked(tensor: Tensor) -> Tensor:
    setattr(tensor, _MARK, True)
    return tensor


@contextlib.contextmanager
def pretend_gpu(without_gpu: Callable[[], Any]) -> Iterator[None]:
    """Pretend; `without_gpu` is the example's, which sends ``device="cuda"`` to the CPU."""
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer_config as settings

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_gpu())
        patch = mock.patch.object
        for name in ("current_stream", "Stream"):
            stack.enter_context(patch(torch.cuda, name, _Stream))
        stack.enter_context(patch(torch.cuda, "stream", lambda _: contextlib.nullcontext()))
        # Transformer Engine is not installed: Megatron would compare its version None.
        stack.enter_context(patch(settings, "is_te_min_version", lambda *_: False))
        # Without it, and without Apex, Megatron loads one step counter for all parameters.
        stack.enter_context(patch(distributed, "HAVE_APEX_OR_TE", True))
        stack.enter_context(_PretendGpu())
        yield
