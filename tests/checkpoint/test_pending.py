"""Updates that overwrite state piece by piece while a checkpoint of it is still being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Saving, Stage
from lowtide.checkpoint.writer.python_writer import PythonWriter
from lowtide.core.device import open_device
from lowtide.core.state import StateAuthority
from lowtide.offload.adam import Powers, adam_step
from lowtide.offload.executor import Executor
from lowtide.offload.one_update import Work
from lowtide.offload.plan import build_plan
from lowtide.offload.subgroup import Subgroup
from tests.checkpoint.ranks import DETAILS, savers

EVER = 60.0
GROUPS, ELEMENTS = 4, 9 * MIB // 4  # three tensors of 9 MiB each: 108 MiB, the buffer has 16
SLOW = 120.0 * MIB


def make_groups(seed: int = 0) -> list[list[torch.Tensor]]:
    def tensor(number: int) -> torch.Tensor:
        return torch.arange(ELEMENTS, dtype=torch.float32).mul_(0.001 * (number + seed + 1))

    return [[tensor(3 * group + k) for k in range(3)] for group in range(GROUPS)]


class Owner:
    """Overwrites its sub-groups in any order, behind the authority."""

    def __init__(self, saver: Saver, groups: list[list[torch.Tensor]]) -> None:
        self.groups, self.saver, self.authority = groups, saver, StateAuthority()
        self.authority.promise("test", lambda: [t for group in groups for t in group])
        self.authority.add_reader(saver.pending)
        self.captured_bytes: list[int] = []  # when the update began, and after each group

    def state(self) -> dict[str, Any]:
        named = {f"{i}/{k}": t for i, group in enumerate(self.groups) for k, t in enumerate(group)}
        return {"state": named, "loose": self.loose, "step": 1}

    loose = torch.arange(1000.0)  # live memory that nobody promises for

    def save(self, folder: Path, tag: str = "step1") -> Saving:
        self.saver.begin(folder, tag, step=1, details=DETAILS)
        self.saver.add(self.state(), "state.pt", is_stable=lambda _: True)
        return self.saver.end()

    def update(self, order: list[int], *, asks: bool = True, announces: bool = True) -> None:
        self.saver.pending.begin_update(self.authority.promised())
        self._note()
        if announces:
            self.authority.coming(t for i in order for t in self.groups[i])
        for number in order:
            if asks:
                self.authority.before_overwrite(self.groups[number])
            for tensor in self.groups[number]:
                tensor.add_(1.0)
            self._note()
        self.saver.pending.end_update(is_applied=True)

    def _note(self) -> None:
        history = self.saver.history
        self.captured_bytes.append(history[-1].describe()["captured_bytes"] if history else 0)


@pytest.fixture(params=["native", "python"])
def owner(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Owner]:
    if request.param == "python":
        make = lambda *, bytes_per_s, **options: PythonWriter(  # noqa: E731
            bytes_per_s=bytes_per_s or 0.0, direct=True, queue_depth=8, **options
        )
        monkeypatch.setattr("lowtide.checkpoint.saver.open_writer", make)
    tiers = [{"path": str(tmp_path), "bytes_per_s": SLOW}]
    with savers(1, tiers=tiers, max_wait_s=EVER, stall_timeout_s=EVER) as (saver,):
        yield Owner(saver, make_groups())


def snapshot(state: Any) -> Any:
    return {name: tensor.clone() for name, tensor in state["state"].items()}


def is_as(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = torch.load(path, weights_only=False)["state"]
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("announces", [True, False])
def test_checkpoint_is_of_the_request_when_groups_are_overwritten_in_random_order(
    owner: Owner, tmp_path: Path, announces: bool
) -> None:
    expected = snapshot(owner.state())
    saving = owner.save(tmp_path)
    order = np.random.default_rng(5).permutation(GROUPS).tolist()
    owner.update(order, announces=announces)
    assert saving.wait(Stage.COMMITTED, EVER)
    assert is_as(tmp_path / "step1/state.pt", expected)
    # The update began, and went on, long before all was captured.
    total = 3 * GROUPS * 4 * ELEMENTS
    assert owner.captured_bytes[0] < total // 2
    assert owner.captured_bytes[GROUPS // 2] < total
    facts = saving.describe()
    assert 0 < facts["hurried_bytes"] < total
    assert facts["direct_bytes"] + facts["staged_bytes"] == facts["bytes"]
    assert len(facts["update_waits_s"]) == 1
    assert 0.0 < facts["update_waits_s"][0] <= facts["blocked_s"]


def test_overwriting_without_asking_would_be_seen(owner: Owner, tmp_path: Path) -> None:
    expected = snapshot(owner.state())
    saving = owner.save(tmp_path)
    owner.update(list(range(GROUPS))[::-1], asks=False, announces=False)
    assert saving.wait(Stage.COMMITTED, EVER)
    assert not is_as(tmp_path / "step1/state.pt", expected)


def test_what_nobody_promises_for_is_captured_before_the_update(
    owner: Owner, tmp_path: Path
) -> None:
    owner.loose = torch.randn(ELEMENTS)
    expected = owner.loose.clone()
    saving = owner.save(tmp_path)
    owner.saver.pending.begin_update(owner.authority.promised())
    owner.loose.zero_()
    assert saving.stage is Stage.REQUESTED
    owner.authority.withdraw("test")  # now nobody promises for anything: all of it is waited for
    owner.saver.pending.end_update(is_applied=False)
    owner.saver.pending.begin_update(owner.authority.promised())
    assert not owner.authority.is_read()
    for tensor in (t for group in owner.groups for t in group):
        tensor.zero_()
    assert saving.wait(Stage.COMMITTED, EVER)
    loaded = torch.load(tmp_path / "step1/state.pt", weights_only=False)
    assert torch.equal(loaded["loose"], expected)
    assert is_as(tmp_path / "step1/state.pt", snapshot({"state": dict_of(make_groups())}))


def dict_of(groups: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{i}/{k}": t for i, group in enumerate(groups) for k, t in enumerate(group)}


def test_skipped_update_waits_for_nothing_and_a_change_after_it_is_found(
    owner: Owner, tmp_path: Path
) -> None:
    saving = owner.save(tmp_path)
    pending = owner.saver.pending
    pending.begin_update(owner.authority.promised())
    pending.end_update(is_applied=False)
    assert saving.stage is Stage.REQUESTED
    assert pending.is_reading
    owner.groups[-1][-1].add_(1.0)  # the script's own doing, in the next forward
    pending.begin_update(owner.authority.promised())
    assert "were changed between save_checkpoint and the update" in str(saving.error)
    assert not pending.is_reading
    assert not saving.wait(Stage.COMMITTED, EVER)


def test_two_checkpoints_at_once_are_both_asked(owner: Owner, tmp_path: Path) -> None:
    expected = snapshot(owner.state())
    first, second = owner.save(tmp_path, "a"), owner.save(tmp_path, "b")
    owner.update([3, 1, 0, 2])
    for saving in (first, second):
        assert saving.wait(Stage.COMMITTED, EVER)
        assert is_as(saving.final() / "state.pt", expected)


def test_disk_that_is_too_slow_costs_the_checkpoint_and_not_the_update(tmp_path: Path) -> None:
    tiers = [{"path": str(tmp_path), "bytes_per_s": 2.0 * MIB}]
    with savers(1, tiers=tiers, max_wait_s=0.3) as (saver,):
        owner = Owner(saver, make_groups())
        saving = owner.save(tmp_path)
        begin_s = time.monotonic()
        owner.update(list(range(GROUPS)))
        assert time.monotonic() - begin_s < 15.0  # at this rate all of it takes 54 s
        assert "was not copied within 0.3 s" in str(saving.error)
        assert not saving.wait(Stage.COMMITTED, EVER)
        owner.update(list(range(GROUPS)))  # nobody asks for it any more
    assert not (tmp_path / "step1").exists()


def test_checkpoint_given_up_lets_a_waiting_update_go_on(tmp_path: Path) -> None:
    tiers = [{"path": str(tmp_path), "bytes_per_s": 0.5 * MIB}]
    with savers(1, tiers=tiers, max_wait_s=EVER) as (saver,):
        owner = Owner(saver, make_groups())
        saving = owner.save(tmp_path)
        threading.Timer(0.5, lambda: saving.parts[0].cancel()).start()
        owner.update(list(range(GROUPS)))
        assert not saving.wait(Stage.COMMITTED, EVER)


def test_offload_executor_asks_before_it_overwrites(tmp_path: Path) -> None:
    tiers = [{"path": str(tmp_path), "bytes_per_s": SLOW / 2}]
    groups = make_groups()
    subgroups = [
        Subgroup(
            key=f"subgroup/{i}", group=0, flat=i, begin=0, master=master, exp_avg=first,
            exp_avg_sq=second.square_(), weights=torch.zeros(ELEMENTS, dtype=torch.bfloat16),
        )
        for i, (master, first, second) in enumerate(groups)
    ]  # fmt: skip
    gradient, betas = torch.ones(ELEMENTS), (0.9, 0.95)
    step = adam_step(
        Powers(*betas).advance(1, *betas), lr=0.1, betas=betas, eps=1e-8, weight_decay=0.1
    )
    works = [Work(gradient, 1.0, step)] * GROUPS
    device = open_device("emulated", memory_bytes=20 * 12 * ELEMENTS)
    with device, savers(1, tiers=tiers, max_wait_s=EVER) as (saver,):
        owner = Owner(saver, groups)
        expected = snapshot(owner.state())
        executor = Executor(device, subgroups, owner.authority)
        saving = owner.save(tmp_path)
        saver.pending.begin_update(owner.authority.promised())
        order = {"device_order": (2,), "host_order": (3, 0, 1)}
        plan = build_plan(executor.pieces(), residents=(), slots=1, **order)
        executor.run(plan, works)
        saver.pending.end_update(is_applied=True)
        executor.close()
        assert saving.wait(Stage.COMMITTED, EVER)
        assert is_as(tmp_path / "step1/state.pt", expected)
        assert saving.describe()["hurried_bytes"] > 0, "the update was to begin before the end"
        assert not torch.equal(groups[0][0], expected["0/0"])
