"""Through the DeepSpeed JSON on 2 ranks: losses bit for bit, one decision for all ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist
CASES = ["0 fp32", "1 bf16", "2 fp32", "3 fp32"]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(["-m", "tests.quality.deepspeed_worker"], timeout_s=240).check().results


def test_nothing_is_imported_when_it_is_off(ranks: list[dict[str, Any]]) -> None:
    assert [facts["is_imported_when_off"] for facts in ranks] == [False, False]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_stock(ranks: list[dict[str, Any]], case: str) -> None:
    for facts in ranks:
        assert facts["quality"][case]["losses"] == facts["stock"][case]["losses"]
        assert facts["quality"][case]["rng"] == facts["stock"][case]["rng"]
    assert ranks[0]["stock"][case]["losses"] != ranks[1]["stock"][case]["losses"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_and_only_the_first_measures(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (facts["quality"][case] for facts in ranks)
    assert first["kinds"] == second["kinds"]
    assert first["newest"] == second["newest"]
    assert first["failed"] == 0
    assert first["counters"]["lowtide.quality.decisions_count"] > 0
    assert "lowtide.quality.decisions_count" not in second["counters"]
    assert first["looks"] == first["counters"]["lowtide.quality.decisions_count"]
    assert second["looks"] == 0


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("0 fp32", {"parameters", "gradients", "moments", "activations"}),
        # ZeRO keeps gradients in parts of its own, and under stage 3 parameters too.
        ("1 bf16", {"parameters", "moments", "activations"}),
        ("2 fp32", {"parameters", "moments", "activations"}),
        ("3 fp32", {"moments", "activations"}),
    ],
)
def test_what_lies_here_is_looked_at(
    ranks: list[dict[str, Any]], case: str, expected: set[str]
) -> None:
    kinds = ranks[0]["quality"][case]["kinds"]
    assert set(kinds) == expected
    for kind, totals in kinds.items():
        assert totals["compression_ratio"] > 1.2, kind
        assert totals["newest_step"] == 4, kind
