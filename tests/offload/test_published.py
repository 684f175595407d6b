"""The lane model against the curves that the authors of Deep Optimizer States published."""

from __future__ import annotations

import pytest

from benchmarks.offload_published import FITTED, HELD_OUT, STRIDES, THROUGHPUT, fit
from lowtide.core.native import status


@pytest.mark.skipif(not status().available, reason="minutes without native code")
@pytest.mark.parametrize(("name", "allowed"), [("H100", 0.05), ("A100", 0.07)])
def test_held_out_strides_are_predicted(name: str, allowed: float) -> None:
    found = fit(name)
    assert found.mean_error(HELD_OUT) <= allowed
    assert found.mean_error(FITTED) <= allowed
    for row in found.rows:
        assert row.predicted[0] == pytest.approx(row.published[0], rel=1e-3)  # stock fits exactly


def test_held_out_strides_are_not_fitted() -> None:
    assert not set(FITTED) & set(HELD_OUT)
    assert set(FITTED) | set(HELD_OUT) | {0} == set(STRIDES)
    rows = [row for machine in THROUGHPUT.values() for row in machine.values()]
    assert len(rows) == 6
    assert all(len(row) == len(STRIDES) for row in rows)
