"""Builds Lowtide's native code; everything else about the package is in pyproject.toml.

What is built follows from the files in csrc/, so a plugin joins by dropping its folder in:

    csrc/<folder>/*.cpp        -> lowtide._native, if the folder has a bind.cpp that defines
                                  `void bind_<folder>(pybind11::module_ &)`
    csrc/<folder>/cuda/*.cu    -> lowtide._native_cuda, together with csrc/<folder>/cuda/bind.cpp,
                                  which defines `void bind_cuda_<folder>(pybind11::module_ &)`

The native code is optional. Where it cannot be built the package installs all the same, the reason
goes into lowtide/_build_info.json, and `lowtide.core.native.status()` and `lowtide doctor` show it.

Environment:
    LOWTIDE_CUDA=0            leave the CUDA sources alone even where nvcc is found
    LOWTIDE_REQUIRE_NATIVE=1  a native part that cannot be built is an error
    LOWTIDE_BUILD_JOBS=N      compilers at work at once (default: processors)
    CXX, CXXFLAGS, CUDA_HOME  as usual
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "plugins" / "lowtide"
BUILD_INFO = "_build_info.json"

# No contraction: a*b+c is rounded as written, so native code and its Python reference can agree
# to the last bit. Code that wants a fused operation says std::fma. No -march: kernels that need
# more than the base instruction set carry LOWTIDE_TARGET and are chosen at run time.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden",
    "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
]  # fmt: skip
NVCC_FLAGS = [
    "-std=c++17", "-O3", "--fmad=false",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off",
]  # fmt: skip
CUDA_ARCHITECTURES = ["80", "90a"]
# pybind11's templates cost three times the time at -O3, and these files hold only checks.
BINDING_FILES = ("bind.cpp", "module.cpp")


@dataclass
class Part:
    """One extension module: what it is made of and, after the build, what became of it."""

    name: str
    bind_prefix: str
    folders: list[str]
    sources: list[Path]
    reason: str | None = None
    compiler: str | None = None
    architectures: list[str] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """Return the module's import name."""
        return f"lowtide.{self.name}"

    def defines(self) -> list[str]:
        """Return what csrc/module.cpp is told; no other file needs to change with the list."""
        applied = " ".join(f"X({folder})" for folder in self.folders)
        return [
            f"-DLOWTIDE_MODULE={self.name}",
            f"-DLOWTIDE_BIND_PREFIX={self.bind_prefix}",
            f"-DLOWTIDE_FOLDERS(X)={applied}",
        ]

    def info(self) -> dict[str, object]:
        """Return this part's entry in _build_info.json."""
        return {
            "is_built": self.reason is None,
            "reason": self.reason,
            "compiler": self.compiler,
            "folders": self.folders,
            "architectures": self.architectures,
        }


class MissingPartError(CompileError):
    """The native code cannot be built here; the text is meant for the person who installs."""


def native_part() -> Part:
    """Collect the C++ sources of every folder in csrc/ that has a bind.cpp."""
    folders = sorted(bind.parent.name for bind in CSRC.glob("*/bind.cpp"))
    sources = [source for folder in folders for source in sorted((CSRC / folder).glob("*.cpp"))]
    reason = None if folders else "csrc/ has no folder with a bind.cpp"
    return Part("_native", "bind_", folders, [CSRC / "module.cpp", *sources], reason)


def cuda_part() -> Part:
    """Collect the CUDA sources of every folder whose cuda/ has a bind.cpp."""
    folders = sorted(bind.parent.parent.name for bind in CSRC.glob("*/cuda/bind.cpp"))
    sources = [
        source
        for folder in folders
        for pattern in ("*.cpp", "*.cu")
        for source in sorted((CSRC / folder / "cuda").glob(pattern))
    ]
    part = Part("_native_cuda", "bind_cuda_", folders, [CSRC / "module.cpp", *sources])
    if not folders:
        part.reason = "this version of Lowtide has no CUDA sources"
    elif os.environ.get("LOWTIDE_CUDA") == "0":
        part.reason = "switched off at build time by LOWTIDE_CUDA=0"
    return part


def find_nvcc() -> Path:
    """Return nvcc: in CUDA_HOME if that is set, else on PATH, else in /usr/local/cuda."""
    chosen = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    homes = [chosen] if chosen else ["/usr/local/cuda"]
    candidates = [Path(on_path)] if on_path and not chosen else []
    candidates += [Path(home) / "bin" / "nvcc" for home in homes]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    where = "" if chosen else "on PATH or "
    raise MissingPartError(
        f"no CUDA compiler: nvcc is not {where}at {candidates[-1]}. Install the CUDA toolkit or "
        "set CUDA_HOME to its folder, then install Lowtide again"
    )


def run_compiler(command: list[str]) -> str:
    """Run one compiler and return what it printed; raise CompileError with its first errors."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise MissingPartError(f"cannot run {command[0]!r}: {error}") from error
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if "error" in line] or lines
        raise CompileError(f"{shlex.join(command)}\nfailed:\n" + "\n".join(errors[:20]))
    return done.stdout


class BuildNative(build_ext):
    """Compiles in parallel, keeps objects whose inputs are unchanged, records what happened."""

    parts: list[Part] = []  # noqa: RUF012

    def build_extensions(self) -> None:
        """Build every part that can be built and write down why the others cannot."""
        for part in self.parts:
            if part.reason is None:
                self.build_part(part)
        info = {"native": self.parts[0].info(), "cuda": self.parts[1].info()}
        self.write_info(Path(self.build_lib) / "lowtide", {"format": 1, **info})

    def copy_extensions_to_source(self) -> None:
        """Put the modules into the source tree too (editable installs) and remove stale ones."""
        for part in self.parts:
            if part.reason is not None:  # one from an earlier build does not fit these sources
                self.in_source(part).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "lowtide" / BUILD_INFO
        shutil.copyfile(built, PACKAGE / BUILD_INFO)

    def in_source(self, part: Part) -> Path:
        """Return where an editable install keeps the module."""
        return PACKAGE / Path(self.get_ext_filename(part.full_name)).name

    @staticmethod
    def write_info(folder: Path, info: dict[str, object]) -> None:
        """Write down what was built, for lowtide.core.native."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BUILD_INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def build_part(self, part: Part) -> None:
        """Compile and link one extension module, or record why not."""
        target = Path(self.build_lib) / self.get_ext_filename(part.full_name)
        try:
            self.compile_and_link(part, target)
        except (CompileError, LinkError) as error:
            part.reason = str(error)
            target.unlink(missing_ok=True)
            if os.environ.get("LOWTIDE_REQUIRE_NATIVE") == "1":
                raise
            self.warn(f"{part.full_name} is not built, its Python reference runs instead: {error}")

    def compile_and_link(self, part: Part, target: Path) -> None:
        """Make `target`; raise CompileError or LinkError with a text for people."""
        cxx = self.cxx_command()
        compiler, version = cxx, run_compiler([cxx[0], "--version"])
        if part.name == "_native_cuda":
            compiler = self.nvcc_command(find_nvcc())
            version += run_compiler([compiler[0], "--version"])
            part.architectures = [f"sm_{arch}" for arch in CUDA_ARCHITECTURES]
        part.compiler = "; ".join(
            line for line in version.splitlines() if "++" in line or "release" in line
        )
        commands = []
        for source in part.sources:
            command = [*cxx, *part.defines()] if source.name == "module.cpp" else [*compiler]
            commands.append([*command, "-O1"] if source.name in BINDING_FILES else command)
        folder = Path("build", "native", self.get_ext_filename(part.name).removesuffix(".so"))
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("LOWTIDE_BUILD_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            shared = itertools.repeat(folder), itertools.repeat(version)
            objects = list(pool.map(compile_one, part.sources, commands, *shared))
        target.parent.mkdir(parents=True, exist_ok=True)
        if compiler is cxx:
            self.compiler.link_shared_object(objects, str(target), target_lang="c++")
        else:  # nvcc knows where its own runtime library is, and links it statically
            run_compiler([*compiler[:3], "-shared", *objects, "-o", str(target.resolve())])

    def cxx_command(self) -> list[str]:
        """Return the C++ compiler with all flags, up to the source file."""
        compiler = list(self.compiler.compiler_so_cxx)
        if shutil.which(compiler[0]) is None:
            raise MissingPartError(
                f"no C++ compiler: {compiler[0]!r} is not found. Install one (Debian and Ubuntu: "
                "apt-get install g++) or name yours in CXX, then install Lowtide again"
            )
        return [*compiler, *CXX_FLAGS, *self.include_flags()]

    def include_flags(self) -> list[str]:
        """Return the flags for csrc, Python's and pybind11's headers."""
        try:
            import pybind11
        except ImportError as error:
            raise MissingPartError(
                "pybind11 is not installed. Run: pip install pybind11, then install Lowtide again"
            ) from error
        folders = [pybind11.get_include(), *self.include_dirs]
        return ["-Icsrc", *(flag for folder in folders for flag in ("-isystem", folder))]

    def nvcc_command(self, nvcc: Path) -> list[str]:
        """Return nvcc with all flags, up to the source file; it compiles .cpp files too."""
        targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
        flags = [flag for target in targets for flag in ("-gencode", target)]
        host = ["-ccbin", self.compiler.compiler_so_cxx[0]]
        return [str(nvcc), *host, *NVCC_FLAGS, *flags, *self.include_flags()]


def compile_one(source: Path, compiler: list[str], folder: Path, version: str) -> str:
    """Compile `source` unless its object was made from the very same inputs; return the object."""
    target = ROOT / folder / ("__".join(source.relative_to(CSRC).parts) + ".o")
    # Paths are relative to ROOT, so a copy of the tree can use the objects it was copied with.
    command = [*compiler, "-c", str(source.relative_to(ROOT)), "-o", str(target.relative_to(ROOT))]
    inputs = hashlib.sha256(f"{version}\0{command}".encode())
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".hpp", ".h", ".cuh"))
    for path in [source, *headers]:
        inputs.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    stamp = target.with_suffix(".stamp")
    if target.exists() and stamp.exists() and stamp.read_text() == inputs.hexdigest():
        return str(target)
    stamp.unlink(missing_ok=True)
    run_compiler(command)
    stamp.write_text(inputs.hexdigest())
    return str(target)


BuildNative.parts = [native_part(), cuda_part()]
setup(
    ext_modules=[
        # optional: setuptools must not stumble over a module that was not built.
        Extension(part.full_name, [str(path.relative_to(ROOT)) for path in part.sources],
                  optional=True)
        for part in BuildNative.parts if part.reason is None
    ],
    cmdclass={"build_ext": BuildNative},
)  # fmt: skip
