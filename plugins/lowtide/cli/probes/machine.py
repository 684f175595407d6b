"""Probes for the machine: GPUs, kernel features, limits, the folder where operators are built."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import resource
import sys
from pathlib import Path

from lowtide.cli.probes.row import Row

_IO_URING_SETUP = 425  # the same number on x86-64 and arm64
_MIN_LOCKED_BYTES = 64 * 2**20
_MIN_SHARED_BYTES = 2**30


def torch_cuda() -> str | None:
    """Return the CUDA release the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, flags=re.MULTILINE)
    return match.group(1) if match else None


def cuda() -> list[Row]:
    """List GPUs through NVML, and whether the installed torch can use them."""
    if importlib.util.find_spec("pynvml") is None:
        missing = Row(check="nvml", status="missing", found="its Python package is not installed",
                      cost="GPU facts are not shown",
                      action="pip install nvidia-ml-py")  # fmt: skip
        return [missing, _cuda_row(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [
            Row(check="nvml", status="missing", found=f"no NVIDIA driver answers ({error})",
                cost="GPU facts are not shown"),
            _cuda_row(0),
        ]  # fmt: skip
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        names = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            size = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            names.append(f"{pynvml.nvmlDeviceGetName(handle)} ({size:.0f} GiB)")
    finally:
        pynvml.nvmlShutdown()
    found = f"driver {driver}: {', '.join(names) or 'no device'}"
    return [Row(check="nvml", status="ok", found=found), _cuda_row(len(names))]


def _cuda_row(devices: int) -> Row:
    release = torch_cuda()
    build = f"torch is built for CUDA {release}" if release else "torch is a build without CUDA"
    if devices == 0:
        return Row(check="cuda", status="missing", found=f"no GPU; {build}",
                   cost="everything runs on the CPU; transfers are emulated")  # fmt: skip
    if release is None:
        return Row(check="cuda", status="warn", found=f"{devices} GPU(s), but {build}",
                   cost="the GPUs stay idle", action="install a CUDA build of torch")  # fmt: skip
    return Row(check="cuda", status="ok", found=f"{devices} GPU(s); {build}")


def io_uring() -> list[Row]:
    """Ask the kernel for a ring, and give it back."""
    cost = "checkpoint and NVMe writes use threads instead"
    if sys.platform != "linux":
        return [Row(check="io_uring", status="missing", found="not Linux", cost=cost)]
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params, all defaults
    ring = libc.syscall(_IO_URING_SETUP, 1, parameters)
    if ring >= 0:
        os.close(ring)
        return [Row(check="io_uring", status="ok", found=f"works (kernel {platform.release()})")]
    reason = os.strerror(ctypes.get_errno())
    return [
        Row(check="io_uring", status="missing", found=f"refused by the kernel: {reason}", cost=cost,
            action="in a container: allow the io_uring system calls in its seccomp profile; see "
            "also /proc/sys/kernel/io_uring_disabled")
    ]  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def locked_memory() -> list[Row]:
    """Check how much memory a process may lock."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Row(check="memlock", status="ok", found="unlimited")]
    if soft >= _MIN_LOCKED_BYTES:
        return [Row(check="memlock", status="ok", found=_gib(soft))]
    return [
        Row(check="memlock", status="warn", found=f"{_gib(soft)} may be locked",
            cost="DeepSpeed's NVMe offload cannot lock large buffers; CUDA pinning is not affected",
            action="ulimit -l unlimited, or docker run --ulimit memlock=-1")
    ]  # fmt: skip


def shared_memory(path: str = "/dev/shm") -> list[Row]:
    """Check the size of the shared-memory file system."""
    try:
        facts = os.statvfs(path)
    except OSError as error:
        return [
            Row(check="shm", status="warn", found=f"{path}: {error.strerror}",
                cost="ranks on this machine cannot share memory", action="mount a tmpfs there")
        ]  # fmt: skip
    size, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    found = f"{path}: {_gib(size)}, {_gib(free)} free"
    if free >= _MIN_SHARED_BYTES:
        return [Row(check="shm", status="ok", found=found)]
    return [
        Row(check="shm", status="warn", found=found,
            cost="several ranks or data-loader workers may run out of it and die with a bus error",
            action="docker run --shm-size=8g, or remount it larger")
    ]  # fmt: skip


def extension_roots() -> tuple[Path, list[Path]]:
    """Return the folder that torch builds operators below, and all folders to look for locks in.

    Without TORCH_EXTENSIONS_DIR torch keeps one folder per Python and CUDA release. All of them are
    looked at, so that torch, which alone knows which one is in use, need not be imported.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen), [Path(chosen)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = cache / "torch_extensions"
    return base, sorted(path for path in base.glob("*") if path.is_dir())


def extensions() -> list[Row]:
    """Check the folder where torch builds operators, and locks that builds left behind."""
    from lowtide.hosts.deepspeed_ops import find_locks

    base, roots = extension_roots()
    existing = next((p for p in (base, *base.parents) if p.exists()), base)
    if os.access(existing, os.W_OK | os.X_OK):
        rows = [Row(check="extensions", status="ok", found=str(base))]
    else:
        rows = [
            Row(
                check="extensions",
                status="warn",
                found=f"{base} cannot be written",
                cost="DeepSpeed cannot build its operators",
                action="set TORCH_EXTENSIONS_DIR to a folder you may write",
            )
        ]
    locks = [lock for root in roots for lock in find_locks(root)]
    for lock in locks:
        text = f"{lock.path}, {lock.age_s:.0f} s old: {lock.reason}"
        stale = Row(
            check="lock",
            status="fail",
            found=text,
            cost="every start of DeepSpeed waits for it, for ever",
            action="lowtide doctor --fix",
        )
        live = Row(check="lock", status="warn", found=text, cost="DeepSpeed waits for that build")
        rows.append(stale if lock.is_stale else live)
    if not locks:
        rows.append(Row(check="lock", status="ok", found="no build lock"))
    return rows
