"""Probes for what is installed: Python, packages, compilers, native parts."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lowtide.cli.probes.row import Row, Status

_COMMAND_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package Lowtide works with.

    `low` is the oldest version that can work and `below` the first that is not expected to, both as
    tuples of leading numbers.
    """

    name: str
    tested: str
    low: tuple[int, ...] = ()
    below: tuple[int, ...] = (10**6,)
    is_required: bool = False
    cost: str = ""
    action: str = ""


PACKAGES = (
    Package(name="torch", tested="2.13.0", low=(2, 6), is_required=True,
            cost="nothing runs without it", action="pip install torch"),
    Package(name="numpy", tested="2.4.6", is_required=True,
            cost="nothing runs without it", action="pip install numpy"),
    Package(name="pydantic", tested="2.14.3", low=(2,), below=(3,), is_required=True,
            cost="the configuration cannot be read", action="pip install 'pydantic>=2'"),
    Package(name="deepspeed", tested="0.19.8", low=(0, 19), below=(0, 20),
            cost="no DeepSpeed host; the plain torch loop works",
            action="pip install 'deepspeed>=0.19,<0.20'"),
    Package(name="megatron-core", tested="0.16.1", low=(0, 16), below=(0, 17),
            cost="no Megatron-core host, no indexed data sets",
            action="pip install 'lowtide[megatron]'"),
    Package(name="transformers", tested="5.23.0",
            cost="the Hugging Face Trainer example does not run",
            action="pip install 'lowtide[hf]'"),
)  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``"2.13.0+cpu"`` gives ``(2, 13, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def python() -> list[Row]:
    """Check the interpreter."""
    version = platform.python_version()
    return [Row(check="python", status="ok", found=f"{version} ({sys.executable})")]


def package_row(package: Package) -> Row:
    """Compare an installed package with what Lowtide was tested with."""
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        status: Status = "fail" if package.is_required else "missing"
        return Row(check=package.name, status=status, found="not installed",
                   cost=package.cost, action=package.action)  # fmt: skip
    have, tested = numbers(version), numbers(package.tested)
    if not package.low <= have < package.below:
        status = "fail" if package.is_required else "warn"
        return Row(check=package.name, status=status,
                   found=f"{version}, outside the supported range (tested: {package.tested})",
                   cost=package.cost,
                   action=f"pip install {package.name}=={package.tested}")  # fmt: skip
    if have[:2] != tested[:2]:
        return Row(check=package.name, status="warn",
                   found=f"{version}, untested (tested: {package.tested})",
                   cost="may well work; nobody has tried",
                   action=f"to be sure: pip install {package.name}=={package.tested}")  # fmt: skip
    note = "" if have == tested else f" (tested: {package.tested})"
    return Row(check=package.name, status="ok", found=version + note)


def first_line(command: Sequence[str]) -> str | None:
    """Return the first line a command prints, None when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines and done.returncode == 0 else None


def compilers() -> list[Row]:
    """Look for a C++ compiler, ninja and nvcc."""
    return [_cpp(), _ninja(), _nvcc()]


def _cpp() -> Row:
    wanted = os.environ.get("CXX", "").split()
    for name in [*wanted[:1], "c++", "g++", "clang++"]:
        path = shutil.which(name)
        line = first_line([path, "--version"]) if path else None
        if line:
            return Row(check="c++", status="ok", found=f"{line} ({path})")
    return Row(
        check="c++", status="missing", found="no C++ compiler (CXX, c++, g++, clang++)",
        cost="Lowtide's references run instead of its native code; DeepSpeed cannot build its "
        "CPU operators, so its CPU Adam is not there",
        action="install one, e.g. apt-get install g++, then reinstall Lowtide",
    )  # fmt: skip


def _ninja() -> Row:
    path = shutil.which("ninja")
    if path:
        return Row(check="ninja", status="ok", found=f"{first_line([path, '--version'])} ({path})")
    beside = Path(sys.executable).with_name("ninja")
    if beside.exists():
        return Row(
            check="ninja", status="warn", found=f"{beside} is there but not on PATH",
            cost="torch cannot build DeepSpeed's operators",
            action=f'export PATH="{beside.parent}:$PATH" (activating the environment does that)',
        )  # fmt: skip
    return Row(check="ninja", status="missing", found="not found",
               cost="torch cannot build DeepSpeed's operators",
               action="pip install ninja")  # fmt: skip


def _nvcc() -> Row:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(f"{root}/bin/nvcc" for root in roots if root)]
    for path in places:
        if path and os.access(path, os.X_OK):
            done = subprocess.run([path, "--version"], capture_output=True, text=True,
                                  timeout=_COMMAND_TIMEOUT_S, check=False)  # fmt: skip
            release = re.search(r"release ([\d.]+)", done.stdout)
            version = release.group(1) if release else "unknown release"
            return Row(check="nvcc", status="ok", found=f"{version} ({path})")
    return Row(check="nvcc", status="missing", found="not found",
               cost="CUDA sources are not built; on a machine without a GPU nothing is lost",
               action="install the CUDA toolkit, or set CUDA_HOME")  # fmt: skip


def native_part() -> list[Row]:
    """Ask for Lowtide's own native module."""
    from lowtide.core.native import status

    state = status()
    if state.available:
        features = ", ".join(str(feature) for feature in state.features)
        return [Row(check="native", status="ok", found=f"{state.path} ({features})")]
    return [
        Row(check="native", status="missing", found=str(state.reason),
            cost="the Python references run instead: same results, slower",
            action="install a C++ compiler and reinstall Lowtide")
    ]  # fmt: skip


def apex() -> list[Row]:
    """Tell NVIDIA's apex from the unrelated package of that name on PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return [
            Row(check="apex", status="missing", found="not installed",
                cost="one fused Adam less to compare with; training needs none of it")
        ]  # fmt: skip
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    if any((folder / "optimizers" / "fused_adam.py").exists() for folder in folders):
        is_built = importlib.util.find_spec("amp_C") is not None
        kind = "with its CUDA extensions" if is_built else "without its CUDA extensions"
        return [Row(check="apex", status="ok", found=f"NVIDIA's, {kind}")]
    where = folders[0] if folders else spec.origin
    return [
        Row(check="apex", status="warn", found=f"not NVIDIA's but another project ({where})",
            cost="code that does `import apex` to test for NVIDIA's may break",
            action="pip uninstall apex")
    ]  # fmt: skip
