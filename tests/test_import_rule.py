"""The import rule of the house: core knows nobody, plugins meet only through core.

`lowtide.core` imports no plugin and no host; a plugin imports core, torch, numpy and itself; host
packages are imported inside functions, so that `import lowtide` works with torch and numpy alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "plugins" / "lowtide"
NOT_PLUGINS = {"core", "hosts", "cli", "launch", "report"}
OF_CORE = {None, "core", "__version__", "_native", "_native_cuda"}
PLUGINS = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] != "_"} - NOT_PLUGINS
HEAVY = {"deepspeed", "megatron", "apex", "transformers", "accelerate", "pynvml", "matplotlib"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield (imported module, is it imported when the file is imported)."""
    tree = ast.parse(source)
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inside_functions |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        is_eager = id(node) not in inside_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, is_eager
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level, is_eager
            else:
                yield node.module or "", is_eager
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", is_eager


def breaches(relative: Path, source: str) -> list[str]:
    """Return what `source`, standing at plugins/lowtide/`relative`, may not import."""
    room = relative.parts[0]
    found = []
    for module, is_eager in imports(source):
        parts = module.split(".")
        target = parts[1] if parts[0] == "lowtide" and len(parts) > 1 else None
        if module.startswith("."):
            found.append(f"{relative}: relative import")
        if room == "core" and target not in OF_CORE:
            found.append(f"{relative}: core imports {module}")
        if room in PLUGINS and target in (PLUGINS | NOT_PLUGINS) - {room, "core"}:
            found.append(f"{relative}: plugin {room} imports {module}")
        is_adapter = "adapters" in relative.parts or room == "hosts"
        if parts[0] in HEAVY and (is_eager or (room in PLUGINS and not is_adapter)):
            found.append(f"{relative}: imports {parts[0]} at import time or outside an adapter")
    return found


def test_no_file_breaks_the_import_rule() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = [b for path in files for b in breaches(path.relative_to(PACKAGE), path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/x.py", "from lowtide.hosts import deepspeed"),
        ("core/x.py", "def f():\n    import lowtide.report"),
        ("core/x.py", "import deepspeed"),
        ("hosts/x.py", "import deepspeed"),
        ("cli/x.py", "from . import doctor"),
    ],
)
def test_the_rule_catches_a_breach(place: str, source: str) -> None:
    assert breaches(Path(place), source)


def test_the_rule_catches_plugins_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PLUGINS", {"offload", "checkpoint"})
    assert breaches(Path("offload/x.py"), "from lowtide.checkpoint import engine")
    assert breaches(Path("offload/x.py"), "def f():\n    import deepspeed")
    assert not breaches(Path("offload/adapters/x.py"), "def f():\n    import deepspeed")
    assert not breaches(Path("offload/x.py"), "from lowtide.core import device\nimport torch")


def test_core_stays_small() -> None:
    files = [p.name for p in (PACKAGE / "core").glob("*.py") if p.name != "__init__.py"]
    assert len(files) <= 10, files


def test_importing_lowtide_imports_nothing_heavy() -> None:
    code = (
        "import sys, lowtide; "
        "heavy = {'torch', 'numpy', 'deepspeed', 'pydantic', 'megatron'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
