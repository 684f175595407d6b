"""Methods of a foreign package replaced while Lowtide is switched on, and put back after.

The package is never imported from here: what the script has not imported yet is changed right
after the script does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_STOCK = "_lowtide_stock"  # attribute of our method that holds the package's own


@dataclass(frozen=True)
class Patch:
    """One method, and what stands in its place.

    Attributes:
        module: Where the class is looked up.
        owner: Name of the class.
        method: Name of the method.
        wrap: Takes the package's own function, returns ours.
        missing: Called with the dotted name where this version has no such method.
    """

    module: str
    owner: str
    method: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    missing: Callable[[str], None]

    def apply(self, module: ModuleType) -> None:
        """Replace the method. Idempotent."""
        owner = getattr(module, self.owner, None)
        stock = vars(owner).get(self.method) if owner is not None else None
        if stock is None:
            self.missing(f"{self.module}.{self.owner}.{self.method}")
        elif not hasattr(stock, _STOCK):
            ours = self.wrap(stock)
            setattr(ours, _STOCK, stock)
            setattr(owner, self.method, ours)

    def undo(self) -> None:
        """Put the package's own method back. Idempotent."""
        owner = getattr(sys.modules.get(self.module), self.owner, None)
        current = vars(owner).get(self.method) if owner is not None else None
        if hasattr(current, _STOCK):
            setattr(owner, self.method, getattr(current, _STOCK))


def install(patches: Iterable[Patch]) -> None:
    """Apply patches, now or as soon as their modules are imported. Idempotent."""
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.module, []).append(patch)
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _PostImport)}
    for name, of_module in by_module.items():
        if name in sys.modules:
            _apply(sys.modules[name], of_module)
        elif name not in waiting:
            sys.meta_path.insert(0, _PostImport(name, of_module))


def uninstall(patches: Iterable[Patch]) -> None:
    """Undo `install`: the packages' own methods, no import hook. Idempotent."""
    patches = list(patches)
    names = {patch.module for patch in patches}
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not (isinstance(finder, _PostImport) and finder.name in names)
    ]
    for patch in patches:
        patch.undo()


def _apply(module: ModuleType, patches: Iterable[Patch]) -> None:
    for patch in patches:
        patch.apply(module)


class _PostImport(MetaPathFinder):
    """Applies patches once, right after the first import of one module."""

    def __init__(self, name: str, patches: Iterable[Patch]) -> None:
        self.name = name
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders give, its loader set to call us once."""
        if fullname != self.name:
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
                _apply(module, self._patches)

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
