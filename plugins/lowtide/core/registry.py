"""Names to classes: lazily imported, open to other packages, closed to silent replacement."""

from __future__ import annotations

import importlib
import threading
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from lowtide.core.errors import LowtideError, UnknownNameError, listed, near

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to classes, importing each class when it is first asked for.

    Args:
        kind: What the names stand for ("plugin", "codec"); used in messages.
        entry_point_group: Other installed packages add names through this entry-point group.
        base: Every target must be a subclass of this class.
    """

    def __init__(self, kind: str, entry_point_group: str, base: type | None = None) -> None:
        self._kind = kind
        self._group = entry_point_group
        self._base = base
        self._targets: dict[str, str | type[T]] = {}
        self._origins: dict[str, str] = {}
        self._scanned = False
        self._lock = threading.RLock()

    def register(self, name: str, target: str | type[T], *, origin: str = "lowtide") -> None:
        """Add `name`; `target` is a class or a lazy ``"package.module:Class"``.

        Registering the same target again is allowed; another target under a taken name is not.

        Raises:
            LowtideError: `name` already stands for something else.
        """
        with self._lock:
            known = self._targets.get(name)
            if known is not None and _spelled(known) != _spelled(target):
                raise LowtideError(
                    f'{self._kind} "{name}": already registered as {_spelled(known)} by '
                    f"{self._origins[name]}, so {origin} cannot register {_spelled(target)}; "
                    f"rename one of them or uninstall its package"
                )
            if known is None or isinstance(known, str):
                self._targets[name] = target
                self._origins[name] = origin

    def unregister(self, name: str) -> None:
        """Forget `name`. Meant for tests and for plugins defined inside a running program."""
        with self._lock:
            self._targets.pop(name, None)
            self._origins.pop(name, None)

    def names(self) -> list[str]:
        """Return all known names, sorted, without importing what they stand for."""
        self._scan()
        return sorted(self._targets)

    def get(self, name: str) -> type[T]:
        """Return the class behind `name`.

        Raises:
            UnknownNameError: no such name; the message lists the nearest and all known names.
            LowtideError: the name's module cannot be imported or holds no suitable class.
        """
        self._scan()
        with self._lock:
            target = self._targets.get(name)
            if target is None:
                raise UnknownNameError(
                    f'unknown {self._kind} "{name}".{near(name, self._targets)} '
                    f"Known: {listed(self._targets)}"
                )
            if isinstance(target, str):
                target = self._load(name, target)
                self._targets[name] = target
            return target

    def _load(self, name: str, spelled: str) -> type[T]:
        module_name, _, attribute = spelled.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise LowtideError(
                f'{self._kind} "{name}": {spelled} (from {self._origins[name]}) cannot be '
                f"imported: {error}; install what it needs or remove it"
            ) from error
        if self._base is not None and not (
            isinstance(found, type) and issubclass(found, self._base)
        ):
            raise LowtideError(
                f'{self._kind} "{name}": {spelled} is not a subclass of '
                f"{self._base.__module__}.{self._base.__qualname__}"
            )
        return cast("type[T]", found)

    def _scan(self) -> None:
        with self._lock:
            if self._scanned:
                return
            self._scanned = True
            for point in metadata.entry_points(group=self._group):
                origin = point.dist.name if point.dist is not None else "an entry point"
                self.register(point.name, point.value, origin=origin)


def _spelled(target: str | type) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


# Plugins switched on by the JSON block. Built-in ones are listed here as lazy targets, so that
# their names are known (error messages, schema) without importing any of them.
plugins: Registry[Any] = Registry("plugin", "lowtide.plugins")
plugins.register("tensor_parallel", "lowtide.tensor_parallel.plugin:TensorParallelPlugin")
plugins.register("offload", "lowtide.offload.plugin:OffloadPlugin")
plugins.register("checkpoint", "lowtide.checkpoint.plugin:CheckpointPlugin")
plugins.register("compression", "lowtide.compression.plugin:CompressionPlugin")
plugins.register("quality", "lowtide.quality.plugin:QualityPlugin")
