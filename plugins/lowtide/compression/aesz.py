"""The codec ``lowtide.aesz``: ``lowtide.sz``, and a trained autoencoder that predicts blocks.

After AE-SZ (Liu et al., CLUSTER 2021). Bounds, exceptions and everything else are those of
``lowtide.sz``; the autoencoder only makes whole numbers smaller, so that no mistake of it can break
the bound. FORMAT.md, section 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lowtide.compression.bounds import Limits
from lowtide.compression.coding import Coder
from lowtide.compression.elements import ElementType
from lowtide.compression.learned.library import as_model, find_model, is_hash, model_or_none
from lowtide.compression.learned.model import Model
from lowtide.compression.learned.predictor import LearnedBlocks, LearnedKind
from lowtide.compression.predictors import KINDS, Kind
from lowtide.compression.selection import PREDICTORS
from lowtide.compression.sz import SzCodec, inspect_payload
from lowtide.core.errors import CodecError, CorruptStreamError, MissingModelError
from lowtide.core.stream import StreamHeader


class AeszCodec(SzCodec):
    """`SzCodec` with a model, which the stream names, and which decoding needs again.

    Chunks that the model makes no smaller are those of ``lowtide.sz``; a stream without others can
    be decoded without the model.

    Args:
        mode: As for `SzCodec`. In "pw_rel" the model is of no use.
        model: Path of a file that `lowtide train-codec` made, a loaded `Model`, or the SHA-256 of
            one that `find_model` finds when it is needed. It has no default.
        bound: As for `SzCodec`.
        predictor: "autoencoder" uses the model wherever blocks fit, even if that is larger; "auto"
            where it is smaller; the others are those of `SzCodec`.
        goal: As for `SzCodec`; with "psnr" the model is used where it is smaller and its mean error
            no larger.
        fill_value: As for `SzCodec`.
        chunk_elements: As for `SzCodec`.
        level: As for `SzCodec`.
    """

    codec_id = "lowtide.aesz"
    allowed_predictors: ClassVar = (*PREDICTORS, LearnedBlocks.name)

    def __init__(
        self,
        mode: str = "abs",
        *,
        model: str | Path | Model | None = None,
        bound: float | None = None,
        predictor: str = "auto",
        goal: str = "size",
        fill_value: float | None = None,
        chunk_elements: int = 4 << 20,
        level: int = 3,
    ) -> None:
        super().__init__(
            mode, bound=bound, predictor=predictor, goal=goal, fill_value=fill_value,
            chunk_elements=chunk_elements, level=level,
        )  # fmt: skip
        if model is None:
            raise CodecError(
                f'codec "{self.codec_id}": model is missing; give the path of a file that '
                '`lowtide train-codec` made, or use "lowtide.sz", which needs none'
            )
        self._loaded: tuple[Model, ...] = ()
        if isinstance(model, str) and is_hash(model):
            self.model = model
        else:
            self._loaded = (as_model(model),)
            self.model = self._loaded[0].sha256
        if mode == "pw_rel" and predictor == LearnedBlocks.name:
            raise CodecError(
                f'codec "{self.codec_id}": predictor "{predictor}" predicts values, and mode '
                '"pw_rel" codes logarithms; take another predictor or mode'
            )

    def _coder(self, element: ElementType, limits: Limits, fill: Any) -> Coder:
        insists = self.predictor == LearnedBlocks.name
        policy = "auto" if insists else self.predictor
        if policy != "auto" or limits.is_lossless or limits.is_lattice:
            return super()._coder(element, limits, fill)  # what is predicted lies on no lattice
        return Coder(
            element, limits, fill, policy=policy, goal=self.goal, level=self.level,
            model=find_model(self.model, *self._loaded), insists=insists,
        )  # fmt: skip

    def _kinds(self, header: StreamHeader) -> Mapping[int, Kind]:
        try:
            return _kinds(LearnedKind(find_model(_named(header), *self._loaded)))
        except MissingModelError as error:  # only where a chunk needs it
            return _kinds(LearnedKind(None, error))


def inspect_learned(header: StreamHeader, payload: memoryview) -> dict[str, Any]:
    """Return what a payload says about itself; see `lowtide.compression.inspect`."""
    name = _named(header)
    model = model_or_none(name)
    found: dict[str, Any] = {"sha256": name, "stored_bytes": None, "ratio_with_model": None}
    if model is not None:
        stream_bytes = header.payload_offset + header.payload_bytes
        found["stored_bytes"] = model.stored_bytes
        found["ratio_with_model"] = header.nbytes / (stream_bytes + model.stored_bytes)
    kinds = _kinds(LearnedKind(None))
    return {"model": found, **inspect_payload(header, payload, kinds)}


def _kinds(kind: LearnedKind) -> Mapping[int, Kind]:
    return {**KINDS, LearnedBlocks.kind: kind}


def _named(header: StreamHeader) -> str:
    """Return the SHA-256 of the model that a stream was written with."""
    name = header.codec.get("model")
    if not isinstance(name, str) or not is_hash(name):
        raise CorruptStreamError(
            f'codec "{AeszCodec.codec_id}": the stream names the model {name!r}, allowed are 64 '
            "hexadecimal digits"
        )
    return name
