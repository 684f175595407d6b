"""Builds one rank's modules from the modules of an unsharded low-rank model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.bottleneck import ACTIVATIONS, BottleneckLinear
from lowtide.tensor_parallel.decoder import AttentionSetting, Bottleneck, DecoderLayer, HeadNorms
from lowtide.tensor_parallel.ends import GatherNorm, TiedEmbedding, VocabularyHead
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import (
    CrossingGates,
    DownProjection,
    ParallelEmbedding,
    Part,
    Sharded,
    UpProjection,
)
from lowtide.tensor_parallel.norms import NormSetting
from lowtide.tensor_parallel.patterns import LayerInputs, ModelPattern, ModelShape, Projection

_ORDER = {role: place for place, role in enumerate(("q", "k", "v", "gate", "up", "o", "down"))}


class Builder:
    """Builds one rank's modules.

    Args:
        model: Unsharded; only looked at.
        pattern: Its family.
        shape: Its sizes.
        group: The ranks.
        tier: Of activation checkpointing.
        overlaps_forward: Whether layers let halves of the batch take turns.
        is_rehearsal: Whether modules are without values, to see whether they can be built.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: ModelPattern,
        shape: ModelShape,
        group: TensorGroup,
        tier: str,
        *,
        overlaps_forward: bool = False,
        is_rehearsal: bool = False,
    ) -> None:
        self.model = model
        self.pattern = pattern
        self.shape = shape
        self.group = group
        self.tier = tier
        self.overlaps_forward = overlaps_forward
        self.is_rehearsal = is_rehearsal
        self.norm = NormSetting(shape.width, shape.epsilon, shape.norm)

    def layer(self, index: int) -> DecoderLayer:
        """Return the replacement of decoder layer `index`."""
        names, shape = self.pattern.layer, self.shape
        path = f"{self.pattern.layers}.{index}"
        activation = shape.mlp_activation

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
            return self.pattern.bind(args, kwargs)

        layer = DecoderLayer(
            self.group,
            attention_in=self._bottleneck(path, names.attention_inputs, names.attention_norm),
            attention_out=self._bottleneck(path, (names.attention_output,), None),
            mlp_in=self._bottleneck(path, names.mlp_inputs, names.mlp_norm),
            mlp_out=self._bottleneck(path, (names.mlp_output,), None),
            attention=AttentionSetting(shape.head_width, shape.attention_scale),
            mlp_activation=None if activation is None else ACTIVATIONS[activation],
            bind=bind,
            head_norms=self._head_norms(path),
            tier=self.tier,
            overlaps_forward=self.overlaps_forward,
            layer_index=index,
        )
        layer.train(self.model.training)
        return layer

    def latent_widths(self, index: int) -> tuple[int, ...]:
        """Return how wide the latents are that decoder layer `index` passes on."""
        names = self.pattern.layer
        groups = (
            names.attention_inputs,
            (names.attention_output,),
            names.mlp_inputs,
            (names.mlp_output,),
        )
        path = f"{self.pattern.layers}.{index}"
        return tuple(
            sum(self._source(f"{path}.{each.path}").rank for each in group) for group in groups
        )

    def ends(self) -> tuple[Sharded, GatherNorm, VocabularyHead]:
        """Return embedding, last norm and head."""
        pattern, shape, group = self.pattern, self.shape, self.group
        model = self.model
        source = model.get_submodule(pattern.embedding)
        padding = getattr(source, "padding_idx", None)
        name = f"{pattern.embedding}.weight"
        rows = -(-shape.vocabulary // group.size) * group.size
        head_part = Part(f"{pattern.head}.weight", slice(None), (shape.vocabulary,), 0, padded=rows)
        embedding: ParallelEmbedding
        by_token = Part(name, slice(None), (shape.vocabulary,), 0, padded=rows)
        if shape.is_tied:
            embedding = TiedEmbedding(group, self._cut(by_token), by_token, padding)
            head_weight = embedding.weight
        else:
            part = Part(name, slice(None), (shape.width,), 1)
            embedding = ParallelEmbedding(group, self._cut(part), part, padding)
            head_weight = self._cut(head_part)
        norm = GatherNorm(group, self.norm, *self._of_norm(pattern.final_norm))
        bias = bias_part = None
        if getattr(model.get_submodule(pattern.head), "bias", None) is not None:
            bias_part = Part(f"{pattern.head}.bias", slice(None), (shape.vocabulary,), 0, rows)
            bias = self._cut(bias_part)
        head = VocabularyHead(group, head_weight, head_part, shape.vocabulary, bias, bias_part)
        for module in (embedding, norm, head):
            self._freeze_as_before(module)
        return embedding, norm, head

    def _bottleneck(
        self, layer: str, projections: Sequence[Projection], norm: str | None
    ) -> Bottleneck:
        projections = sorted(projections, key=lambda each: _ORDER[each.roles[0]])
        sources = [self._source(f"{layer}.{each.path}") for each in projections]
        rank = self._common(f"{layer}: rank of", projections, [each.rank for each in sources])
        activation = self._common(
            f"{layer}: activation of", projections, [each.activation for each in sources]
        )
        paths = [f"{layer}.{each.path}" for each in projections]
        columns = self.shape.columns(projections[0].roles[0])
        a_parts = [
            Part(f"{path}.down.weight", slice(i * rank, (i + 1) * rank), (columns,), 1)
            for i, path in enumerate(paths)
        ]
        of_norm = self._of_norm(f"{layer}.{norm}") if norm is not None else ()
        down = DownProjection(
            self.group,
            torch.cat([self._cut(part) for part in a_parts]),
            a_parts,
            self.norm if norm is not None else None,
            *of_norm,
        )
        up = self._up(paths, projections, sources, norm is not None, activation)
        for module in (down, up):
            self._freeze_as_before(module)
        return Bottleneck(down, up)

    def _of_norm(self, path: str) -> tuple[Tensor | None, Part | None, Tensor | None, Part | None]:
        """Return gain and bias of a norm over the model width, each with where it comes from."""
        found: list[Any] = []
        for name in ("weight", "bias"):
            part = None
            if getattr(self.model.get_submodule(path), name, None) is not None:
                part = Part(f"{path}.{name}", slice(None), (self.shape.width,), 0)
            found += [None if part is None else self._cut(part), part]
        gain, gain_part, bias, bias_part = found
        return gain, gain_part, bias, bias_part

    def _up(
        self,
        paths: Sequence[str],
        projections: Sequence[Projection],
        sources: Sequence[BottleneckLinear],
        has_norm: bool,
        activation: str | None,
    ) -> UpProjection:
        size, rank = self.group.size, sources[0].rank
        blocks = [tuple(self.shape.rows(role) for role in each.roles) for each in projections]
        lengths = [tuple(block // size for block in each) for each in blocks]
        begins = [sum(sum(each) for each in lengths[:i]) for i in range(len(lengths) + 1)]
        rows = [slice(begins[i], begins[i + 1]) for i in range(len(lengths))]

        def parts(suffix: str) -> list[Part]:
            return [Part(f"{path}.{suffix}", rows[i], blocks[i], 0) for i, path in enumerate(paths)]

        biases: list[Part] = []
        bias = self._joined([each.up.bias is not None for each in sources], "up.bias", paths)
        if bias:
            biases = parts("up.bias")
        latents: list[Part] = []
        if self._joined([each.down.bias is not None for each in sources], "down.bias", paths):
            latents = [
                Part(f"{path}.down.bias", slice(i * rank, (i + 1) * rank), (rank,), None)
                for i, path in enumerate(paths)
            ]
        return UpProjection(
            self.group,
            torch.cat([self._cut(part) for part in parts("up.weight")]),
            parts("up.weight"),
            [sum(each) for each in lengths],
            latent_bias=torch.cat([self._cut(part) for part in latents]) if latents else None,
            latent_bias_parts=latents,
            bias=torch.cat([self._cut(part) for part in biases]) if biases else None,
            bias_parts=biases,
            norm=self.norm if has_norm else None,
            activation=None if activation is None else ACTIVATIONS[activation],
            outputs=lengths if any(len(each) > 1 for each in lengths) else None,
            gates=self._gates(paths, projections, sources),
            passes_on=sources[0].place is not None and not sources[0].place.is_last,
        )

    def _gates(
        self,
        paths: Sequence[str],
        projections: Sequence[Projection],
        sources: Sequence[BottleneckLinear],
    ) -> CrossingGates | None:
        gates = [each.crossing for each in sources]
        kinds = [None if each is None else each.kind for each in gates]
        kind = self._common(f"{paths[0]}: crossing of", projections, kinds)
        if kind is None or gates[0] is None:
            return None
        parts: dict[str, list[Part]] = {}
        for name, parameter in gates[0].named_parameters():
            rows = parameter.shape[0]
            parts[name] = [
                Part(f"{path}.crossing.{name}", slice(i * rows, (i + 1) * rows), (rows,), None)
                for i, path in enumerate(paths)
            ]
        values = {n: torch.cat([self._cut(part) for part in each]) for n, each in parts.items()}
        result = CrossingGates(self.group, kind, len(gates), values, parts)
        self._freeze_as_before(result)
        return result

    def _head_norms(self, layer: str) -> HeadNorms | None:
        names = self.pattern.layer
        if names.query_norm is None or names.key_norm is None:
            return None
        parts = [
            Part(f"{layer}.{name}.weight", slice(None), (self.shape.head_width,), None)
            for name in (names.query_norm, names.key_norm)
        ]
        norms = HeadNorms(
            self.group,
            (self._cut(parts[0]), self._cut(parts[1])),
            (parts[0], parts[1]),
            self.shape.epsilon,
        )
        self._freeze_as_before(norms)
        return norms

    def _source(self, path: str) -> BottleneckLinear:
        module = self.model.get_submodule(path)
        if not isinstance(module, BottleneckLinear):
            raise ModelError(
                f"{path}: is {type(module).__name__}, a BottleneckLinear is needed; "
                f"call lowtide.tensor_parallel.factorise(model, ...) first"
            )
        return module

    @staticmethod
    def _common(what: str, projections: Sequence[Projection], values: Sequence[Any]) -> Any:
        if len(set(values)) > 1:
            found = ", ".join(
                f"{projection.path} {value}"
                for projection, value in zip(projections, values, strict=True)
            )
            raise ModelError(
                f"{what} projections that read the same input must be equal, found {found}"
            )
        return values[0]

    @staticmethod
    def _joined(flags: Sequence[bool], suffix: str, paths: Sequence[str]) -> bool:
        if any(flags) and not all(flags):
            missing = [path for path, flag in zip(paths, flags, strict=True) if not flag]
            raise ModelError(
                f"{missing[0]}: has no {suffix}, but projections of the same input have one; "
                f"give it a {suffix} of zeros"
            )
        return all(flags)

    def _whole(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        whole: Tensor = getattr(self.model.get_submodule(path), leaf)
        if hasattr(whole, "ds_id") or whole.is_meta:
            raise ModelError(
                f"{name}: its values are not here (built under deepspeed.zero.Init or on the "
                f"meta device); build the model without it, the ranks then share it among them"
            )
        return whole

    def _cut(self, part: Part) -> Tensor:
        whole = self._whole(part.name).detach()
        return part.cut(whole.to("meta") if self.is_rehearsal else whole, self.group)

    def _freeze_as_before(self, module: Sharded) -> None:
        for name, parts in module.parts.items():
            trained = [self._whole(part.name).requires_grad for part in parts]
            if any(trained) and not all(trained):
                frozen = parts[trained.index(False)].name
                raise ModelError(
                    f"{frozen}: is frozen, but it is one parameter with "
                    f"{parts[trained.index(True)].name}, which is trained; freeze both or none"
                )
            getattr(module, name).requires_grad_(all(trained))
