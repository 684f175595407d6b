"""Examples as modules, for tests that use their parts."""

from __future__ import annotations

import importlib.util
from typing import Any

from tests.helpers.ranks import REPOSITORY


def load_example(folder: str, script: str = "train.py") -> Any:
    """Return ``examples/<folder>/<script>`` as a module."""
    path = REPOSITORY / "examples" / folder / script
    spec = importlib.util.spec_from_file_location(f"{folder}_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
