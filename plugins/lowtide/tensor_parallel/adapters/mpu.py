"""Groups in the form that DeepSpeed asks for: an object with ``get_..._group`` methods (mpu)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lowtide.core.errors import HostError
from lowtide.tensor_parallel.layout import Layout


class ModelParallelUnit:
    """Hand this to ``deepspeed.initialize(mpu=...)``.

    Args:
        layout: This process's groups.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @classmethod
    def from_megatron(cls) -> ModelParallelUnit:
        """Make DeepSpeed use the groups that Megatron-core has formed.

        Megatron-core's own ``parallel_state`` lacks the methods that DeepSpeed calls.

        Raises:
            HostError: Megatron-core is missing, has formed no groups, or uses pipeline
                parallelism, whose schedule belongs to one of the two alone.
        """
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise HostError(f"megatron-core cannot be imported: {error}") from error
        if not parallel_state.model_parallel_is_initialized():
            raise HostError(
                "Megatron-core has formed no groups; call "
                "parallel_state.initialize_model_parallel first"
            )
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        if stages > 1:
            raise HostError(
                f"Megatron-core has {stages} pipeline stages; DeepSpeed can use its groups only "
                f"without pipeline parallelism"
            )
        tensor = parallel_state.get_tensor_model_parallel_group()
        data = parallel_state.get_data_parallel_group()
        return cls(
            Layout(
                tensor,
                data,
                tuple(dist.get_process_group_ranks(tensor)),
                tuple(dist.get_process_group_ranks(data)),
            )
        )

    def get_model_parallel_group(self) -> Any:
        """Return the ranks that share one model."""
        return self.layout.tensor_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return self.layout.tensor_ranks.index(dist.get_rank())

    def get_model_parallel_world_size(self) -> int:
        """Return their number."""
        return len(self.layout.tensor_ranks)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Return the global rank of the first of them."""
        return self.layout.tensor_ranks[0]

    def get_data_parallel_group(self) -> Any:
        """Return the ranks that hold the same part of the model."""
        return self.layout.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return their global ranks."""
        return list(self.layout.data_ranks)

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return self.layout.data_ranks.index(dist.get_rank())

    def get_data_parallel_world_size(self) -> int:
        """Return their number."""
        return len(self.layout.data_ranks)
