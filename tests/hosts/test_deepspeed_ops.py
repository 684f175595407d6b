"""Locks of operator builds: who lives, who is stale; and building ahead."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowtide.core.errors import HostError, StaleLockError
from lowtide.hosts import deepspeed as host
from lowtide.hosts import deepspeed_ops
from lowtide.hosts._deepspeed_needs import operators_of
from lowtide.hosts.deepspeed_ops import (
    BuildResult,
    check_locks,
    extensions_dir,
    find_locks,
    prebuild,
    remove_stale_locks,
)

# Does what torch's FileBaton does, then stands in for the compiler.
BUILDER = """
import os, sys, time
baton = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("locked", flush=True)
time.sleep(120)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "extensions"
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def make_lock(root: Path, operator: str, *, age_s: float = 60.0) -> Path:
    path = root / operator / "lock"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    made_s = time.time() - age_s
    os.utime(path, (made_s, made_s))
    return path


@pytest.fixture
def builder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock of "cpu_adam" as a real build does."""
    lock = root / "cpu_adam" / "lock"
    lock.parent.mkdir()
    command = [sys.executable, "-c", BUILDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        os.utime(lock, (time.time() - 60.0, time.time() - 60.0))
        yield process
        process.kill()


def test_folder_comes_from_the_environment(root: Path) -> None:
    assert extensions_dir() == root


def test_folder_without_environment_is_the_one_torch_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    asked = cpp_extension._get_build_directory("some_operator", False)
    assert extensions_dir() / "some_operator" == Path(asked)


def test_no_folder_and_no_lock_are_fine(root: Path) -> None:
    assert find_locks(root / "absent") == []
    (root / "cpu_adam").mkdir()
    assert find_locks(root) == []
    check_locks(root)


def test_lock_of_a_living_build_is_respected(root: Path, builder: subprocess.Popen[str]) -> None:
    (lock,) = find_locks(root)
    assert not lock.is_stale
    assert f"process {builder.pid}" in lock.reason
    assert lock.age_s >= 60.0
    check_locks(root)
    assert remove_stale_locks(root) == []
    assert lock.path.exists()


def test_lock_of_a_killed_build_is_stale(root: Path, builder: subprocess.Popen[str]) -> None:
    builder.kill()
    builder.wait()
    (lock,) = find_locks(root)
    assert lock.is_stale
    assert "no process on this machine has it open" in lock.reason


def test_lock_of_another_file_with_that_name_does_not_count(
    root: Path, builder: subprocess.Popen[str]
) -> None:
    make_lock(root, "fused_adam")
    verdicts = {lock.path.parent.name: lock.is_stale for lock in find_locks(root)}
    assert verdicts == {"cpu_adam": False, "fused_adam": True}


def test_lock_made_just_now_is_not_judged(root: Path) -> None:
    make_lock(root, "cpu_adam", age_s=0.0)
    (lock,) = find_locks(root)
    assert not lock.is_stale


def test_check_names_file_age_and_cure(root: Path) -> None:
    path = make_lock(root, "cpu_adam", age_s=90.0)
    with pytest.raises(StaleLockError) as caught:
        check_locks(root)
    text = str(caught.value)
    assert str(path) in text
    assert "90 s old" in text
    assert f"TORCH_EXTENSIONS_DIR={root} lowtide doctor --fix" in text
    assert path.exists()  # checking changes nothing


def test_removing_takes_only_stale_locks(root: Path) -> None:
    stale = make_lock(root, "cpu_adam")
    young = make_lock(root, "fused_adam", age_s=0.0)
    assert remove_stale_locks(root) == [stale]
    assert not stale.exists()
    assert young.exists()


@pytest.mark.parametrize(("quiet_s", "is_stale"), [(60.0, False), (3600.0, True)])
def test_builder_that_may_be_on_another_machine_gets_half_an_hour(
    root: Path, monkeypatch: pytest.MonkeyPatch, quiet_s: float, is_stale: bool
) -> None:
    monkeypatch.setattr(deepspeed_ops, "_file_system", lambda _path: "nfs4")
    make_lock(root, "cpu_adam", age_s=3600.0)
    changed_s = time.time() - quiet_s
    (root / "cpu_adam" / "cpu_adam.o").touch()
    os.utime(root / "cpu_adam" / "cpu_adam.o", (changed_s, changed_s))
    (lock,) = find_locks(root)
    assert lock.is_stale is is_stale
    assert "nfs4" in lock.reason


@pytest.mark.parametrize(
    ("kind", "is_remote"),
    [("ext4", False), ("overlay", False), ("lustre", True), ("fuse.sshfs", True), ("nfs", True)],
)
def test_network_file_systems_are_known(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_remote: bool
) -> None:
    monkeypatch.setattr(deepspeed_ops, "_file_system", lambda _path: kind)
    path = make_lock(root, "cpu_adam", age_s=60.0)
    assert find_locks(path.parents[1])[0].is_stale is not is_remote


def test_file_system_is_the_one_of_the_longest_mount(tmp_path: Path) -> None:
    assert deepspeed_ops._file_system(Path("/proc/self")) == "proc"
    assert deepspeed_ops._file_system(tmp_path) != "proc"


def test_prebuild_refuses_an_unknown_operator(root: Path) -> None:
    with pytest.raises(HostError, match=r'"cpu_adam", "deepspeed_shm_comm".*mean "cpu_adam"'):
        prebuild(["cpu_adm"])


def test_prebuild_refuses_to_wait_for_a_stale_lock(root: Path) -> None:
    make_lock(root, "cpu_adam")
    with pytest.raises(StaleLockError, match="doctor --fix"):
        prebuild(["cpu_adam"])


def build_with(
    monkeypatch: pytest.MonkeyPatch, child: str, name: str = "cpu_adam"
) -> tuple[BuildResult, list[str]]:
    monkeypatch.setattr(deepspeed_ops, "_CHILD", child)
    told: list[str] = []
    (result,) = prebuild([name], told.append)
    return result, told


WRITE_LIBRARY = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], "cpu_adam")
folder.mkdir(exist_ok=True)
(folder / "cpu_adam.so").write_text(sys.argv[1])
"""


def test_prebuild_builds_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, told = build_with(monkeypatch, WRITE_LIBRARY)
    assert result.status == "built"
    assert (root / "cpu_adam" / "cpu_adam.so").read_text() == "CPUAdamBuilder"
    assert "building, once" in told[0]
    assert "built in" in told[-1]

    result, told = build_with(monkeypatch, "raise SystemExit('must not run')")
    assert (result.status, told) == ("ready", [])


@pytest.mark.parametrize("change", ["library", "version", "record"])
def test_prebuild_builds_again_when_something_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    build_with(monkeypatch, WRITE_LIBRARY)
    if change == "library":
        (root / "cpu_adam" / "cpu_adam.so").unlink()
    elif change == "version":
        monkeypatch.setattr(deepspeed_ops.importlib.metadata, "version", lambda _name: "99")
    else:
        (root / "cpu_adam" / "lowtide_build.json").write_text('{"fingerprint": 1')
    result, _ = build_with(monkeypatch, WRITE_LIBRARY)
    assert result.status == "built"


def test_prebuild_keeps_the_compilers_last_words(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import sys; print('line 1'); sys.exit('cpu_adam.cpp:1: error: no such header')"
    result, told = build_with(monkeypatch, child)
    assert result.status == "failed"
    assert "no such header" in result.detail
    assert "failed after" in told[-1]
    result, _ = build_with(monkeypatch, child)
    assert result.status == "failed"  # a failure is not remembered as done


def test_prebuild_skips_what_the_accelerator_does_not_use(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = build_with(monkeypatch, "import sys; print(sys.argv[2], 'cuda')")
    assert result.status == "unused"
    result, told = build_with(monkeypatch, "raise SystemExit('must not run')")
    assert (result.status, told) == ("unused", [])


def test_prebuild_that_runs_too_long_leaves_no_lock_and_no_process(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_ops, "_HEARTBEAT_S", 0.5)
    monkeypatch.setattr(deepspeed_ops, "_BUILD_TIMEOUT_S", 2.0)
    child = (
        "import os, pathlib, subprocess, time\n"
        "folder = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'cpu_adam')\n"
        "folder.mkdir()\n"
        "baton = os.open(folder / 'lock', os.O_CREAT | os.O_EXCL)\n"
        "compiler = subprocess.Popen(['sleep', '120'])\n"
        "(folder / 'pid').write_text(str(compiler.pid))\n"
        "compiler.wait()\n"
    )
    result, told = build_with(monkeypatch, child)
    assert result.status == "failed"
    assert "without a result" in result.detail
    assert any("still building" in text for text in told)
    assert not (root / "cpu_adam" / "lock").exists()
    state = Path("/proc", (root / "cpu_adam" / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_command_line_reports_json_and_status(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed_ops, "_CHILD", WRITE_LIBRARY)
    assert deepspeed_ops.main(["build", "cpu_adam", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["status"]) == ("cpu_adam", "built")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage:"),
        (["build", "--fast"], 2, "usage:"),
        (["build", "cpu_adm"], 1, "allowed are"),
        (["build", "cpu_adam"], 1, "boom"),
    ],
)
def test_command_line_says_what_went_wrong(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr(deepspeed_ops, "_CHILD", "raise SystemExit('boom')")
    assert deepspeed_ops.main(arguments) == status
    assert message in capsys.readouterr().err


def test_builders_are_deepspeeds_own() -> None:
    builders = pytest.importorskip("deepspeed.ops.op_builder.cpu")
    for name, builder in deepspeed_ops.BUILDERS.items():
        assert name == getattr(builders, builder).NAME


NVME = {"device": "nvme", "nvme_path": "/nvme"}
CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("config", "operators"),
    [
        ({}, set()),
        ({"optimizer": {"type": "AdamW"}}, {"fused_adam"}),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, set()),
        ({"optimizer": {"type": "Lamb"}}, {"fused_lamb"}),
        ({"optimizer": {"type": "Adagrad"}}, set()),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}, set()),
        (
            {"optimizer": {"type": "Lion"}, "zero_optimization": {"offload_optimizer": CPU}},
            {"cpu_lion"},
        ),
        (
            {"optimizer": {"type": "AdamW"}, "zero_optimization": {"offload_optimizer": CPU}},
            {"cpu_adam"},
        ),
        (
            {"optimizer": {"type": "AdamW"}, "zero_optimization": {"offload_optimizer": NVME}},
            {"cpu_adam", "async_io"},
        ),
        ({"zero_optimization": {"offload_param": NVME}}, {"async_io"}),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, {"quantizer"}),
        ({"checkpoint": {"writer": {"type": "fast"}}}, {"async_io", "utils"}),
        ({"aio": {"use_gds": True}}, {"gds"}),
        ({"compile": {"deepcompile": True}}, {"dc"}),
    ],
)
def test_what_a_configuration_builds(config: dict[str, object], operators: set[str]) -> None:
    always = {"deepspeed_shm_comm", "deepspeed_ccl_comm", "pin_memory"}
    assert operators_of(config) == always | operators
    assert operators_of(config, makes_optimizer=True) >= always | operators | {"cpu_adam"}


def test_only_operators_of_this_job_keep_it_back(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    started: list[str] = []

    @functools.wraps(deepspeed.initialize)
    def stock(**_: object) -> None:
        started.append(caplog.text)
        raise StopIteration

    offload = {"stage": 2, "offload_optimizer": CPU}
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": offload,
        "lowtide": {},
    }
    unused = make_lock(root, "async_io")
    make_lock(root, "somebody_elses")
    with pytest.raises(StopIteration):
        host._initialize(stock, (), {"model": None, "config": config})
    (text,) = started
    assert f"{unused} (60 s old" in text
    assert "somebody_elses" in text
    assert "This job does not use it" in text
    assert "lowtide doctor --fix" in text
    used = make_lock(root, "cpu_adam")
    with pytest.raises(StaleLockError) as caught:
        host._initialize(stock, (), {"model": None, "config": config})
    assert str(used) in str(caught.value)
    assert "async_io" not in str(caught.value)
    used.unlink()
    make_lock(root, "fused_adam")
    arguments = {"model": None, "config": config, "optimizer": lambda _: None}
    with pytest.raises(StaleLockError):  # a function may make any optimizer
        host._initialize(stock, (), arguments)
    assert len(started) == 1


def test_operators_are_called_as_deepspeed_calls_them() -> None:
    pytest.importorskip("deepspeed")
    folder = Path(sys.modules["deepspeed"].__file__ or "").parent / "ops" / "op_builder"
    text = "".join(path.read_text() for path in folder.rglob("*.py"))
    every = operators_of(
        {
            "zero_optimization": {"offload_param": NVME, "zero_quantized_weights": True},
            "aio": {"use_gds": True},
            "compile": {"deepcompile": True},
            "checkpoint": {"writer": {"type": "fast"}},
            "data_efficiency": {},
            "compression_training": {},
        },
        makes_optimizer=True,
    )
    assert [name for name in sorted(every) if f'NAME = "{name}"' not in text] == []
