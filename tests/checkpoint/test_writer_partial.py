"""Files whose rest is told later: what is known goes on its way, and nothing ends too early."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.core.errors import CheckpointError
from tests.checkpoint.writer_cases import EVER_S, PAGE, WAYS, Draft, Way, finish, random_draft


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def beginning(draft: Draft, count: int) -> FilePlan:
    """Return the plan of the first `count` pieces, with memory of its own for the literals."""
    pieces = draft.pieces[:count]
    size = sum(length for _, length, _, _ in pieces)
    literals = sum(length for _, length, _, entry in pieces if entry == LITERAL)
    patches = [each for each in draft.patches if each[0] < literals]
    part = dataclasses.replace(
        draft, pieces=pieces, patches=patches,
        literals=draft.literals[:literals], expected=draft.expected[:size],
    )  # fmt: skip
    return part.plan()


@pytest.mark.parametrize("seed", range(12))
def test_files_are_as_planned_when_they_are_told_in_parts(
    way: Way, tmp_path: Path, seed: int
) -> None:
    writer = way.open(slabs=6)
    random = np.random.default_rng(seed)
    draft = random_draft(tmp_path / "file", seed)
    cuts = sorted(random.integers(0, len(draft.pieces) + 1, 3).tolist())
    ticket = writer.submit([beginning(draft, cuts[0])], is_partial=True)
    for cut in cuts[1:]:
        time.sleep(float(random.choice([0.0, 0.003])))  # now and then it has caught up
        ticket.extend(beginning(draft, cut), is_partial=True)
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE, 3 * PAGE + 1])
def test_nothing_may_follow_after_all(way: Way, tmp_path: Path, size: int) -> None:
    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, bytes(size))
    ticket = writer.submit([draft.plan()], is_partial=True)
    assert not ticket.wait_captured(0.02)
    assert not ticket.wait_durable(0.02)
    assert not ticket.is_captured
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    with pytest.raises(ValueError, match="whole already"):
        ticket.extend(draft.plan())
    assert writer.close(timeout_s=EVER_S)


def test_what_is_told_is_captured_before_the_rest_comes(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, np.random.default_rng(0).bytes(5 * PAGE + 100))
    ticket = writer.submit([draft.plan()], is_partial=True)
    deadline_s = time.monotonic() + EVER_S
    while ticket.progress().written_bytes < 5 * PAGE and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert ticket.progress().written_bytes == 5 * PAGE, "whole chunks go, the last one waits"
    draft.literal(b"the rest").patch(0)
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    assert writer.close(timeout_s=EVER_S)


def test_captured_chunks_are_counted_from_the_beginning(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, np.random.default_rng(0).bytes(5 * PAGE + 100))
    ticket = writer.submit([draft.plan()], is_partial=True)
    deadline_s = time.monotonic() + EVER_S
    while ticket.captured_chunks() < 5 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert ticket.captured_chunks() == 5
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    assert ticket.captured_chunks() == 6
    assert writer.close(timeout_s=EVER_S)


def test_memory_of_every_part_is_kept_until_all_is_captured(way: Way, tmp_path: Path) -> None:
    class Owner:
        pass

    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, bytes(PAGE + 1))
    owners = [Owner(), Owner()]
    seen = [weakref.ref(owner) for owner in owners]
    plan = draft.plan()
    plan.owners.append(owners[0])
    ticket = writer.submit([plan], is_partial=True)
    longer = draft.entry(1, bytes(PAGE)).plan()
    longer.owners += owners
    del plan, owners
    ticket.extend(longer, is_partial=True)
    del longer
    writer.facts()
    assert [each() is not None for each in seen] == [True, True]
    ticket.extend(draft.plan())
    finish(ticket)
    writer.facts()
    assert [each() for each in seen] == [None, None]
    assert writer.close(timeout_s=EVER_S)


def test_cancelled_one_lets_the_next_pass(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, bytes(2 * PAGE + 1))
    ticket = writer.submit([draft.plan()], is_partial=True)
    other = Draft(tmp_path / "other").entry(0, bytes(100))
    later = writer.submit([other.plan()])
    assert not later.wait_captured(0.02)
    ticket.cancel()
    assert ticket.wait_captured(EVER_S)
    other.check(*finish(later))
    ticket.extend(draft.plan())  # too late, and so without effect
    with pytest.raises(CheckpointError, match="cancelled"):
        ticket.results()
    assert writer.close(timeout_s=EVER_S)


HALF_OF_ALL = -1  # of the space that is free


def changed(plan: FilePlan, **arrays: object) -> FilePlan:
    return dataclasses.replace(plan, **arrays)


def test_another_beginning_is_refused(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    draft = Draft(tmp_path / "file").entry(0, bytes(100)).literal(b"text").entry(1, bytes(50))
    plan = draft.plan()
    ticket = writer.submit([plan], is_partial=True)
    others = [
        beginning(draft, 2),
        changed(plan, path=tmp_path / "other"),
        changed(plan, addresses=plan.addresses + np.array([1, 0, 0], np.uint64)),
        changed(plan, entries=np.array([1, LITERAL, 1], np.int32)),
        Draft(tmp_path / "file").entry(0, bytes(99)).literal(b"texts").entry(1, bytes(50)).plan(),
    ]
    for other in others:
        with pytest.raises(ValueError, match="does not begin with the pieces that were submitted"):
            ticket.extend(other)
    with pytest.raises(ValueError, match="offsets"):
        ticket.extend(changed(plan, offsets=plan.offsets + np.uint64(1)))
    ticket.extend(plan)
    draft.check(*finish(ticket))
    with pytest.raises(ValueError, match="allowed is one where it is partial"):
        writer.submit([plan, plan], is_partial=True)
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize(
    "expected", [PAGE, 40 * PAGE, HALF_OF_ALL], ids=["less", "more", "too much"]
)
def test_what_a_file_may_become_is_reserved_and_given_back(
    way: Way, tmp_path: Path, expected: int
) -> None:
    if expected == HALF_OF_ALL:
        free = os.statvfs(tmp_path)
        expected = free.f_bavail * free.f_frsize // 2
    command = ["stat", "--file-system", "--format", "%T", str(tmp_path)]
    kind = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    writer = way.open()
    path = tmp_path / "file"
    draft = Draft(path).entry(0, np.random.default_rng(1).bytes(8 * PAGE))
    first = dataclasses.replace(beginning(draft, 1), expected_bytes=expected)
    ticket = writer.submit([first], is_partial=True)
    deadline_s = time.monotonic() + EVER_S
    while ticket.progress().written_bytes < 8 * PAGE and time.monotonic() < deadline_s:
        time.sleep(0.001)
    may_guess = writer.facts()["implementation"] == "native" and kind != "tmpfs"
    size = path.stat().st_size
    assert size == (40 * PAGE if may_guess and expected == 40 * PAGE else 8 * PAGE)
    draft.literal(b"the rest").patch(0)
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    assert path.stat().st_size == draft.plan().size_bytes < 9 * PAGE
    assert path.stat().st_blocks * 512 < 40 * PAGE
    assert writer.close(timeout_s=EVER_S)
