"""What both ZeRO adapters do around DeepSpeed's own entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowtide.offload.updater import Updater


class Holder:
    """One ZeRO optimizer under planned updates."""

    updater: Updater | None = None

    def connected(self) -> None:
        """Do what has to wait until the updater is in charge."""

    def drain(self) -> None:
        """Bring the newest state to the host."""
        if self.updater is not None:
            self.updater.drain()

    def show(self) -> None:
        """Bring the newest state to the host, for somebody who does not change it."""
        if self.updater is not None:
            self.updater.drain(may_write=False)


def after(base: Any, name: str, duty: str) -> Callable[..., Any]:
    """Return a method of `base` that does a duty of its holder first."""
    stock = getattr(base, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(self._lowtide_offload, duty)()
        return stock(self, *args, **kwargs)

    method.__name__ = name
    return method


def drained_state(base: Any) -> property:
    """Return the property ``state`` of `base`, with the newest state behind it."""
    stock = base.state

    def get_state(self: Any) -> Any:
        self._lowtide_offload.drain()
        return stock.fget(self)

    return property(get_state, stock.fset)
