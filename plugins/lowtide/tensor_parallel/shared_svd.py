"""The decompositions of a model, shared out among ranks that all end up with the same bits.

Two machines need not agree on the last bit of a singular value decomposition, nor one machine with
itself under another number of threads. So each matrix has one owner, and the others get its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowtide.core.errors import LowtideError, ModelError
from lowtide.tensor_parallel.config import round_up
from lowtide.tensor_parallel.factors import Factors, decompose, energy_rank
from lowtide.tensor_parallel.group import fingerprint
from lowtide.tensor_parallel.projection_groups import Group, Member

_PIECE = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Approximation:
    """What became of one full-rank projection.

    Attributes:
        factors: In the dtype and on the device of the weight; without biases.
        relative_error: Frobenius norm of weight minus product over that of the weight.
    """

    factors: Factors
    relative_error: float


def approximate(
    groups: Sequence[Group], *, seed: int, process_group: dist.ProcessGroup | None
) -> Iterator[list[Approximation]]:
    """Yield, for each group, one approximation per full-rank member.

    All decompositions are finished before the first result appears, so nothing of the model needs
    to be touched before it is clear that all of them succeed.

    Args:
        groups: The same on all ranks.
        seed: Of surplus rows, see `Decomposition.factors`.
        process_group: Its ranks share the work; None does all of it here. Every rank has to
            take all results.

    Raises:
        ModelError: A weight holds NaN, or a decomposition does not converge or fit into memory,
            on this or on another rank.
    """
    ranks, me = _size(process_group)
    owners = share_out([_cost(group) for group in groups], ranks)
    own: dict[int, list[Approximation]] = {}
    problem = None
    try:
        for index, group in enumerate(groups):
            if owners[index] == me:
                own[index] = _approximate(group, seed, process_group)
    except (LowtideError, RuntimeError) as error:  # of torch: no convergence, no memory
        problem = str(error)
    facts = {
        i: [(each.factors.rank, each.relative_error) for each in found] for i, found in own.items()
    }
    gathered = _gather((problem, facts), process_group)
    problems = [text for text, _ in gathered if text is not None]
    if problems:
        raise ModelError(f"the model cannot be factorised: {problems[0]}")
    for index, group in enumerate(groups):
        owner = owners[index]
        if process_group is None:
            yield own.pop(index)
            continue
        yield [
            Approximation(
                _send(member, own[index][i].factors if owner == me else None, rank, owner,
                      process_group),
                relative_error,
            )
            for i, (member, (rank, relative_error)) in enumerate(
                zip(group.full_members, gathered[owner][1][index], strict=True)
            )
        ]  # fmt: skip
        own.pop(index, None)


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """Return an owner for each piece of work: the most costly first, each to the least loaded."""
    owners = [0] * len(costs)
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def check_same_model(model: nn.Module, process_group: dist.ProcessGroup) -> None:
    """Compare checksums of all parameters among the ranks of a group.

    Raises:
        ModelError: Names or bits of parameters differ; on all ranks alike.
    """
    sums = {name: _checksum(each.detach()) for name, each in model.named_parameters()}
    for rank, other in enumerate(_gather(sums, process_group)):
        first = _first_difference(other, sums)
        if first is not None:
            raise ModelError(
                f"{first}: differs between this rank and rank {rank} of its group; give every "
                f"rank the same weights: set the same seed before the model is built, or load "
                f"the same checkpoint"
            )


def _cost(group: Group) -> int:
    return sum(
        m.in_features * m.out_features * min(m.in_features, m.out_features)
        for m in group.full_members
    )


def _approximate(
    group: Group, seed: int, process_group: dist.ProcessGroup | None
) -> list[Approximation]:
    weights = [_on_work_device(m.module.weight, process_group) for m in group.full_members]
    found = [
        decompose(weight, member.path)
        for weight, member in zip(weights, group.full_members, strict=True)
    ]
    rank = group.rank
    if rank is None and found:
        needed = max(energy_rank(each.values, float(group.energy or 1.0)) for each in found)
        rank = round_up(needed, group.limit)
    results = []
    for weight, each, member in zip(weights, found, group.full_members, strict=True):
        factors = each.factors(int(rank or 0), seed=seed, name=member.path)
        error = _relative_error(weight, factors)
        place = member.module.weight.device
        moved = Factors(down=factors.down.to(place), up=factors.up.to(place))
        results.append(Approximation(moved, error))
    return results


def _relative_error(weight: Tensor, factors: Factors) -> float:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = weight.to(wide)
    size = float(torch.linalg.matrix_norm(matrix))
    left = matrix - factors.up.to(wide) @ factors.down.to(wide)
    return float(torch.linalg.matrix_norm(left)) / size if size > 0 else 0.0


def _on_work_device(weight: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Return `weight` where its group can send it from: NCCL sends from GPUs only."""
    weight = weight.detach()
    if process_group is not None and dist.get_backend(process_group) == "nccl":
        return weight.to("cuda")
    return weight


def _send(
    member: Member, mine: Factors | None, rank: int, owner: int, process_group: dist.ProcessGroup
) -> Factors:
    """Return the owner's factors on every rank."""
    weight = member.module.weight

    def sent(tensor: Tensor | None, *shape: int) -> Tensor:
        buffer = weight.new_empty(shape) if tensor is None else tensor.contiguous()
        buffer = _on_work_device(buffer, process_group)
        dist.broadcast(buffer, dist.get_global_rank(process_group, owner), group=process_group)
        return buffer.to(weight.device)

    return Factors(
        down=sent(None if mine is None else mine.down, rank, member.in_features),
        up=sent(None if mine is None else mine.up, member.out_features, rank),
    )


def _size(process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    if process_group is None:
        return 1, 0
    return dist.get_world_size(process_group), dist.get_rank(process_group)


def _gather(value: Any, process_group: dist.ProcessGroup | None) -> list[Any]:
    if process_group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, value, group=process_group)
    return gathered


def _checksum(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Return shape and fingerprint of the bits: whole numbers, alike in any order of summing."""
    if tensor.is_meta:
        return tuple(tensor.shape), 0
    bits = tensor.contiguous().flatten().view(_BITS[tensor.element_size()])
    pieces = bits.split(_PIECE)  # a fingerprint takes several times its input's memory
    prints = torch.stack([fingerprint(piece) for piece in pieces]) if pieces else bits
    return tuple(tensor.shape), int(fingerprint(prints))


def _first_difference(other: dict[str, Any], sums: dict[str, Any]) -> str | None:
    """Return the first name in which two sets of checksums differ, or None."""
    names = [*sums, *(name for name in other if name not in sums)]
    return next((name for name in names if other.get(name) != sums.get(name)), None)
