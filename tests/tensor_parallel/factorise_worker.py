"""Run on 2 ranks by test_factorise.py: a shared factorisation, with marks of who did what."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from lowtide.core.errors import LowtideError
from lowtide.tensor_parallel import shared_svd
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.factorisation import factorise
from lowtide.tensor_parallel.factors import Decomposition, decompose
from tests.helpers.ranks import leave_result
from tests.tensor_parallel.models import hugging_face

CASES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 16},
    "energy": {"energy": 0.6},
    "random": {"rank": 16, "init": "random", "seed": 5},
    "bfloat16": {"rank_ratio": 0.5},
}


def digest(model: Any) -> str:
    """Return a hash of all names and bits of a model."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(case: str, rank: int, calls: Counter[int]) -> dict[str, Any]:
    """Factorise one model; return what this rank ended up with."""
    model = hugging_face("qwen2")
    if case == "bfloat16":
        model.to(torch.bfloat16)
    calls.clear()
    settings = TensorParallelConfig(degree=2, **CASES[case])
    report = factorise(model, settings, group=dist.group.WORLD)
    return {"digest": digest(model), "report": report.as_dict(), "calls": calls[rank]}


def failure(model: Any) -> str:
    """Factorise a model that cannot be; return the message and whether it is untouched."""
    before = digest(model)
    try:
        factorise(model, TensorParallelConfig(degree=2, rank=16), group=dist.group.WORLD)
    except LowtideError as error:
        assert digest(model) == before
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    calls: Counter[int] = Counter()

    def marked(weight: Any, name: str = "") -> Decomposition:
        """Decompose, with signs on rank 1 as another machine might have them."""
        calls[rank] += 1
        found = decompose(weight, name)
        sign = -1.0 if rank == 1 else 1.0
        return Decomposition(found.left * sign, found.values, found.right * sign, found.dtype)

    shared_svd.decompose = marked  # type: ignore[attr-defined]
    results: dict[str, Any] = {case: run(case, rank, calls) for case in CASES}
    results["other weights"] = failure(hugging_face("qwen2", seed=rank))
    broken = hugging_face("qwen2")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    results["nan"] = failure(broken)
    leave_result(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
