"""A moved host symbol is refused by name; an untested version is said once."""

from __future__ import annotations

import logging

import pytest

from lowtide.core.errors import HostError
from lowtide.hosts import _guard
from lowtide.hosts._guard import Symbol, check_host, process_rank


def test_moved_symbol_is_refused_with_its_name() -> None:
    with pytest.raises(
        HostError, match=r"has no json\.decoder\.Gone, which lowtide needs; install"
    ):
        check_host("numpy", ["1.0"], [Symbol("json.decoder", "Gone")])
    with pytest.raises(HostError, match=r"has no nowhere_at_all\.x"):
        check_host("numpy", ["1.0"], [Symbol("nowhere_at_all", "x")])


def test_changed_parameters_are_refused() -> None:
    good = Symbol("json", "JSONDecoder.decode", ("self", "s"))
    check_host("numpy", ["1.0"], [good])
    with pytest.raises(HostError, match="takes self, s; lowtide knows it with self, text"):
        check_host("numpy", ["1.0"], [Symbol("json", "JSONDecoder.decode", ("self", "text"))])


def test_missing_host_says_what_to_install() -> None:
    with pytest.raises(
        HostError, match=r"no-such-host is not installed; install no-such-host==2\.0"
    ):
        check_host("no-such-host", ["2.0"], [])


def test_untested_version_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_guard, "_warned", set())
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        check_host("numpy", ["0.0.1"], [])
    assert len(caplog.records) == 1
    assert "tested with numpy 0.0.1, found" in caplog.records[0].message


def test_rank_comes_from_the_launcher_before_a_process_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert process_rank() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert process_rank() == (0, 1)  # a batch script's shell, not an srun task
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert process_rank() == (3, 4)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_rank() == (5, 8)
