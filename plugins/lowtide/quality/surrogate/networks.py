"""Stage 2: a few small networks for each codec, mixtures of experts or dense.

An ensemble of members. Each member is a linear map plus, weighted by a gate that looks at the
embedding and at how far the array is from what was trained on, the outputs of its experts (Jacobs
et al., 1991). With one expert it is dense. The gate never sees a step's number. A term of the loss
keeps all experts in use (Shazeer et al., 2017).

Trained with torch, evaluated with numpy: a few matrices of 64 by 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lowtide.core.errors import DataError, listed

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[np.float32]]

_PARTS = (
    "w1", "b1", "w2", "b2", "w3", "b3", "skip", "gate", "gate_bias", "target_mean", "target_scale",
)  # fmt: skip
_BALANCE = 0.01
_BATCH = 128


@dataclass(frozen=True)
class Shape:
    """How large heads are, and how long they learn.

    Attributes:
        members: Of the ensemble.
        experts: Of each member; 1 is dense.
        width: Of both hidden layers of an expert.
        steps: Of the optimizer.
    """

    members: int = 3
    experts: int = 1
    width: int = 64
    steps: int = 700

    def parameters(self, inputs: int, gates: int, outputs: int) -> int:
        """Return how many numbers one head learns."""
        h = self.width
        expert = (inputs + 1) * h + (h + 1) * h + (h + 1) * outputs
        gate = (gates + 1) * self.experts if self.experts > 1 else 0
        return self.members * (self.experts * expert + gate + inputs * outputs)


DENSE = Shape()
EXPERTS = Shape(experts=4, width=22)  # as many parameters as DENSE, to 3 %


@dataclass(frozen=True)
class Networks:
    """A trained head.

    Attributes:
        arrays: Parameters by name, float32; the first axis is the member.
    """

    arrays: Arrays

    def __post_init__(self) -> None:
        missing = {*_PARTS} - {*self.arrays}
        if missing:
            raise DataError(f"networks without {listed(missing)}; fit the surrogate anew")

    def predict(self, x: Floats, gates: Floats) -> Floats:
        """Return outputs, mean over members.

        Args:
            x: Standardised inputs, shape (rows, inputs).
            gates: What the gate sees, shape (rows, gate inputs).

        Returns:
            float64, shape (rows, outputs).
        """
        p = self.arrays
        x32 = x.astype(np.float32)
        y = x32[None, None]
        for layer in (1, 2):
            y = _silu(y @ p[f"w{layer}"] + p[f"b{layer}"])
        y = y @ p["w3"] + p["b3"]  # (members, experts, rows, outputs)
        shares = self._shares(gates)  # (members, rows, experts)
        mixed = np.einsum("kero,kre->kro", y, shares) + x32[None] @ p["skip"]
        result = mixed.mean(axis=0) * p["target_scale"] + p["target_mean"]
        return np.asarray(result, np.float64)

    def utilisation(self, gates: Floats) -> list[float]:
        """Return how much each expert is used on some rows, mean over members; sums to 1.

        Experts are sorted by it within each member, as their numbers mean nothing.
        """
        shares = np.sort(self._shares(gates).mean(axis=1), axis=1)[:, ::-1]
        return [float(each) for each in shares.mean(axis=0)]

    def _shares(self, gates: Floats) -> NDArray[np.float32]:
        p = self.arrays
        if p["w1"].shape[1] == 1:
            return np.ones((len(p["w1"]), len(gates), 1), np.float32)
        logits = gates.astype(np.float32)[None] @ p["gate"] + p["gate_bias"]
        powers = np.exp(logits - logits.max(axis=2, keepdims=True))
        return np.asarray(powers / powers.sum(axis=2, keepdims=True))


def trained(x: Floats, gates: Floats, targets: Floats, shape: Shape, *, seed: int) -> Networks:
    """Return a head that learned rows; targets that are NaN are left out.

    Args:
        x: Standardised inputs, shape (rows, inputs).
        gates: What the gate sees, shape (rows, gate inputs).
        targets: Shape (rows, outputs).
        shape: How large, and how long.
        seed: Of first values and of batches.
    """
    centre, scale = target_scales(targets)
    z = torch.from_numpy(x.astype(np.float32))
    g = torch.from_numpy(gates.astype(np.float32))
    is_known = torch.from_numpy(np.isfinite(targets))
    wanted = torch.from_numpy(np.nan_to_num((targets - centre) / scale).astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    parameters = _initial(x.shape[1], gates.shape[1], targets.shape[1], shape, generator)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=shape.steps)
    size = min(_BATCH, len(x))
    for _ in range(shape.steps):
        rows = torch.randint(len(x), (shape.members, size), generator=generator)
        outputs, shares = _forward(parameters, z[rows], g[rows])
        errors = functional.smooth_l1_loss(outputs, wanted[rows], beta=0.3, reduction="none")
        loss = (errors * is_known[rows]).sum() / size
        if shape.experts > 1:
            loss = loss + _BALANCE * shape.experts * shares.mean(1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    arrays = {name: value.detach().numpy() for name, value in parameters.items()}
    arrays["target_mean"] = centre.astype(np.float32)
    arrays["target_scale"] = scale.astype(np.float32)
    return Networks(arrays)


def target_scales(targets: Floats) -> tuple[Floats, Floats]:
    """Return mean and deviation of each column, NaNs left out; 0 and 1 where all are NaN."""
    is_known = np.isfinite(targets)
    counts = np.maximum(is_known.sum(axis=0), 1)
    filled = np.where(is_known, targets, 0.0)
    centre = filled.sum(axis=0) / counts
    spread = np.sqrt((np.where(is_known, targets - centre, 0.0) ** 2).sum(axis=0) / counts)
    return centre, np.where(spread > 1e-6, spread, 1.0)


def _initial(
    inputs: int, gates: int, outputs: int, shape: Shape, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    k, e, h = shape.members, shape.experts, shape.width
    sizes = {
        "w1": (k, e, inputs, h), "b1": (k, e, 1, h), "w2": (k, e, h, h), "b2": (k, e, 1, h),
        "w3": (k, e, h, outputs), "b3": (k, e, 1, outputs), "skip": (k, inputs, outputs),
        "gate": (k, gates, e), "gate_bias": (k, 1, e),
    }  # fmt: skip
    found = {}
    for name, size in sizes.items():
        values = torch.zeros(size)
        if name.startswith("w") or name == "gate":
            values = torch.randn(size, generator=generator) * (1 / size[-2]) ** 0.5
        found[name] = values.requires_grad_()
    return found


def _forward(p: dict[str, torch.Tensor], x: Any, gates: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y = x[:, None]  # (members, 1, rows, inputs)
    for layer in (1, 2):
        y = functional.silu(y @ p[f"w{layer}"] + p[f"b{layer}"])
    y = y @ p["w3"] + p["b3"]
    shares = (gates @ p["gate"] + p["gate_bias"]).softmax(-1)
    mixed = torch.einsum("kero,kre->kro", y, shares) + x @ p["skip"]
    return mixed, shares


def _silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))
