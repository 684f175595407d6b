"""Settings of the ``tensor_parallel`` key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.core.config import PluginConfig
from lowtide.core.errors import ConfigError

PATH = "lowtide.tensor_parallel"
RANK_MULTIPLE = 8  # derived ranks are multiples of it: matrix units like their sizes so

Family = Literal["attention", "mlp"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh"]


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """How the ranks of one family of projections are found; exactly one rule is not None.

    Attributes:
        path: JSON path of the object that holds the rule, for messages.
        rank: This rank.
        rank_ratio: This share of the model width.
        energy: The smallest rank that keeps this share of the squared singular values.
    """

    path: str
    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | None = None

    @property
    def key(self) -> str:
        """JSON path of the setting itself."""
        name = "energy" if self.rank is None and self.rank_ratio is None else "rank_ratio"
        return f"{self.path}.{name if self.rank is None else 'rank'}"

    def fixed_rank(self, width: int, limit: int) -> int | None:
        """Return the rank that needs no look at the weights, or None for `energy`.

        Args:
            width: Model width.
            limit: Largest rank that the projections can use; caps `rank_ratio`, not `rank`.
        """
        if self.rank is not None or self.rank_ratio is None:
            return self.rank
        # Rounded first, so that 0.28 * 200 = 56.00000000000001 is 56.
        return round_up(math.ceil(round(self.rank_ratio * width, 6)), limit)


def round_up(rank: int, limit: int) -> int:
    """Return the next multiple of `RANK_MULTIPLE` from `rank` on, or `limit` if that is less."""
    return min(math.ceil(rank / RANK_MULTIPLE) * RANK_MULTIPLE, limit)


class RankConfig(BaseModel):
    """The rank of one family of projections: exactly one of the keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    rank: int | None = Field(default=None, ge=1)
    """This rank, as it is."""

    rank_ratio: float | None = Field(default=None, gt=0, le=1)
    """This share of the model width, rounded up to a multiple of 8."""

    energy: float | None = Field(default=None, gt=0, le=1)
    """The smallest rank that keeps this share of the squared singular values of every projection
    that shares it, rounded up to a multiple of 8."""

    @model_validator(mode="after")
    def _check_one(self) -> RankConfig:
        given = _given(self)
        if len(given) != 1:
            raise ValueError(
                f'got {", ".join(given) or "none"} of "rank", "rank_ratio" and "energy", allowed '
                f"is exactly one"
            )
        return self


class TensorParallelConfig(PluginConfig):
    """Low-rank tensor parallelism whose ranks exchange latents only (docs/tensor_parallel.md)."""

    degree: int = Field(ge=1)
    """Ranks that share one copy of the model."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of every factorised projection. Leave out all of `rank`, `rank_ratio` and `energy` for
    a model that is low-rank already."""

    rank_ratio: float | None = Field(default=None, gt=0, le=1)
    """Rank as a share of the model width, rounded up to a multiple of 8. 0.25 is usual."""

    energy: float | None = Field(default=None, gt=0, le=1)
    """Rank per layer: the smallest that keeps this share of the squared singular values, rounded
    up to a multiple of 8. Projections with the same input get one rank."""

    attention: RankConfig | None = None
    """Another rank for the attention projections."""

    mlp: RankConfig | None = None
    """Another rank for the feed-forward projections."""

    init: Literal["svd", "random"] = "svd"
    """How full-rank projections become factors. Svd: the best approximation of the weight; with an
    `activation` it is only a start, because the activation is not part of the approximation.
    Random: fresh factors with CoLA's standard deviation, for training from scratch."""

    seed: int = Field(default=0, ge=0)
    """Seed of random factors. The model is the same for every `degree`."""

    activation: Activation | None = None
    """Function on the latent of factorised projections; null for none."""

    mlp_activation: Literal["keep", "none"] = "keep"
    """None drops the function on the gate and multiplies gate and up as they are, which goes with
    an `activation` on the latent."""

    crossing: Literal["identity", "scalar", "linear", "low_rank"] | None = None
    """Gate through which each projection also reads the latent that the same projection of the
    decoder layer before had (LaX); null for none. All but identity are trained and start at zero:
    a factor, a matrix of the rank's size, a matrix of a quarter of the rank."""

    activation_checkpointing: Literal["none", "latents", "sharded_latents"] = "none"
    """Latents: keep only the latents and recompute the rest in backward, without communication.
    Sharded_latents: keep one share of each latent per rank and gather it in backward."""

    overlap_forward: bool = False
    """Two halves of each micro-batch take turns in every layer, so that the messages of one are
    under way while the other computes. Twice as many messages, each half as long; for
    micro-batches of two sequences or more, without `activation_checkpointing`."""

    check_data: bool = True
    """Refuse a step in which the ranks of one group were given different batches."""

    @model_validator(mode="after")
    def _check(self) -> TensorParallelConfig:
        given = _given(self)
        if len(given) > 1:
            raise ValueError(f"got {' and '.join(given)}, which contradict; keep one of them")
        energies = [each.energy for each in (self, self.attention, self.mlp) if each is not None]
        if self.init == "random" and any(energy is not None for energy in energies):
            raise ValueError(
                '"energy" measures the weights but "init": "random" replaces them; give "rank" or '
                '"rank_ratio", or set "init" to "svd"'
            )
        if self.overlap_forward and self.activation_checkpointing != "none":
            raise ValueError(
                f'"overlap_forward" goes with "activation_checkpointing": "none" only, got '
                f'"{self.activation_checkpointing}": each half would send its gradients to the '
                f"optimizer for itself; leave one of them out"
            )
        if self.crossing in ("identity", "scalar") and any(e is not None for e in energies):
            raise ValueError(
                f'"energy" gives decoder layers different ranks, and a "{self.crossing}" crossing '
                f'needs equal ones; give "rank" or "rank_ratio", or set "crossing" to "linear" or '
                f'"low_rank"'
            )
        return self

    def rank_rule(self, family: Family) -> RankRule | None:
        """Return the rule for a family of projections, or None where no rank is given."""
        own: RankConfig | None = getattr(self, family)
        source: RankConfig | TensorParallelConfig = self if own is None else own
        given = _given(source)
        if not given:
            return None
        path = PATH if own is None else f"{PATH}.{family}"
        return RankRule(path=path, **{name: getattr(source, name) for name in given})

    def ranks_per_batch(self) -> int:
        """Return `degree`."""
        return self.degree

    def check_host(self, host_config: Mapping[str, Any]) -> None:
        """Refuse DeepSpeed's own tensor parallelism beside this one.

        Raises:
            ConfigError: DeepSpeed's ``tensor_parallel`` asks for more than one rank.
        """
        theirs = _mapping(host_config.get("tensor_parallel"))
        sizes = {"tensor_parallel.autotp_size": theirs.get("autotp_size")}
        for key in ("tp", "tensor_parallel"):  # the alias and the field of the inner object
            sizes[f"tensor_parallel.{key}.tp_size"] = _mapping(theirs.get(key)).get("tp_size")
        for key, size in sizes.items():
            if isinstance(size, int) and size > 1:
                raise ConfigError(
                    f"{PATH}: {key} is {size} too, and both shard the model; remove DeepSpeed's "
                    f'"tensor_parallel" or {PATH}'
                )


def _given(source: RankConfig | TensorParallelConfig) -> list[str]:
    names = ("rank", "rank_ratio", "energy")
    return [name for name in names if getattr(source, name) is not None]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
