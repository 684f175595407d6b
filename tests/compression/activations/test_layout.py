"""Regions of strided tensors: one for all that permute the same elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowtide.compression.activations.layout import describe, elements

BASE = torch.arange(240.0)
CASES: dict[str, Tensor] = {
    "contiguous": BASE.view(4, 5, 12),
    "transposed": BASE.view(4, 5, 12).transpose(0, 2),
    "part": BASE.view(4, 60)[:, 20:40],
    "heads": BASE.view(2, 10, 12)[:, :, 4:8].unflatten(2, (2, 2)).transpose(1, 2),
    "expanded": BASE[:12].view(3, 1, 4).expand(3, 5, 4),
    "ones": BASE.view(1, 240, 1).transpose(0, 2),
    "scalar": BASE[7],
    "every second": BASE[::2],
    "offset": BASE[100:],
}


@pytest.mark.parametrize("name", CASES)
def test_the_tensor_comes_back_from_its_elements(name: str) -> None:
    tensor = CASES[name]
    described = describe(tensor)
    assert described is not None
    region, form = described
    flat = elements(tensor, region).clone()
    again = form.of(flat)
    assert torch.equal(again, tensor)
    order = [d for d in range(tensor.ndim) if tensor.shape[d] > 1]
    by_stride = sorted(order, key=lambda d: -tensor.stride(d))
    assert sorted(order, key=lambda d: -again.stride(d)) == by_stride
    if flat.numel() == tensor.numel() == tensor.untyped_storage().nbytes() // 4:
        assert again.stride() == tensor.stride()


def test_what_permutes_the_same_elements_has_one_region() -> None:
    whole = BASE.view(4, 5, 12)
    same = [whole, whole.flatten(), whole.transpose(0, 1), whole.permute(2, 0, 1), whole[None]]
    regions = [described[0] for each in same if (described := describe(each)) is not None]
    assert len(regions) == len(same)
    assert len(set(regions)) == 1
    part = whole[:, :, 4:8]
    assert describe(part) is not None
    assert describe(part)[0] == describe(part.transpose(0, 2))[0]  # type: ignore[index]
    others = [whole[1:], whole[:, :, 5:9], BASE[::2]]
    assert len({describe(each)[0] for each in [whole, part, *others]}) == 5  # type: ignore[index]


def test_elements_that_overlap_are_left_alone() -> None:
    assert describe(BASE.as_strided((10, 4), (2, 1))) is None
    assert describe(BASE.unfold(0, 8, 3)) is None


def test_expanded_dimensions_count_once() -> None:
    described = describe(CASES["expanded"])
    assert described is not None
    assert elements(CASES["expanded"], described[0]).numel() == 12
