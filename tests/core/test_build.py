"""The build of the native code: what it is made of, and that it is never in the way."""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
MISSING = "no-such-compiler"

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")

PROBE_BIND = """
#include <pybind11/pybind11.h>
void bind_probe(pybind11::module_ &module) { module.def("answer", [] { return 42; }); }
"""
PROBE_CUDA_BIND = """
#include <pybind11/pybind11.h>
int probe_device_count();
void bind_cuda_probe(pybind11::module_ &module) {
    module.def("device_count", &probe_device_count);
}
"""
PROBE_CUDA = """
#include <cuda_runtime.h>
__global__ void scale_values_kernel(float *values, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) values[i] = values[i] * 2.0f + 1.0f;
}
int probe_device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) return 0;
    if (count > 0) scale_values_kernel<<<1, 1>>>(nullptr, 0);
    return count;
}
"""


def run(
    *command: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )


def python(code: str, path: Path) -> str:
    """Run `code` with only `path` before the installed packages; return what it printed."""
    done = run(sys.executable, "-c", code, cwd=path, environment={"PYTHONPATH": str(path)})
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of all that is built from, with the objects that are there already."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(CSRC, copy / "csrc")
    unwanted = shutil.ignore_patterns("__pycache__", "_native*", "_build_info.json")
    shutil.copytree(ROOT / "plugins", copy / "plugins", ignore=unwanted)
    if (ROOT / "build" / "native").exists():
        shutil.copytree(ROOT / "build" / "native", copy / "build" / "native")
    return copy


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(
        sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, environment=environment
    )


def build_info(package: Path) -> dict[str, dict[str, object]]:
    info = json.loads((package / "_build_info.json").read_text())
    assert isinstance(info, dict)
    return info


def without_compiler() -> dict[str, str]:
    return {"CC": MISSING, "CXX": MISSING, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_every_folder_of_csrc_joins_the_module() -> None:
    folders = [path for path in CSRC.iterdir() if path.is_dir()]
    assert CSRC / "common" in folders
    for folder in folders:
        binding = folder / "bind.cpp"
        assert f"void bind_{folder.name}(" in binding.read_text(), binding
        is_known = folder.name == "common" or (ROOT / "plugins/lowtide" / folder.name).is_dir()
        assert is_known, f"{folder} has no plugin of that name"


def test_native_code_needs_no_torch_and_no_special_processor() -> None:
    for path in [*CSRC.rglob("*.[ch]pp"), *CSRC.rglob("*.cu*")]:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
        if not re.fullmatch(r"bind(_\w+)?\.cpp|buffer\.hpp|module\.cpp", path.name):
            assert "pybind11" not in path.read_text(), f"{path}: bindings belong in bind*.cpp"
    code = re.sub(r"#.*", "", (ROOT / "setup.py").read_text())
    assert not re.search(r"[\"']-march|-ffast-math|--use_fast_math", code)
    assert "import torch" not in code


@needs_compiler
def test_cpp_tests_pass_under_the_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "test_span"
    sources = [str(ROOT / "tests/csrc/test_span.cpp"), str(CSRC / "common/crc32c.cpp")]
    flags = ["-std=c++17", "-O1", "-DLOWTIDE_CHECKED", "-Wall", "-Wextra", "-Werror"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = str(CXX)
    command = [compiler, *flags, f"-I{CSRC}", *sources, "-o", str(program)]
    done = run(*command, *sanitizers, cwd=tmp_path)
    if done.returncode != 0 and "cannot find" in done.stdout:  # no sanitizer runtime here
        done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = run(str(program), cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_package_installs_without_a_compiler_and_says_so(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(target)]
    done = run(
        *(sys.executable, "-m", "pip", "install", *options, "."),
        cwd=tree,
        environment=without_compiler(),
    )
    assert done.returncode == 0, done.stdout
    code = (
        "import warnings, lowtide; from lowtide.core import native; s = native.status(); "
        "print(lowtide.__file__); print(s.available, s.reason); "
        "warnings.simplefilter('ignore'); print(hex(native.crc32c(b'123456789')))"
    )
    printed = python(code, target)
    assert str(target) in printed
    assert f"False lowtide._native is not available: no C++ compiler: '{MISSING}'" in printed
    assert "apt-get install g++" in printed
    assert "0xe3069283" in printed
    assert (target / "lowtide" / "py.typed").exists()
    assert not list(target.rglob("*.so"))


def test_failed_build_removes_the_module_of_an_earlier_one(tree: Path) -> None:
    package = tree / "plugins" / "lowtide"
    stale = package / f"_native{SUFFIX}"
    stale.write_bytes(b"from an earlier build")
    done = build(tree, **without_compiler())
    assert done.returncode == 0, done.stdout
    assert "is not built, its Python reference runs instead" in done.stdout
    assert not stale.exists()
    assert MISSING in str(build_info(package)["native"]["reason"])


def test_native_code_can_be_made_compulsory(tree: Path) -> None:
    done = build(tree, **without_compiler(), LOWTIDE_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert f"no C++ compiler: '{MISSING}' is not found" in done.stdout


@needs_compiler
def test_source_that_does_not_compile_is_named(tree: Path) -> None:
    source = tree / "csrc" / "common" / "broken.cpp"
    source.write_text("int broken() { return no_such_name; }\n")
    done = build(tree)
    assert done.returncode == 0, done.stdout
    reason = str(build_info(tree / "plugins" / "lowtide")["native"]["reason"])
    assert "csrc/common/broken.cpp" in reason
    assert "no_such_name" in reason


@needs_compiler
@pytest.mark.slow
def test_plugin_joins_by_dropping_its_folder_in(tree: Path) -> None:
    (tree / "csrc" / "probe").mkdir()
    (tree / "csrc" / "probe" / "bind.cpp").write_text(PROBE_BIND)
    done = build(tree, LOWTIDE_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout
    code = (
        "from lowtide.core.native import native, status; "
        "print(native().probe.answer(), status().folders, native().common.crc32c(b'123456789'))"
    )
    printed = python(code, tree / "plugins")
    folders = tuple(sorted([*(path.parent.name for path in CSRC.glob("*/bind.cpp")), "probe"]))
    assert printed.split("\n")[0] == f"42 {folders} {0xE3069283}"
    objects = list((tree / "build" / "native").rglob("*.o"))
    assert objects
    before = {path: path.stat().st_mtime_ns for path in objects}
    assert build(tree, LOWTIDE_REQUIRE_NATIVE="1").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in objects} == before  # nothing changed


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
def test_cuda_sources_are_compiled_for_both_architectures(tree: Path) -> None:
    folder = tree / "csrc" / "probe" / "cuda"
    folder.mkdir(parents=True)
    (folder / "bind.cpp").write_text(PROBE_CUDA_BIND)
    (folder / "scale.cu").write_text(PROBE_CUDA)
    package = tree / "plugins" / "lowtide"

    assert build(tree, LOWTIDE_CUDA="0").returncode == 0
    assert "LOWTIDE_CUDA=0" in str(build_info(package)["cuda"]["reason"])
    assert not (package / f"_native_cuda{SUFFIX}").exists()

    done = build(tree, LOWTIDE_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout
    info = build_info(package)["cuda"]
    assert info["is_built"] is True
    assert info["architectures"] == ["sm_80", "sm_90a"]
    cuobjdump = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if cuobjdump is not None:
        listed = run(cuobjdump, "--list-elf", f"_native_cuda{SUFFIX}", cwd=package).stdout
        assert set(re.findall(r"sm_\w+", listed)) == {"sm_80", "sm_90a"}
    code = (
        "from lowtide.core.native import native_cuda, status_cuda; "
        "print(status_cuda().available, native_cuda().probe.device_count() >= 0)"
    )
    assert python(code, tree / "plugins").strip() == "True True"


@needs_compiler
def test_missing_nvcc_is_named(tree: Path, tmp_path: Path) -> None:
    folder = tree / "csrc" / "probe" / "cuda"
    folder.mkdir(parents=True)
    (folder / "bind.cpp").write_text(PROBE_CUDA_BIND)
    (folder / "scale.cu").write_text(PROBE_CUDA)
    done = build(tree, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout
    info = build_info(tree / "plugins" / "lowtide")
    assert info["native"]["is_built"] is True
    assert f"nvcc is not at {tmp_path}/bin/nvcc" in str(info["cuda"]["reason"])
