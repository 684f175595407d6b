"""Where the model that a stream names is found, by its SHA-256."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from lowtide.compression.learned.model import Model, load_model
from lowtide.core.errors import CodecError, MissingModelError

VARIABLE = "LOWTIDE_MODELS"
_HASH = re.compile(r"[0-9a-f]{64}")

_lock = threading.Lock()
_registered: dict[str, Model] = {}
_in_folders: dict[tuple[str, int, int], Model | None] = {}  # by path, size and time of change
_given: ContextVar[tuple[Model, ...]] = ContextVar("models given to decompress", default=())


def is_hash(text: str) -> bool:
    """Return whether `text` is the name of a model, and not the path of its file."""
    return _HASH.fullmatch(text) is not None


def register_model(model: str | Path | Model) -> Model:
    """Keep a model for all streams that this process decodes, and return it.

    Args:
        model: A path, or a model that was loaded.

    Raises:
        CodecError: the file is not there, or is no model.
    """
    loaded = as_model(model)
    with _lock:
        return _registered.setdefault(loaded.sha256, loaded)


def as_model(model: str | Path | Model) -> Model:
    """Return a model, loaded if it is a path.

    Raises:
        CodecError: the file is not there, or is no model.
    """
    return model if isinstance(model, Model) else load_model(model)


@contextlib.contextmanager
def given_models(models: Iterable[str | Path | Model]) -> Iterator[None]:
    """Let `find_model` in this thread look among these first."""
    token = _given.set((*map(as_model, models), *_given.get()))
    try:
        yield
    finally:
        _given.reset(token)


def find_model(sha256: str, *others: Model) -> Model:
    """Return the model with this name.

    Looked for among: `others`, those given to `decompress`, those registered, and the .safetensors
    files of the folder that the environment variable LOWTIDE_MODELS names.

    Raises:
        MissingModelError: it is in none of these places.
    """
    known = {model.sha256: model for model in (*others, *_given.get())}
    with _lock:
        known = _registered | known
    if known:
        return next(iter(known.values()))
    folder = os.environ.get(VARIABLE)
    for model in _models_in(Path(folder)) if folder else ():
        if model.sha256 == sha256:
            return register_model(model)
    seen = ", ".join(f"{name[:12]}..." for name in sorted(known)) or "none"
    raise MissingModelError(
        f"the stream needs the model with SHA-256 {sha256}, and no other will do. At hand: {seen}"
        f"; in {VARIABLE}: {folder or 'not set'}. Give the model's file to decompress(models=...) "
        f"or --model, register it with register_model, or put it into the folder {VARIABLE}"
    )


def model_or_none(sha256: str) -> Model | None:
    """Return the model with this name if it is at hand."""
    try:
        return find_model(sha256)
    except MissingModelError:
        return None


def _models_in(folder: Path) -> Iterator[Model]:
    """Yield the models of a folder; files that are no models are passed over."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            status = path.stat()
            key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
            if key not in _in_folders:
                _in_folders[key] = None
                _in_folders[key] = load_model(path)
        except (OSError, CodecError):
            continue
        model = _in_folders[key]
        if model is not None:
            yield model
