"""``lowtide doctor``: stable JSON, isolated probes, stale locks found and removed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lowtide.cli import app
from lowtide.cli.probes import Package, Row, machine, run_probes, software
from lowtide.hosts import deepspeed_ops
from lowtide.hosts.deepspeed_ops import BuildResult

runner = CliRunner()
ROOT = Path(__file__).parents[2]
CHECKS = {
    "python", "torch", "numpy", "pydantic", "deepspeed", "megatron-core", "transformers", "c++",
    "ninja", "nvcc", "native", "nvml", "cuda", "apex", "io_uring", "memlock", "shm", "extensions",
    "lock",
}  # fmt: skip


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "torch_extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def stale_lock(extensions: Path) -> Path:
    lock = extensions / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    day_ago_s = time.time() - 86_400
    os.utime(lock, (day_ago_s, day_ago_s))
    return lock


def test_doctor_json_has_stable_keys(extensions: Path) -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.stdout
    report = json.loads(result.stdout)
    assert set(report) == {"format", "lowtide", "ok", "checks", "removed_locks", "built"}
    assert report["ok"] is True
    assert {row["check"] for row in report["checks"]} == CHECKS
    for row in report["checks"]:
        assert set(row) == {"check", "status", "found", "cost", "action"}
        assert row["status"] in {"ok", "warn", "missing", "fail"}
        assert row["found"]
        assert "check itself failed" not in row["found"], row


def test_doctor_names_a_stale_lock_and_fix_removes_only_that(extensions: Path) -> None:
    lock = stale_lock(extensions)
    beside = lock.with_name("build.ninja")
    beside.touch()
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    failed = [row for row in json.loads(result.stdout)["checks"] if row["status"] == "fail"]
    assert [row["check"] for row in failed] == ["lock"]
    assert str(lock) in failed[0]["found"]
    assert failed[0]["action"] == "lowtide doctor --fix"
    assert lock.exists(), "without --fix nothing is touched"

    fixed = runner.invoke(app, ["doctor", "--json", "--fix"])
    assert fixed.exit_code == 0
    assert json.loads(fixed.stdout)["removed_locks"] == [str(lock)]
    assert not lock.exists()
    assert beside.exists()


def test_lock_in_torch_s_default_folder_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = stale_lock(tmp_path / "torch_extensions" / "py311_cpu")
    assert str(lock) in runner.invoke(app, ["doctor", "--json"]).stdout
    runner.invoke(app, ["doctor", "--fix"])
    assert not lock.exists()


def test_lock_of_a_living_build_stays(extensions: Path) -> None:
    lock = stale_lock(extensions)
    with lock.open("w"):
        old_s = time.time() - 60
        os.utime(lock, (old_s, old_s))
        result = runner.invoke(app, ["doctor", "--json", "--fix"])
    assert result.exit_code == 0
    rows = [row for row in json.loads(result.stdout)["checks"] if row["check"] == "lock"]
    assert [row["status"] for row in rows] == ["warn"]
    assert lock.exists()


@pytest.mark.parametrize(("status", "exit_code"), [("built", 0), ("failed", 1)])
def test_build_ops_reports_each_operator(
    extensions: Path, monkeypatch: pytest.MonkeyPatch, status: str, exit_code: int
) -> None:
    def prebuild(names: tuple[str, ...], progress: Callable[[str], None]) -> list[BuildResult]:
        progress("building")
        return [BuildResult(name=n, status=status, duration_s=1.0, detail="d") for n in names]

    monkeypatch.setattr(deepspeed_ops, "prebuild", prebuild)
    result = runner.invoke(app, ["doctor", "--build-ops", "--json"])
    assert result.exit_code == exit_code
    report = json.loads(result.stdout)
    assert report["ok"] == (exit_code == 0)
    assert {row["name"] for row in report["built"]} == set(deepspeed_ops.BUILDERS)
    assert "building" in result.stderr


def test_doctor_table_shows_cost_and_action(extensions: Path) -> None:
    stale_lock(extensions)
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert "every start of DeepSpeed waits for it" in result.stdout
    assert "lowtide doctor --fix" in result.stdout
    assert "1 fail" in result.stdout


def test_doctor_runs_as_a_process_without_importing_torch(extensions: Path) -> None:
    code = (
        "import sys; from lowtide.cli.probes import all_probes, run_probes; "
        "run_probes(all_probes()); print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_broken_and_hanging_probes_become_rows() -> None:
    release = threading.Event()

    def fine() -> list[Row]:
        return [Row(check="fine", status="ok", found="yes")]

    def broken() -> list[Row]:
        raise OSError("no such driver")

    def hanging() -> list[Row]:
        release.wait(60)
        return []

    rows = run_probes([broken, hanging, fine], timeout_s=0.3)
    release.set()
    assert [(row.check, row.status) for row in rows] == [
        ("broken", "warn"), ("hanging", "warn"), ("fine", "ok")
    ]  # fmt: skip
    assert "OSError: no such driver" in rows[0].found
    assert "no answer within 0.3 s" in rows[1].found


@pytest.mark.parametrize(
    ("version", "is_required", "status"),
    [("2.13.0+cpu", True, "ok"), ("2.13.4", True, "ok"), ("2.10.0", True, "warn"),
     ("2.5.1", True, "fail"), ("2.5.1", False, "warn"), ("3.0", True, "fail"),
     (None, True, "fail"), (None, False, "missing")],
)  # fmt: skip
def test_package_status_follows_its_version(
    monkeypatch: pytest.MonkeyPatch, version: str | None, is_required: bool, status: str
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    package = Package(
        name="torch", tested="2.13.0", low=(2, 6), below=(3,), is_required=is_required
    )
    row = software.package_row(package)
    assert row.status == status
    assert (version or "not installed") in row.found


def test_tested_versions_are_those_that_get_installed() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in software.PACKAGES:
        assert re.search(rf"^{package.name}==(\S+)", pins, re.MULTILINE)[1] == package.tested


@pytest.mark.parametrize(("is_nvidia", "status"), [(True, "ok"), (False, "warn")])
def test_apex_of_pypi_is_told_from_nvidia_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_nvidia: bool, status: str
) -> None:
    folder = tmp_path / "apex"
    (folder / "optimizers").mkdir(parents=True)
    (folder / "__init__.py").touch()
    if is_nvidia:
        (folder / "optimizers" / "fused_adam.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    row = software.apex()[0]
    assert row.status == status
    assert ("another project" in row.found) == (not is_nvidia)


def test_gpu_with_a_cpu_build_of_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1", nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: "GPU X",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    fake.__spec__ = ModuleSpec("pynvml", None)
    monkeypatch.setattr(machine, "torch_cuda", lambda: None)
    nvml, cuda = machine.cuda()
    assert (nvml.status, nvml.found) == ("ok", "driver 580.1: GPU X (80 GiB)")
    assert (cuda.status, cuda.cost) == ("warn", "the GPUs stay idle")


def test_torch_s_cuda_release_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '12.8'\n")
    found = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert machine.torch_cuda() == "12.8"


def test_small_limits_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (65_536, 65_536))
    assert machine.locked_memory()[0].status == "warn"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (-1, -1))
    assert machine.locked_memory()[0].status == "ok"
    small = SimpleNamespace(f_blocks=16_384, f_frsize=4096, f_bavail=16_384)
    monkeypatch.setattr(machine.os, "statvfs", lambda path: small)
    row = machine.shared_memory()[0]
    assert (row.status, row.found) == ("warn", "/dev/shm: 64 MiB, 64 MiB free")
