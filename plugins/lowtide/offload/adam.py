"""Adam on a piece of optimizer state, with the bits of DeepSpeed's CPUAdam.

`update` does in one pass over memory what DeepSpeed does in four: upcast the gradient, multiply it
by the inverse loss scale and clip factor, step, round the new parameters to 16 bit. Shapes: N is
the number of elements of the piece; Adam is elementwise, so a piece may be cut anywhere.

Bits: what CPUAdam computes with vector instructions (AVX2, AVX-512) is reproduced exactly; NaN may
come with another sign or payload. CPUAdam leaves the last ``numel % 16`` elements of each tensor
(``% 8`` where DeepSpeed was compiled without AVX-512) to a scalar loop, and there it depends on
the compiler which product of ``beta * m + (1 - beta) * g`` is fused. GCC contracts by default and
takes the other product than the vector code does, so `exp_avg` and `exp_avg_sq` of these elements,
and through them `param`, differ in the last bit now and then. With ``tail`` set to the number of
such elements they are computed that way; ``tail=0`` computes all as vectors do. An adapter that
must not depend on the compiler gives the tail to DeepSpeed's own op: a second call at the same
step leaves the op's powers as they are. So pieces of one tensor must be cut at multiples of 16
elements from its start, and only its last piece has a tail.

Source: Kingma and Ba, Adam, arXiv:1412.6980; Loshchilov and Hutter, AdamW, arXiv:1711.05101; order
of operations after DeepSpeed 0.19, deepspeed/ops/csrc/includes/cpu_adam.h.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowtide.core.errors import OptimizerError
from lowtide.core.native import native_cuda, native_or_none
from lowtide.offload.adam_reference import ReferencePiece, update_piece
from lowtide.offload.adam_scalars import AdamStep, Powers, adam_step, torch_step

__all__ = [
    "TAIL_ALIGN", "AdamStep", "Powers", "adam_step", "reference_update", "torch_step", "update",
    "update_cuda",
]  # fmt: skip

TAIL_ALIGN = 16
"""Cut tensors at multiples of this many elements; the rest of the last piece is its tail."""

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    grad_scale: float = 1.0,
    low_precision: Tensor | None = None,
    keep_grad: bool | Tensor = False,
    tail: int = 0,
    threads: int | None = None,
) -> None:
    """Update one piece in host memory, in place; without native code by `reference_update`.

    All tensors are contiguous, of shape (N,), on the CPU, and do not overlap.

    Args:
        param: float32; read and written.
        grad: float32, bfloat16 or float16; read. 16 bit is widened exactly.
        exp_avg: float32, first moment; read and written.
        exp_avg_sq: float32, second moment; read and written.
        step: The scalars of this update.
        grad_scale: Multiplied to the gradient first, in float32 with one rounding.
        low_precision: float32, bfloat16 or float16; receives the new parameters, rounded to
            nearest even. NaN becomes a positive quiet NaN if 16 bit.
        keep_grad: Where the scaled gradient goes: True for `grad` itself, which must be float32;
            a float32 tensor; or False for nowhere.
        tail: How many of the last elements are computed as CPUAdam's scalar loop does; see the
            text at the head of this file.
        threads: At most so many threads; None for ``torch.get_num_threads()``. The same bits with
            any number, and whatever this thread's handling of subnormal numbers.

    Raises:
        OptimizerError: A tensor does not fit the above.
        ValueError: `threads` or `tail` is out of range.
    """
    piece = _Piece.checked("cpu", param, grad, exp_avg, exp_avg_sq, low_precision, keep_grad)
    module = native_or_none()
    if module is None:
        _update_reference(piece, step, grad_scale, tail)
        return
    workers = torch.get_num_threads() if threads is None else threads
    module.offload.adam_update(
        module.offload.AdamStep(**step.scalars(), mode=step.mode, grad_scale=_float32(grad_scale)),
        param.numel(),
        **piece.addresses(),
        tail=tail,
        threads=workers,
    )


def update_cuda(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    grad_scale: float = 1.0,
    low_precision: Tensor | None = None,
    keep_grad: bool | Tensor = False,
    tail: int = 0,
) -> None:
    """Do what `update` does to tensors on one GPU, on the current stream, without waiting for it.

    The same arithmetic compiled for the GPU; it has not been run on one by this project yet.

    Raises:
        NativeUnavailableError: The CUDA part is not built.
        OptimizerError: A tensor does not fit.
        RuntimeError: The GPU refuses the launch.
    """
    piece = _Piece.checked("cuda", param, grad, exp_avg, exp_avg_sq, low_precision, keep_grad)
    module = native_cuda()
    stream = torch.cuda.current_stream(param.device)
    module.offload.adam_update(
        param.device.index,
        stream.cuda_stream,
        param.numel(),
        step=dict(step.scalars(), grad_scale=_float32(grad_scale)),
        mode=step.mode,
        **piece.addresses(),
        tail=tail,
    )


def reference_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    grad_scale: float = 1.0,
    low_precision: Tensor | None = None,
    keep_grad: bool | Tensor = False,
    tail: int = 0,
) -> None:
    """Do what `update` does, in readable numpy (about a thousand times slower); same bits."""
    piece = _Piece.checked("cpu", param, grad, exp_avg, exp_avg_sq, low_precision, keep_grad)
    _update_reference(piece, step, grad_scale, tail)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """The tensors of one update, known to fit together."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low_precision: Tensor | None
    kept_grad: Tensor | None

    @classmethod
    def checked(
        cls,
        device: str,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        low_precision: Tensor | None,
        keep_grad: bool | Tensor,
    ) -> _Piece:
        """Raise OptimizerError for the first tensor that does not fit."""
        kept_grad = (grad if keep_grad else None) if isinstance(keep_grad, bool) else keep_grad
        named = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
        named |= {"low_precision": low_precision} if low_precision is not None else {}
        named |= {"keep_grad": kept_grad} if kept_grad is not None else {}
        for name, tensor in named.items():
            _check_tensor(name, tensor, param, device)
        if kept_grad is not None and kept_grad.data_ptr() == grad.data_ptr():
            del named["keep_grad"]  # in place
        _check_apart(named)
        return cls(
            param=param,
            grad=grad,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            low_precision=low_precision,
            kept_grad=kept_grad,
        )

    def addresses(self) -> dict[str, int | str]:
        """Return the arguments of the native functions that name the arrays."""
        low, kept = self.low_precision, self.kept_grad
        return {
            "param": self.param.data_ptr(),
            "exp_avg": self.exp_avg.data_ptr(),
            "exp_avg_sq": self.exp_avg_sq.data_ptr(),
            "grad": self.grad.data_ptr(),
            "grad_type": _TYPES[self.grad.dtype],
            "low_precision": 0 if low is None else low.data_ptr(),
            "low_type": "bfloat16" if low is None else _TYPES[low.dtype],
            "kept_grad": 0 if kept is None else kept.data_ptr(),
        }


def _update_reference(piece: _Piece, step: AdamStep, grad_scale: float, tail: int) -> None:
    size = piece.param.numel()
    if not 0 <= tail <= size:
        raise ValueError(f"tail: got {tail}, allowed is 0 to {size}, the number of elements")
    grad = piece.grad.detach().to(torch.float32).numpy() * np.float32(grad_scale)
    if piece.kept_grad is not None:
        piece.kept_grad.detach().copy_(torch.from_numpy(grad))
    names = ("param", "exp_avg", "exp_avg_sq")
    param, exp_avg, exp_avg_sq = (getattr(piece, name).detach().numpy() for name in names)
    for part, is_contracted in ((slice(0, size - tail), False), (slice(size - tail, size), True)):
        views = ReferencePiece(param[part], exp_avg[part], exp_avg_sq[part], grad[part])
        update_piece(views, step.scalars(), mode=step.mode, is_contracted=is_contracted)
    if piece.low_precision is not None:
        low = piece.low_precision.detach()
        low.copy_(piece.param.detach())
        if low.dtype != torch.float32:
            low[torch.isnan(low)] = math.nan  # torch may have kept its sign and payload


def _check_tensor(name: str, tensor: Tensor, param: Tensor, device: str) -> None:
    allowed = f"a contiguous tensor of shape (N,) on {device}"
    if not isinstance(tensor, Tensor):
        raise OptimizerError(f"{name}: got {type(tensor).__name__}, allowed is {allowed}")
    found = f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
    if tensor.device.type != device or tensor.device != param.device:
        raise OptimizerError(f"{found}, allowed is {allowed}, all on the same; move it there")
    if tensor.ndim != 1 or not tensor.is_contiguous():
        gaps = "" if tensor.is_contiguous() else " with gaps"
        raise OptimizerError(f"{found}{gaps}, allowed is {allowed}; pass tensor.view(-1)")
    if tensor.numel() != param.numel():
        raise OptimizerError(
            f"{found}, allowed is ({param.numel()},), the shape of param; pass pieces that match"
        )
    types = list(_TYPES) if name in ("grad", "low_precision") else [torch.float32]
    if tensor.dtype not in types:
        hint = "; pass a float32 tensor for it" if name == "keep_grad" else "; convert it"
        raise OptimizerError(f"{found}, allowed is {' or '.join(map(str, types))}{hint}")


def _check_apart(named: dict[str, Tensor]) -> None:
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in named.items()
        if tensor.numel()
    )
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise OptimizerError(
                f"{second}: got memory that overlaps that of {first}, allowed are tensors that do "
                "not overlap; pass a clone of one of them"
            )


def _float32(value: float) -> float:
    return float(np.float32(value))
