"""Which tensors are looked at, and how much of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lowtide.quality import sampling
from tests.quality.models import Net

NAMES = [(f"layers.{number}.weight", number) for number in range(40)]


def test_the_choice_depends_on_seed_step_and_kind_alone() -> None:
    def choice(names: list[tuple[str, int]] = NAMES, **changed: object) -> list[tuple[str, int]]:
        given = {"seed": 0, "step": 100, "kind": "moments"} | changed
        return sampling.chosen(names, 4, **given)  # type: ignore[arg-type]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = choice()
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 4
    assert choice(NAMES[::-1]) == first
    assert set(choice([*NAMES, ("other", 99)])) <= {*first, ("other", 99), *NAMES}
    for changed in ({"seed": 1}, {"step": 200}, {"kind": "gradients"}):
        assert choice(**changed) != first


def test_every_tensor_is_chosen_as_often_as_any_other() -> None:
    counts = Counter(
        name for step in range(500) for name, _ in
        sampling.chosen(NAMES, 4, seed=7, step=step, kind="x")
    )  # fmt: skip
    assert len(counts) == 40
    assert min(counts.values()) > 25
    assert max(counts.values()) < 80


def test_what_does_not_divide_goes_round() -> None:
    kinds = ("a", "b", "c")
    assert sampling.quotas(kinds, 6, 0) == {"a": 2, "b": 2, "c": 2}
    turns = [sampling.quotas(kinds, 1, turn) for turn in range(3)]
    assert [next(kind for kind in kinds if turn[kind]) for turn in turns] == ["a", "b", "c"]
    assert sum(sampling.quotas(kinds, 5, 1).values()) == 5


def test_roles_leave_numbers_out() -> None:
    assert sampling.role_of("blocks.11.attention.k2.weight") == "blocks.#.attention.k#.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_rows_from_the_middle_and_a_copy(dtype: torch.dtype) -> None:
    whole = torch.arange(100 * 64.0).reshape(100, 64).to(dtype).requires_grad_()
    size = 64 * whole.element_size()
    part = sampling.host_part(whole, 10 * size + 7)
    assert torch.equal(part, whole[45:55])
    assert not part.requires_grad
    assert part.data_ptr() != whole[45:].data_ptr()
    same = sampling.host_part(whole, 1 << 20)
    assert torch.equal(same, whole)
    assert same.data_ptr() != whole.data_ptr()
    column = sampling.host_part(whole.detach().T, 1 << 20)
    assert torch.equal(column, whole.T)


def test_rows_that_are_too_large_are_cut_too() -> None:
    whole = torch.arange(3 * 1000.0).reshape(3, 1000)
    assert torch.equal(sampling.host_part(whole, 400), whole[1, 450:550])
    one = sampling.host_part(whole[None, None], 4000)
    assert torch.equal(one, whole[1:2])


def test_only_floating_point_tensors_that_are_here_are_suitable() -> None:
    assert sampling.is_suitable(torch.zeros(1024), 4096)
    assert not sampling.is_suitable(torch.zeros(1023), 4096)
    assert not sampling.is_suitable(torch.zeros(4096, dtype=torch.int32), 4096)
    assert not sampling.is_suitable(torch.zeros(4096, device="meta"), 4096)
    assert not sampling.is_suitable(torch.zeros(64, 64).to_sparse(), 16)
    assert not sampling.is_suitable("text", 1)


def test_tensors_of_a_run_are_found_by_name() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    assert [name for name, _ in sampling.gradients(model)] == []
    model(torch.randn(8, 64)).backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in sampling.parameters(model)] == names
    assert [name for name, _ in sampling.gradients(model)] == names

    class Wrapper:
        def __init__(self, inside: object) -> None:
            self.optimizer = inside

    found = dict(sampling.moments(model, Wrapper(Wrapper(optimizer))))
    assert found["norm.weight.exp_avg"] is optimizer.state[model.norm.weight]["exp_avg"]
    assert {name.rpartition(".")[2] for name in found} == {"exp_avg", "exp_avg_sq", "step"}
    other = dict(sampling.moments(Net(), optimizer))
    assert "part0.exp_avg" in other
    assert dict(sampling.moments(model, None)) == {}
    assert [name for name, _ in sampling.leaf_modules(model)] == ["layers.0", "layers.1", "norm"]
    tensor = torch.zeros(1)
    assert sampling.first_tensor(((tensor, 1), 2)) is tensor
