"""In a Megatron-core loop, pipeline and data parallel: one start of 2 ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytest.importorskip("megatron.core.package_info")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    arguments = ["-m", "tests.compression.activations.megatron_worker"]
    return run_ranks(arguments, timeout_s=180).check().results


@pytest.mark.parametrize("mode", ["pipeline", "data"])
def test_training_goes_as_in_stock_with_less_held(ranks: list[dict[str, Any]], mode: str) -> None:
    for facts in ranks:
        case = facts[mode]
        for bits in ("8", "4"):
            run = case[bits]
            assert run["losses"][:1] == case["stock"][:1]
            assert run["losses"] == pytest.approx(case["stock"], rel=0.02)
            assert run["facts"]["packed"] >= 10
            assert run["facts"]["live_bytes"] == 0
            assert run["facts"]["ratio"] > 1.5
            # Softmax of attention, and of the loss on the last stage.
            assert run["facts"]["raw"]["exact"] >= 1
        assert 0 < case["8"]["gradients"] < 0.02
        assert 5 * case["8"]["gradients"] < case["4"]["gradients"] < 0.3
