"""Let Accelerate, and so Hugging Face `Trainer`, pass the ``"lowtide"`` block through untouched.

Accelerate walks the whole DeepSpeed JSON and takes every ``"auto"`` for one of its own; an
``"auto"`` inside our block makes `Accelerator.prepare` raise. While that walk runs, our block is
out of its sight; every other ``"auto"`` is treated as before.

Accelerate is never imported from here: if the script has not imported it yet, the change is made
right after the script does. `uninstall` leaves no trace of either.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lowtide.core.config import BLOCK

logger = logging.getLogger("lowtide")

# The package that re-exports the class, not the file that defines it: the public name is stable.
_MODULE = "accelerate.utils"
_CLASS = "DeepSpeedPlugin"
_METHOD = "deepspeed_config_process"
_STOCK = "_lowtide_stock"  # attribute of our method that holds accelerate's own


def install() -> None:
    """Make Accelerate ignore the ``"lowtide"`` block, now or as soon as it is imported.

    Idempotent. Logs, and changes nothing, when this Accelerate has no such walk: it may not need
    the change, and a script whose block holds no ``"auto"`` must not fail for it.
    """
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, _CLASS):
        _patch(module)
    elif not any(isinstance(finder, _PostImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImport(_MODULE, _patch))


def uninstall() -> None:
    """Undo `install`: Accelerate's own method, no import hook. Idempotent."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PostImport)]
    owner = getattr(sys.modules.get(_MODULE), _CLASS, None)
    current = vars(owner).get(_METHOD) if owner is not None else None
    if hasattr(current, _STOCK):
        setattr(owner, _METHOD, getattr(current, _STOCK))


def _patch(module: ModuleType) -> None:
    owner = getattr(module, _CLASS, None)
    stock = vars(owner).get(_METHOD) if owner is not None else None
    if stock is None:
        logger.warning(
            "lowtide: this version of accelerate has no %s.%s.%s; if it refuses an \"auto\" "
            'inside the "%s" block, write the value out',
            _MODULE, _CLASS, _METHOD, BLOCK,
        )  # fmt: skip
    elif not hasattr(stock, _STOCK):
        setattr(owner, _METHOD, _without_block(stock))


def _without_block(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return `stock` (the walk) with our block hidden while it runs."""

    @functools.wraps(stock)
    def deepspeed_config_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "deepspeed_config", None)
        block = config.get(BLOCK) if isinstance(config, dict) else None
        if config is None or block is None:  # no block, or the walk descending into a section
            return stock(self, *args, **kwargs)
        # None in its place keeps the order of the keys, is no section to descend into, and counts
        # as "not set" where values are compared.
        config[BLOCK] = None
        try:
            return stock(self, *args, **kwargs)
        finally:
            config[BLOCK] = block

    setattr(deepspeed_config_process, _STOCK, stock)
    return deepspeed_config_process


class _PostImport(MetaPathFinder):
    """Runs an action once, right after the first import of one module."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, its loader set to call us once."""
        if fullname != self._name:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        # Any: the change sits on this one loader object, under the name of a method.
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            if self in sys.meta_path:  # not uninstalled in the meantime
                sys.meta_path.remove(self)
                self._action(module)

        loader.exec_module = execute_then_act
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None
