"""The scalars of one Adam update, rounded to float32 where the optimizer in charge rounds them.

Source: the order of operations is that of DeepSpeed 0.19, deepspeed/ops/csrc/includes/cpu_adam.h,
and of torch 2.13, aten/src/ATen/native/cpu/FusedAdamKernel.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowtide.core.errors import OptimizerError


class Powers:
    """The running ``beta1**t`` and ``beta2**t`` of one CPUAdam object, float32 as it holds them.

    They decide bits: a product when the step advances by one, a power (rounded once) after a jump
    or when the betas differ from the last call's, as with two parameter groups that take turns.
    A resumed run therefore begins with a power where an uninterrupted one has a product. One
    object serves all tensors of an optimizer, in the order in which they are stepped.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        """Begin at step 0 with the betas that the optimizer is made with, 0 <= beta < 1.

        Raises:
            OptimizerError: A beta is out of range.
        """
        self._betas = _betas(beta1, beta2)
        self._powers = (np.float32(1), np.float32(1))
        self._step = 0

    def advance(self, step: int, beta1: float, beta2: float) -> tuple[float, float]:
        """Return both powers at `step` (from 1); asked again for the same step, the same ones.

        Raises:
            OptimizerError: A beta or the step is out of range.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise OptimizerError(
                f"step: got {step!r}, allowed is an int from 0; pass state['step']"
            )
        betas = _betas(beta1, beta2)
        if betas == self._betas and step == self._step + 1:
            first, second = self._powers
            self._powers = (first * betas[0], second * betas[1])
        elif betas != self._betas or step != self._step:
            # In double and then rounded, as std::pow of a float and an integer.
            self._powers = (_power(betas[0], step), _power(betas[1], step))
        self._betas, self._step = betas, step
        return float(self._powers[0]), float(self._powers[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamStep:
    """The scalars of one update, each a float32 value; of `adam_step` or `torch_step`.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        one_minus_beta1: 1 - beta1 in float32.
        one_minus_beta2: 1 - beta2 in float32.
        inverse_root_bias2: 1 / sqrt(1 - beta2**t); 1 without bias correction. Torch divides by
            the root: there it is not inverted.
        eps: Added to the denominator.
        step_size: -lr / (1 - beta1**t); -lr without bias correction.
        decay: -lr * weight_decay if decoupled, weight_decay if l2, 1 - lr * weight_decay in
            torch's order, else 0.
        mode: "decoupled" (AdamW), "l2" (Adam), or "none" for a weight decay of 0, in the order of
            CPUAdam; "torch_decoupled" is AdamW in the order of torch, with any decay.
    """

    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    inverse_root_bias2: float
    eps: float
    step_size: float
    decay: float
    mode: str

    def scalars(self) -> dict[str, float]:
        """Return all attributes but the mode, by name."""
        names = [name for name in self.__dataclass_fields__ if name != "mode"]
        return {name: getattr(self, name) for name in names}


def adam_step(
    powers: tuple[float, float],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    adamw: bool = True,
) -> AdamStep:
    """Make the scalars of one update, every operation rounded to float32 as in CPUAdam.

    Args:
        powers: ``beta1**t`` and ``beta2**t``, from `Powers.advance`.
        lr: Learning rate at this step.
        betas: Decay of both moments, 0 <= beta < 1.
        eps: Added to the denominator.
        weight_decay: 0 or less: none.
        bias_correction: Whether to divide the moments by ``1 - beta**t``.
        adamw: Whether weight decay is decoupled (AdamW) or added to the gradient (Adam).

    Raises:
        OptimizerError: A beta is out of range.
    """
    one = np.float32(1)
    beta1, beta2 = _betas(*betas)
    minus_lr, decay = -np.float32(lr), np.float32(weight_decay)
    bias1, inverse_root_bias2 = one, one
    with np.errstate(all="ignore"):
        if bias_correction:
            bias1 = one - np.float32(powers[0])
            inverse_root_bias2 = one / np.sqrt(one - np.float32(powers[1]))
        step_size = minus_lr / bias1
        coupled = minus_lr * decay
    mode = "none" if not decay > 0 else "decoupled" if adamw else "l2"
    return AdamStep(
        beta1=float(beta1),
        beta2=float(beta2),
        one_minus_beta1=float(one - beta1),
        one_minus_beta2=float(one - beta2),
        inverse_root_bias2=float(inverse_root_bias2),
        eps=float(np.float32(eps)),
        step_size=float(step_size),
        decay=float({"none": np.float32(0), "decoupled": coupled, "l2": decay}[mode]),
        mode=mode,
    )


def torch_step(
    step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> AdamStep:
    """Make the scalars of one update in the order of torch's fused AdamW on a CPU.

    Torch computes in double and rounds each scalar once. It keeps no running powers, so a resumed
    run goes on with the bits of an uninterrupted one.

    Args:
        step: Number of this update, from 1.
        lr: Learning rate at this step.
        betas: Decay of both moments. From ``beta1 <= 0.5`` on torch blends the first moment in
            another order, which no kernel of ours has.
        eps: Added to the denominator.
        weight_decay: Decoupled.

    Raises:
        OptimizerError: A beta or the step is out of range.
    """
    beta1, beta2 = float(betas[0]), float(betas[1])
    if not 0.5 < beta1 < 1 or not 0 <= beta2 < 1:
        raise OptimizerError(
            f"betas: got {betas}, allowed is 0.5 < beta1 < 1 and 0 <= beta2 < 1 in torch's order"
        )
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise OptimizerError(f"step: got {step!r}, allowed is an int from 1")
    bias1, bias2 = 1 - math.pow(beta1, step), 1 - math.pow(beta2, step)
    values = {
        "beta1": beta1,
        "beta2": beta2,
        "one_minus_beta1": 1 - beta1,
        "one_minus_beta2": 1 - beta2,
        "inverse_root_bias2": math.sqrt(bias2),
        "eps": eps,
        "step_size": -(lr / bias1),
        "decay": 1 - lr * weight_decay,
    }
    with np.errstate(all="ignore"):  # infinities are results like others
        rounded = {name: float(np.float32(value)) for name, value in values.items()}
    return AdamStep(**rounded, mode="torch_decoupled")


def _betas(beta1: float, beta2: float) -> tuple[np.float32, np.float32]:
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise OptimizerError(f"{name}: got {beta}, allowed is 0 <= {name} < 1")
    return np.float32(beta1), np.float32(beta2)


def _power(beta: np.float32, step: int) -> np.float32:
    return np.float32(math.pow(float(beta), step))
