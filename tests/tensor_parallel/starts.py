"""One start of 2 and one of 4 ranks, shared by all tests of the sharded layers."""

from __future__ import annotations

import functools
from typing import Any

from lowtide.tensor_parallel.group import TensorGroup
from tests.helpers.ranks import run_ranks
from tests.tensor_parallel import scenarios
from tests.tensor_parallel.reference import registered


@functools.cache
def results(nproc: int) -> list[dict[str, Any]]:
    """Return what each rank found. One rank runs in this process."""
    if nproc == 1:
        with registered():
            return [{name: run(TensorGroup()) for name, run in scenarios.of_size(1).items()}]
    argv = ["-m", "tests.tensor_parallel.worker"]
    return run_ranks(argv, nproc=nproc, timeout_s=500).check().results


def of_each(nproc: int, scenario: str) -> list[Any]:
    """Return what each rank found in one scenario."""
    return [facts[scenario] for facts in results(nproc)]
