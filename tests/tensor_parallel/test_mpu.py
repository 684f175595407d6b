"""DeepSpeed and Megatron-core agree on groups: TP 2 on 2 ranks, TP 2 x DP 2 on 4."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytest.importorskip("megatron.core.package_info")

pytestmark = pytest.mark.dist
DEGREE = 2


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    argv = ["tests/tensor_parallel/mpu_worker.py", str(DEGREE)]
    return run_ranks(argv, nproc=request.param, timeout_s=200).check().results


def test_training_on_megatrons_groups_is_the_training_without_megatron(
    ranks: list[dict[str, Any]],
) -> None:
    for facts in ranks:
        own, megatron = facts["own"], facts["megatron"]
        assert megatron["losses"] == own["losses"]
        assert megatron["norms"] == own["norms"]
        assert len(set(own["losses"])) == 4
        assert megatron["is_ours"]
        assert not own["is_ours"]


def test_groups_of_the_engine_are_megatrons(ranks: list[dict[str, Any]]) -> None:
    data_size = len(ranks) // DEGREE
    for rank, facts in enumerate(ranks):
        for key in ("tensor_ranks", "data_ranks"):
            assert facts["megatron"][key] == facts["theirs"][key]
        assert facts["places"] == facts["theirs"]["places"]
        assert facts["theirs"]["places"][1::2] == [DEGREE, data_size]
        assert rank in facts["theirs"]["tensor_ranks"]
    # Ranks of one data group read different tokens.
    losses = {tuple(facts["megatron"]["losses"]) for facts in ranks}
    assert len(losses) == data_size


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        ("none", ["HostError", "formed no groups", "initialize_model_parallel first"]),
        ("pipeline", ["HostError", "pipeline stages", "without pipeline parallelism"]),
        ("degree", ["ConfigError", "lowtide.tensor_parallel.degree: got 1", "mpu", "2 model"]),
    ],
)
def test_groups_that_cannot_be_used_are_refused(
    ranks: list[dict[str, Any]], attempt: str, parts: list[str]
) -> None:
    for facts in ranks:
        for part in parts:
            assert part in facts[attempt]
