"""Moments in ``lowtide.sz``: small, within the bound, and everything else exact."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.checkpoint import verify
from lowtide.checkpoint.compact.copies import CompactConfig, beside, expand
from lowtide.core.config import load_block, resolve
from tests.checkpoint.small_copies import (
    NAME,
    adam,
    checkpoint,
    encodings,
    moments,
    role,
    shrink,
)

REL = {"id": "lowtide.sz", "mode": "rel", "bound": 1e-4}
EACH = {"id": "lowtide.sz", "mode": "pw_rel", "bound": 2.0**-7}
BLOCK_BYTES = 1 << 20


def assert_within(before: torch.Tensor, after: torch.Tensor, spec: dict[str, Any]) -> None:
    """Assert the bound in each block by itself, to the last bit."""
    block = BLOCK_BYTES // before.element_size()
    for begin in range(0, len(before), block):
        x, y = (side[begin : begin + block].double().numpy() for side in (before, after))
        error = np.abs(y - x)  # exact for numbers that are this near
        if spec["mode"] == "rel":
            limit = Fraction(spec["bound"]) * (Fraction(float(x.max())) - Fraction(float(x.min())))
            assert 0 < Fraction(float(error.max())) <= limit
        else:
            assert error.max() > 0
            assert (error <= spec["bound"] * np.abs(x)).all()


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [
        (torch.float32, REL),
        (torch.float32, EACH),
        (torch.bfloat16, {**REL, "bound": 2.0**-7}),
        (torch.bfloat16, {**EACH, "bound": 2.0**-4}),
    ],
    ids=str,
)
def test_moments_are_small_and_within_the_bound(
    tmp_path: Path, dtype: torch.dtype, spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(dtype=dtype)})
    with caplog.at_level(logging.WARNING, "lowtide"):
        small = shrink(original, tmp_path / "slow" / "step1", moments=spec)
    assert not [r for r in caplog.records if "second moments" not in r.getMessage()]
    expand(small, tmp_path / "again", find_base=beside(small))
    assert verify(tmp_path / "again").is_ok
    before, after = moments(original), moments(tmp_path / "again")
    is_each = spec["mode"] == "pw_rel"
    for number, name in enumerate(("moment", "second moment")):
        record = role(small, name)
        if number == 0 or is_each:
            assert encodings(record) == {"lossy"}
            assert sum(block.length for block in record.blocks) < 0.7 * record.size_bytes
            assert_within(before[number], after[number], spec)
        else:  # only a bound relative to each value is safe for it
            assert encodings(record) == {"codec"}
            assert torch.equal(before[number], after[number])
    assert after[1].min() >= 0
    assert torch.equal(before[2], after[2])


def test_the_codec_writes_down_its_configuration(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "step1", {NAME: adam(count=9000)})
    small = shrink(original, tmp_path / "slow" / "step1", moments=EACH)
    record = role(small, "second moment")
    assert record.codec is not None
    assert {**record.codec, **EACH} == record.codec
    assert record.bound == {"kind": "pw_rel", "value": 2.0**-7}


def test_the_configuration_in_the_docs_is_accepted_and_checked() -> None:
    level = {"path": "archive", "every": 4, "compact": {"moments": REL}}
    block = load_block({"lowtide": {"checkpoint": {"tiers": [{"path": "near"}, level]}}})
    assert block is not None
    resolve(block)
    with pytest.raises(ValueError, match="bound is missing"):
        CompactConfig(moments="lowtide.sz")
    with pytest.raises(ValueError, match="which is lossy"):
        CompactConfig(codec=REL)
    assert CompactConfig(codec={"id": "lowtide.sz", "bound": 0}).moments is None
