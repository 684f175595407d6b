"""Families whose norms are LayerNorm, or whose heads turn in part, on 2 ranks, in float64.

The oracle is the Hugging Face model itself: at full rank the converted one computes the same.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

EXACT = 1e-12
pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@functools.cache
def results() -> list[dict[str, Any]]:
    pytest.importorskip("transformers")
    argv = ["-m", "tests.tensor_parallel.families_worker", "olmo", "stablelm"]
    return run_ranks(argv, nproc=2, timeout_s=240).check().results


@pytest.mark.parametrize("variant", ["", ", overlap"])
@pytest.mark.parametrize("family", ["olmo", "stablelm"])
def test_a_converted_model_computes_what_it_did(family: str, variant: str) -> None:
    expected = {"loss", "embedding", "export", "logits", "generated"}
    if family == "stablelm":
        expected |= {"weight", "bias"}
    for of_rank in results():
        found = dict(of_rank[f"{family}{variant}"])
        assert set(found) == expected
        assert found.pop("export")
        assert found.pop("generated")
        assert {name: error for name, error in found.items() if not error <= EXACT} == {}
