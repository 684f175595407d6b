"""Models to evaluate: the protocol, torch, URLs, scripts. Torch is imported by `torch_model`."""

from lowtide.evaluation.models.protocol import (
    Continuation,
    Generation,
    LogLikelihood,
    Model,
    TokenModel,
    TokenRow,
)
from lowtide.evaluation.models.scripted import ScriptedModel

__all__ = [
    "Continuation",
    "Generation",
    "LogLikelihood",
    "Model",
    "ScriptedModel",
    "TokenModel",
    "TokenRow",
]
