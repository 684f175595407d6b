"""Distributed checkpoints of Megatron-core (``megatron.core.dist_checkpointing``).

Projections that are one parameter here are saved one by one, under the names of whole tensors and
with their place in them, so a checkpoint does not depend on the number of tensor-parallel ranks,
and the optimizer's states, which go by the same rules, do not either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.layers import Part
from lowtide.tensor_parallel.sharding import sharded_parameters


def sharded_state_dict(
    layer: nn.Module,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
    tensor_group: Any,
) -> dict[str, Any]:
    """Return ShardedTensors, and factories of them, by the names of the layer's state dict.

    Args:
        layer: Holds `Sharded` modules and no other parameters.
        prefix: Of the names.
        sharded_offsets: (axis, place, count) of axes that stand before a tensor's own: layers.
        metadata: Megatron-core's; its ``dp_cp_group`` names the replicas.
        tensor_group: The tensor-parallel process group.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import get_pg_rank

    data_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    replica = get_pg_rank(data_group)
    result: dict[str, Any] = {}
    for name, parts in sharded_parameters(layer):
        # Of a tensor that is whole on every rank, only one copy is written.
        copy = 0 if parts[0].dim is not None else get_pg_rank(tensor_group)
        maker = _Maker(name, parts, sharded_offsets, tensor_group)
        parameter, replica_id = layer.get_parameter(name), (0, copy, replica)
        if len(parts) == 1:
            key = prefix + parts[0].name
            result[prefix + name] = maker.make(key, parameter, parts[0], replica_id)
        else:
            result[prefix + name] = ShardedTensorFactory(
                prefix + name, parameter, maker.split, maker.join, replica_id
            )
    return result


class _Maker:
    """Says what one parameter is in a checkpoint.

    Args:
        name: In the layer's state dict.
        parts: What the parameter is made of.
        offsets: See `sharded_state_dict`.
        tensor_group: The tensor-parallel process group.
    """

    def __init__(
        self,
        name: str,
        parts: tuple[Part, ...],
        offsets: tuple[tuple[int, int, int], ...],
        tensor_group: Any,
    ) -> None:
        self.name = name
        self.parts = parts
        self.offsets = offsets
        self.tensor_group = tensor_group

    def make(self, key: str, data: Tensor, part: Part, replica_id: tuple[int, int, int]) -> Any:
        """Return the ShardedTensor of one projection."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
        from megatron.core.utils import get_pg_rank, get_pg_size

        own = []
        if part.dim is not None:
            rank, size = get_pg_rank(self.tensor_group), get_pg_size(self.tensor_group)
            own.append((part.dim + len(self.offsets), rank, size))
        return ShardedTensor.from_rank_offsets(
            key, data, *self.offsets, *own,
            replica_id=replica_id, prepend_axis_num=len(self.offsets),
        )  # fmt: skip

    @torch.no_grad()
    def split(
        self, key: str, data: Tensor, replica_id: tuple[int, int, int], flattened: slice | None
    ) -> list[Any]:
        """Return the ShardedTensors of a parameter or of an optimizer's state for it.

        Args:
            key: Ends with the parameter's name; Megatron-core changes what is before it.
            data: Of the parameter's shape.
            replica_id: Of a copy.
            flattened: A range of a flattened tensor; must be None.

        Raises:
            ModelError: it is not.
        """
        if flattened is not None:
            raise ModelError(
                f"{key}: a flat range of a parameter that joins projections cannot be taken apart; "
                f'set metadata["distrib_optim_sharding_type"] to "fully_reshardable"'
            )
        before = key.removesuffix(self.name)
        return [
            self.make(before + part.name, data[part.rows].contiguous(), part, replica_id)
            for part in self.parts
        ]

    @staticmethod
    def join(loaded: list[Tensor]) -> Tensor:
        """Undo `split`."""
        return torch.cat(loaded)
