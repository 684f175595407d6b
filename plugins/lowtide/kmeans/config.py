"""Settings of the ``kmeans`` key."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.core.config import PluginConfig
from lowtide.kmeans.protection import Protection


class FaultToleranceConfig(BaseModel):
    """Checksums of the clustering against silent errors of the hardware."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    mode: Literal["off", "detect", "correct", "recompute"] = "correct"
    """Detect: a fit with an error is thrown away. Correct: a wrong distance is rebuilt from its
    checksum. Recompute: what does not hold is done again in another way."""

    kappa: float | None = Field(default=None, gt=0)
    """Threshold of the checksums in units of rounding errors. Null: the calibrated one."""

    max_uncorrected: int = Field(default=0, ge=0)
    """Errors that may remain in a fit."""

    def protection(self) -> Protection:
        """Return the same for the estimator."""
        return Protection(self.mode, kappa=self.kappa, max_uncorrected=self.max_uncorrected)


class KMeansConfig(PluginConfig):
    """Codebooks of weights or activations, fitted while training runs."""

    use: Literal["codebook", "activations"] = "codebook"
    """What is clustered: "codebook" the model's weight matrices, "activations" what the modules of
    `include` give out."""

    n_clusters: int = Field(default=256, ge=2, le=65536)
    """Entries of a codebook."""

    sub_dim: int = Field(default=8, ge=1, le=4096)
    """Consecutive values that share one code."""

    every_n_steps: int = Field(default=100, ge=1)
    """Steps from one fit to the next; each starts from the centroids of the one before."""

    max_iter: int = Field(default=10, ge=1)
    """Highest number of Lloyd iterations of a fit."""

    max_vectors: int = Field(default=65536, ge=2)
    """Vectors of a tensor that a fit looks at, of all ranks together; evenly spaced ones."""

    include: tuple[str, ...] = ("*",)
    """Names of parameters, or with "activations" of modules, with * and ?."""

    exclude: tuple[str, ...] = ()
    """Names that are left out though `include` has them."""

    fault_tolerance: FaultToleranceConfig = FaultToleranceConfig()

    path: str | None = None
    """Folder for the codebooks as safetensors, written anew after each fit and read at the next
    start. Null: they stay in memory."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the first centroids. Torch's own random numbers are never drawn."""

    @model_validator(mode="after")
    def _check(self) -> KMeansConfig:
        if self.max_vectors < self.n_clusters:
            raise ValueError(
                f'"max_vectors": {self.max_vectors} is less than "n_clusters": {self.n_clusters}; '
                f"a fit needs at least as many vectors as clusters"
            )
        if self.use == "activations" and "*" in self.include:
            raise ValueError(
                '"use": "activations" needs "include": the modules whose outputs are clustered, '
                'such as ["*.mlp.up"]'
            )
        return self
