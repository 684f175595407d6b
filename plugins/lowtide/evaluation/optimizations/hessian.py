"""Column-by-column change of a weight with compensation, shared by GPTQ and SparseGPT.

Both go through the inputs of a linear layer in order. What changing a column costs the output is
made up for, as far as possible, by the columns that come after it (Optimal Brain Surgeon).

Letters: O outputs, I inputs.

Sources: Frantar et al., GPTQ (2210.17323), Sec. 3.3 "Cholesky reformulation"; Frantar and
Alistarh, SparseGPT (2301.00774), Sec. 3.2-3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowtide.core.errors import ModelError

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it (GPTQ, Sec. 3.3)."""


def inverse_factor(gram: Tensor, *, damping: float = DAMPING) -> Tensor:
    """Return upper triangular U with U^T U = inverse of the damped Hessian, (I, I) float64.

    Row i of U, from i on, divided by U[i, i], is the row of the inverse of what is left of the
    Hessian when inputs 0 .. i-1 are out, which is what the compensation needs.

    Raises:
        ModelError: The Hessian has no inverse also with damping.
    """
    dead = gram.diagonal() == 0  # inputs that were always 0: any value does
    hessian = gram.clone()
    hessian[dead, dead] = 1.0
    hessian.diagonal().add_(damping * float(gram.diagonal().mean()))
    inverse, failed = torch.linalg.inv_ex(hessian)
    factor, not_positive = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed) or int(not_positive):
        raise ModelError(
            f"the Hessian of {gram.shape[0]} inputs has no inverse with damping {damping}: the "
            f"calibration tokens say too little; give more of them"
        )
    return factor


def sweep(
    weight: Tensor,
    factor: Tensor,
    change: Callable[[int, Tensor], Tensor],
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Change every column in turn, and compensate in the columns after it.

    Args:
        weight: (O, I) float64; left as it is.
        factor: Of `inverse_factor`.
        change: Given a column's number and the weight as it is by then, (O, I), returns what the
            column becomes, (O,).
        mask: Weights that stay 0 whatever is compensated, False there; (O, I).

    Returns:
        The changed weight, (O, I) float64.
    """
    left = weight.clone()
    done = torch.empty_like(left)
    for column in range(weight.shape[1]):
        done[:, column] = change(column, left)
        error = (left[:, column] - done[:, column]) / factor[column, column]
        left[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
        if mask is not None:
            left[:, column + 1 :] *= mask[:, column + 1 :]
    return done
