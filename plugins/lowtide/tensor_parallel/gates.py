"""Kinds of gates that a latent passes on its way into the next layer's: names and shapes, no torch.

Letters: R rank, S rank of the layer before.

Source: LaX (arXiv 2505.21732).
"""

from __future__ import annotations

from lowtide.core.errors import ConfigError, ModelError, listed, near

GATES = ("identity", "scalar", "linear", "low_rank")
"""The paper's identity and linear gates; a learned factor; a linear gate of low rank."""

GATE_SHARE = 4  # a low-rank gate has a quarter of the rank that it serves


def gate_width(rank: int) -> int:
    """Return the rank of a low-rank gate."""
    return -(-rank // GATE_SHARE)


def gate_shapes(kind: str, previous: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a gate's parameters.

    Args:
        kind: One of `GATES`.
        previous: S.
        rank: R.

    Raises:
        ConfigError: There is no such gate.
        ModelError: The gate cannot change the width, and S is not R.
    """
    if kind not in GATES:
        raise ConfigError(
            f'crossing: got "{kind}", allowed are {listed(GATES)} and null for none.'
            f"{near(kind, GATES)}"
        )
    if kind in ("identity", "scalar") and previous != rank:
        raise ModelError(
            f'crossing: a "{kind}" gate leads from rank {previous} to rank {rank}, allowed are '
            f'equal ranks; give all decoder layers one rank, or use "linear" or "low_rank"'
        )
    inner = gate_width(min(previous, rank))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "identity": {},
        "scalar": {"weight": (1,)},
        "linear": {"weight": (rank, previous)},
        "low_rank": {"down": (inner, previous), "up": (rank, inner)},
    }
    return shapes[kind]
