"""A model from the text that names it on a command line."""

from __future__ import annotations

import importlib
from typing import Any

from lowtide.core.errors import ConfigError
from lowtide.evaluation.models.protocol import Model

KINDS = ("hf", "openai", "chat", "python")


def open_model(
    spelled: str, *, url: str | None = None, device: str = "cpu", batch_size: int = 8
) -> Model:
    """Return the model that ``"hf:FOLDER"``, ``"openai:NAME"``, ``"chat:NAME"`` or
    ``"python:MODULE:FUNCTION"`` stands for.

    Args:
        spelled: As above. A function is called without arguments and returns a model.
        url: Of the endpoint, for openai and chat.
        device: Of a model from a folder.
        batch_size: Of a model from a folder.

    Raises:
        ConfigError: it stands for none.
        ModelError: a folder without a model.
    """
    kind, _, rest = spelled.partition(":")
    if kind not in KINDS or not rest:
        raise ConfigError(
            f"model: got {spelled!r}, allowed is {', '.join(f'{each}:...' for each in KINDS)}"
        )
    if (url is not None) != (kind in ("openai", "chat")):
        raise ConfigError(
            f'url: goes with "openai:" and "chat:", and these need it; got {spelled!r}'
        )
    if kind == "hf":
        from lowtide.evaluation.adapters import hf

        return hf.load(rest, device=device, batch_size=batch_size)
    if url is not None:
        from lowtide.evaluation.models.openai import Endpoint, OpenAiModel

        api: Any = "chat" if kind == "chat" else "completions"
        return OpenAiModel(Endpoint(url=url, model=rest, api=api))
    return _from_function(rest)


def _from_function(spelled: str) -> Model:
    module_name, _, name = spelled.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model: python:{spelled} cannot be called: {error}") from error
    if not isinstance(made, Model):
        raise ConfigError(
            f"model: python:{spelled} returned {type(made).__name__}, allowed is what has name, "
            "fingerprint, loglikelihood and generate"
        )
    return made
