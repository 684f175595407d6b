"""A fitted surrogate as one safetensors file: arrays, and JSON that says what they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import CorruptStreamError, UnknownNameError
from lowtide.quality.surrogate.embedding import Embedding
from lowtide.quality.surrogate.features import NAMES, SCHEMA
from lowtide.quality.surrogate.fitting import Fitted, Head, Settings, version_of
from lowtide.quality.surrogate.intervals import Calibration, Familiarity
from lowtide.quality.surrogate.networks import Networks, Shape
from lowtide.quality.surrogate.samples import codec_of
from lowtide.quality.surrogate.stage import Stage

FORMAT = 1
_KEY = "lowtide.quality.surrogate"
_log = logging.getLogger(__name__)


def saved(fitted: Fitted, settings: Settings, confidence: float, path: Path) -> None:
    """Write a surrogate to `path`."""
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {
        "stage.centre": fitted.stage.centre.astype(np.float32),
        "stage.scale": fitted.stage.scale.astype(np.float32),
        "familiarity.references": fitted.familiarity.references,
    }
    if fitted.stage.network is not None:
        for name, value in fitted.stage.network.state_dict().items():
            arrays[f"stage.network.{name}"] = value.numpy()
    heads = []
    for number, (name, head) in enumerate(fitted.heads.items()):
        for key, array in head.networks.arrays.items():
            arrays[f"heads.{number}.networks.{key}"] = array
        for key in ("calibration", "remembering"):
            for part, array in vars(getattr(head, key)).items():
                arrays[f"heads.{number}.{key}.{part}"] = array
        arrays[f"heads.{number}.memory"] = head.memory.astype(np.float32)
        arrays[f"heads.{number}.known"] = head.known
        heads.append({
            "name": name, "decades": head.decades, "utilisation": head.utilisation,
            "version": head.version,
        })  # fmt: skip
    about = {
        "format": FORMAT, "schema": SCHEMA, "inputs": NAMES, "confidence": confidence,
        "settings": asdict(settings), "limit": fitted.familiarity.limit,
        "training_set": fitted.training_set, "heads": heads,
    }  # fmt: skip
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, path, metadata={_KEY: json.dumps(about)})


def loaded(path: Path) -> tuple[Fitted, Settings, float]:
    """Return what `saved` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptStreamError: it is damaged, no surrogate, or of another format or feature schema.
    """
    arrays, about = _read(path)
    if about.get("format") != FORMAT or about.get("schema") != SCHEMA:
        raise CorruptStreamError(
            f"{path}: format {about.get('format')} with feature schema {about.get('schema')}; this "
            f"version reads format {FORMAT} with schema {SCHEMA}: fit the surrogate anew"
        )
    try:
        return _built(arrays, about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptStreamError(f"{path}: is incomplete or damaged: {error}") from error


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CorruptStreamError(
                    f'{path}: holds no surrogate; write one with "lowtide quality fit"'
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(text)  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptStreamError(f"{path}: is no safetensors file, or damaged: {error}") from error


def _built(
    arrays: Mapping[str, NDArray[Any]], about: dict[str, Any]
) -> tuple[Fitted, Settings, float]:
    settings = dict(about["settings"])
    network = None
    if settings["epochs"]:
        network = Embedding().eval().requires_grad_(False)
        names = network.state_dict()
        network.load_state_dict(
            {name: torch.from_numpy(arrays[f"stage.network.{name}"]) for name in names}
        )
    stage = Stage(
        network,
        arrays["stage.centre"].astype(np.float64), arrays["stage.scale"].astype(np.float64),
    )  # fmt: skip
    heads = {}
    for number, each in enumerate(about["heads"]):
        prefix = f"heads.{number}."
        networks = {
            name.removeprefix(f"{prefix}networks."): array
            for name, array in arrays.items()
            if name.startswith(f"{prefix}networks.")
        }
        calibrations = [
            Calibration(*(arrays[f"{prefix}{key}.{part}"]
                          for part in ("difficulty", "scores", "count")))
            for key in ("calibration", "remembering")
        ]  # fmt: skip
        heads[each["name"]] = Head(
            networks=Networks(networks),
            calibration=calibrations[0],
            memory=arrays[f"{prefix}memory"].astype(np.float64),
            remembering=calibrations[1],
            decades=(float(each["decades"][0]), float(each["decades"][1])),
            known=arrays[f"{prefix}known"],
            utilisation=tuple(each["utilisation"]),
            version=str(each["version"]),
        )
        _note_version(each["name"], each["version"])
    settings["heads"] = Shape(**settings["heads"])
    settings["metrics"] = tuple(settings["metrics"])
    familiarity = Familiarity(arrays["familiarity.references"], float(about["limit"]))
    fitted = Fitted(stage, familiarity, heads, str(about["training_set"]))
    return fitted, Settings(**settings), float(about["confidence"])


def _note_version(head: str, version: str) -> None:
    try:
        here = version_of(codec_of(head))
    except UnknownNameError:
        return  # nobody can ask about a codec that is not there
    if here != version:
        _log.warning(
            "the surrogate learned %s from %s, here is %s: intervals may not hold, fit it anew",
            head, version, here,
        )  # fmt: skip
