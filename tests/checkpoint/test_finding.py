"""What a start may find in its folder: all ranks choose the same checkpoint, and a whole one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowtide.checkpoint.store.finding import Finder
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import RECORD_FILE
from tests.checkpoint.ranks import file_name, make_boards, on_all, save, savers
from tests.checkpoint.test_saver import wait_all


def replace(path: Path, raw: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


def make_latest_a_folder(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "latest").mkdir()


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def leave_a_stale_attempt(folder: Path) -> None:
    part = folder / f".step3.{'0' * 16}.part"
    shutil.copytree(folder / "step2", part)
    (part / RECORD_FILE).unlink()


def break_all(folder: Path) -> None:
    for path in folder.glob("step*"):
        (path / RECORD_FILE).write_text("{}")


RANK_1 = file_name(1)
FINDS: dict[str, tuple[Callable[[Path], Any], int | None, str]] = {
    "nothing is wrong": (lambda f: None, 3, ""),
    "latest is not there": (lambda f: (f / "latest").unlink(), 3, ""),
    "latest names nothing": (lambda f: replace(f / "latest", b"step9"), 3, ""),
    "latest is empty": (lambda f: replace(f / "latest", b""), 3, ""),
    "latest is no text": (lambda f: replace(f / "latest", b"\xff\x00\xfe/../"), 3, ""),
    "latest is a folder": (make_latest_a_folder, 3, ""),
    "latest names an older one": (lambda f: replace(f / "latest", b"step1"), 1, ""),
    "an old attempt of it lies beside it": (leave_a_stale_attempt, 3, ""),
    "record is missing": (lambda f: (f / "step3" / RECORD_FILE).unlink(), 2, RECORD_FILE),
    "record is cut": (lambda f: replace(f / "step3" / RECORD_FILE, b'{"st'), 2, RECORD_FILE),
    "a file is missing": (lambda f: (f / "step3" / RANK_1).unlink(), 2, RANK_1),
    "a bit is flipped": (lambda f: flip_a_bit(f / "step3" / RANK_1), 2, RANK_1),
    "a file of another step is there": (
        lambda f: shutil.copy(f / "step2" / RANK_1, f / "step3"), 2, RANK_1,
    ),
    "a manifest of another attempt is there": (
        lambda f: shutil.copy(f / "step2/manifest-00001.json", f / "step3"), 2, "manifest-00001",
    ),
    "a record of another attempt is there": (
        lambda f: shutil.copy(f / "step2" / RECORD_FILE, f / "step3"), 2, "manifest-0000",
    ),
    "a manifest is a folder": (
        lambda f: [(f / "step3/manifest-00001.json").unlink(),
                   (f / "step3/manifest-00001.json").mkdir()], 2, "manifest-00001",
    ),
    "all are broken": (break_all, None, RECORD_FILE),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the checkpoints of steps 1 to 3."""
    folder = tmp_path_factory.mktemp("whole")
    with savers(2) as all_savers:
        for step in (1, 2, 3):
            save(all_savers, folder, step)
            assert wait_all(all_savers) == [True, True]
    return folder


@pytest.mark.parametrize("case", FINDS)
def test_both_ranks_find_the_same_when(whole: Path, tmp_path: Path, case: str) -> None:
    damage, expected, text = FINDS[case]
    folder = shutil.copytree(whole, tmp_path / "checkpoints")
    damage(folder)

    def find(tag: str | None) -> list[Any]:
        finders = [Finder(board, "full") for board in make_boards(2)]
        return on_all([lambda f=finder: answer(f, tag) for finder in finders])  # type: ignore[misc]

    def answer(finder: Finder, tag: str | None) -> Any:
        try:
            return finder.find([folder], tag, parts=2)
        except CheckpointError as error:
            return str(error)

    first, second = find(None)
    assert first == second
    assert first.name == (None if expected is None else f"step{expected}")
    assert text in "".join(first.skipped)
    first, second = find("step3")
    assert first == second
    if text:
        assert isinstance(first, str), "a checkpoint that is damaged was asked for by its name"
        assert text in first
        assert "Name another tag" in first
    else:
        assert first.name == "step3"
