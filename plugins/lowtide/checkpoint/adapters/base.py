"""What the plugin asks of a host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol


class Adapter(Protocol):
    """What a host's own way of saving needs."""

    def before_engine(self) -> None:
        """The engine is about to be built."""

    def after_engine(self, engine: Any) -> None:
        """The engine has been built."""

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Save a checkpoint the way the script would."""

    def load(self, checkpoint: Path, options: Mapping[str, Any]) -> Any:
        """Load where the host itself could not; None leaves it to the host."""

    def wanted(self, checkpoint: Path) -> Collection[str]:
        """Names of the files of `checkpoint` that this rank will load, as far as is known."""

    def parts(self) -> int | None:
        """How many ranks need a part of their own, or None."""

    def close(self) -> None:
        """Undo what was done to the host."""
