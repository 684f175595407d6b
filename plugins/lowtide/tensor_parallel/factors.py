"""The two factors of a low-rank linear map, and how to get them from a full matrix or a seed.

Shape letters: I input width, O output width, R rank, N = min(I, O) singular values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.bottleneck import initial_std


@dataclass(frozen=True, kw_only=True)
class Factors:
    """``y = up act(down x + down_bias) + up_bias``.

    Attributes:
        down: A, shape (R, I).
        up: B, shape (O, R).
        down_bias: Shape (R,), or None.
        up_bias: Shape (O,), or None.
        activation: Name from `bottleneck.ACTIVATIONS`, or None for the identity.

    Raises:
        ModelError: The shapes do not belong together.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            raise ModelError(
                f"low-rank factors: down has shape {down} and up {up}, allowed are (rank, inputs) "
                f"and (outputs, rank)"
            )
        for name, bias, size in (
            ("down_bias", self.down_bias, down[0]),
            ("up_bias", self.up_bias, up[0]),
        ):
            if bias is not None and tuple(bias.shape) != (size,):
                raise ModelError(
                    f"low-rank factors: {name} has shape {tuple(bias.shape)}, allowed is ({size},)"
                )

    @property
    def in_features(self) -> int:
        """Input width I."""
        return self.down.shape[1]

    @property
    def rank(self) -> int:
        """Rank R."""
        return self.down.shape[0]

    @property
    def out_features(self) -> int:
        """Output width O."""
        return self.up.shape[0]


@dataclass(frozen=True)
class Decomposition:
    """A thin singular value decomposition with decided signs.

    Attributes:
        left: U, shape (O, N).
        values: Singular values, descending, shape (N,).
        right: V transposed, shape (N, I).
        dtype: Of the matrix; factors get it back.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    dtype: torch.dtype

    def factors(self, rank: int, *, seed: int = 0, name: str = "") -> Factors:
        """Return the factors of the best approximation of rank `rank`: U sqrt(S), sqrt(S) V^T.

        Where `rank` exceeds N, the rows left over in ``down`` are random, orthonormal to the
        others and of their mean length, and their columns in ``up`` are zero: the product stays
        what it is, and training can use them.

        Args:
            rank: From 1 to I.
            seed: Of the rows left over.
            name: Of the matrix, mixed into `seed`.

        Raises:
            ModelError: `rank` is below 1 or above I.
        """
        inputs = self.right.shape[1]
        if not 1 <= rank <= inputs:
            raise ModelError(
                f"{name or 'svd_factors'}: rank {rank} of a matrix with {inputs} inputs, allowed "
                f"is 1 to {inputs}"
            )
        root = self.values[:rank].sqrt()
        up = self.left[:, :rank] * root
        down = root[:, None] * self.right[:rank]
        surplus = rank - len(root)
        if surplus > 0:
            rows = _orthonormal_rows(self.right, surplus, seeded_generator(seed, f"{name}.surplus"))
            length = root.mean()
            down = torch.cat([down, rows * torch.where(length > 0, length, 1.0)])
            up = torch.cat([up, up.new_zeros(up.shape[0], surplus)], dim=1)
        return Factors(down=down.to(self.dtype), up=up.to(self.dtype))


def decompose(weight: Tensor, name: str = "") -> Decomposition:
    """Return the thin singular value decomposition of `weight`.

    In float64 for float64, else in float32. Of each pair of singular vectors, the left one's
    largest entry is positive.

    Args:
        weight: Shape (O, I), any floating dtype.
        name: Of the matrix, for messages.

    Raises:
        ModelError: `weight` is no floating matrix with values, or holds NaN or infinity.
    """
    where = name or "svd_factors"
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ModelError(
            f"{where}: got shape {tuple(weight.shape)} of {weight.dtype}, allowed is a matrix of "
            f"floating-point numbers"
        )
    if weight.is_meta:
        raise ModelError(f"{where}: is on the meta device and has no values; load weights first")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = weight.detach().to(wide)
    if not bool(matrix.isfinite().all()):
        raise ModelError(f"{where}: holds NaN or infinity; load sound weights first")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    pivots = left.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(left.gather(0, pivots) < 0, -1.0, 1.0).to(wide)  # (1, N)
    return Decomposition(left * signs, values, right * signs.mT, weight.dtype)


def svd_factors(weight: Tensor, rank: int, *, seed: int = 0, name: str = "") -> Factors:
    """Return the factors of the best approximation of `weight` with rank `rank`.

    Args:
        weight: Shape (O, I).
        rank: From 1 to I; see `Decomposition.factors` for ranks above min(O, I).
        seed: See there.
        name: Of the matrix, for messages and mixed into `seed`.

    Returns:
        ``down`` (R, I) and ``up`` (O, R) in the dtype and on the device of `weight`.

    Raises:
        ModelError: See `decompose` and `Decomposition.factors`.
    """
    return decompose(weight, name).factors(rank, seed=seed, name=name)


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps a share of the squared singular values.

    Args:
        singular_values: Descending, shape (N,).
        energy: Share to keep, above 0 and at most 1.

    Returns:
        From 1 to N; 1 where all singular values are zero.
    """
    sums = singular_values.double().square().cumsum(0)
    # First index whose sum reaches the wanted share.
    index = int(torch.searchsorted(sums, energy * sums[-1]))
    return min(index + 1, len(sums))


def random_factors(
    in_features: int,
    rank: int,
    out_features: int,
    *,
    seed: int,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Factors:
    """Return random factors with CoLA's standard deviation.

    They depend on `seed` and `name` alone: not on the process, on how many there are, or on what
    was drawn before.

    Args:
        in_features: I of the whole layer.
        rank: R.
        out_features: O of the whole layer.
        seed: Of the model.
        name: Global name of the module; its factors are ``<name>.down.weight`` and
            ``<name>.up.weight``.
        dtype: Of the result. Draws are made in float32 and rounded.
        device: Of the result. Draws are made on the CPU.
    """
    std = initial_std(in_features, rank, out_features)

    def draw(part: str, *shape: int) -> Tensor:
        generator = seeded_generator(seed, f"{name}.{part}.weight")
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return (drawn * std).to(device=device, dtype=dtype or torch.get_default_dtype())

    return Factors(down=draw("down", rank, in_features), up=draw("up", out_features, rank))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `seed` and `name`, alike in every process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


def _orthonormal_rows(rows_NI: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random rows, orthonormal to each other and to the orthonormal `rows_NI`."""
    drawn = torch.randn(count, rows_NI.shape[1], generator=generator, dtype=torch.float32)
    drawn = drawn.to(rows_NI)
    for _ in range(2):  # the second pass removes what rounding left of the first
        drawn = drawn - drawn @ rows_NI.mT @ rows_NI
    orthonormal, _ = torch.linalg.qr(drawn.mT)  # (I, count)
    return orthonormal.mT
