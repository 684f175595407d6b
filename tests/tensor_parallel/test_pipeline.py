"""Pipeline, tensor and data parallelism together against a plain loop with one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")
WORKER = str(Path(__file__).with_name("pipeline_worker.py"))
WIDTH, MICRO, LENGTH, RANK, STEPS, PARTS = 32, 2, 9, 8, 3, 2


def train(nproc: int, *scenarios: dict[str, Any]) -> list[list[Any]]:
    """Return the reports of all ranks, by scenario, and what was refused on all ranks."""
    ran = run_ranks([WORKER, json.dumps(scenarios)], nproc=nproc, timeout_s=200).check()
    return [list(each) for each in zip(*ran.results, strict=True)]


def check(reports: list[Any], *, bytes_per_token: int) -> None:
    for report in reports:
        assert report["names"]
        assert report["losses"] <= 2e-6
        assert report["norms"] <= 2e-6
        assert report["evaluation"] <= 2e-6
        assert report["parameters"] <= 2e-6
        # Outputs of the first stage, or their gradients from the last.
        assert report["sent"] == [MICRO * LENGTH * bytes_per_token] * (STEPS * PARTS)


def test_two_stages_equal_one_process() -> None:
    plain, tied, _ = train(2, {"pp": 2, "tp": 1}, {"pp": 2, "tp": 1, "zero": 1, "tied": True})
    check(plain, bytes_per_token=4 * WIDTH)
    check(tied, bytes_per_token=4 * WIDTH)


def test_stages_of_two_ranks_equal_one_process_and_others_are_refused() -> None:
    crossing = {"crossing": "linear", "activation_checkpointing": "latents"}
    plain, zero, tied, crossed, replicas, refused = train(
        4,
        {"pp": 2, "tp": 2},
        {"pp": 2, "tp": 2, "zero": 1, "saves": True},
        {"pp": 2, "tp": 2, "tied": True},
        {"pp": 2, "tp": 2, "block": crossing},
        {"pp": 2, "tp": 1, "zero": 1},
    )
    check(plain, bytes_per_token=4 * WIDTH // 2)  # half of what one rank alone would send
    check(zero, bytes_per_token=4 * WIDTH // 2)
    check(tied, bytes_per_token=4 * WIDTH // 2)
    check(crossed, bytes_per_token=4 * (WIDTH // 2 + 7 * RANK))
    check(replicas, bytes_per_token=4 * WIDTH)
    assert all(report["resumed"] == 0.0 for report in zero)
    for found in refused:
        assert "create it with lowtide.initialize" in found["stock"]
        assert "activation: got relu, but the pipeline module was made with silu" in found["other"]
        assert "2 times num_stages 3 does not divide the 4 rank(s)" in found["degree"]
        assert "num_stages may be at most 2" in found["stages"]
        assert "make it with" in found["plain"]
    assert "allowed is one integer tensor" in refused[0]["fed"]
