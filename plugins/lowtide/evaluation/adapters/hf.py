"""Causal language models of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowtide.core.errors import ModelError
from lowtide.evaluation.models.torch_model import TorchModel, logits_of, module_fingerprint


def wrap(model: Any, tokenizer: Any, *, name: str = "hf", batch_size: int = 8) -> TorchModel:
    """Return a model to evaluate from a ``PreTrainedModel`` and its tokenizer.

    Args:
        model: With a head that gives logits; it is set to evaluation.
        tokenizer: With ``encode`` and ``decode``.
        name: As rows have it.
        batch_size: Rows of one forward pass.
    """
    model.eval()
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    return TorchModel(
        lambda tokens: logits_of(model(input_ids=tokens, use_cache=False)),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        name=name, fingerprint=lambda: module_fingerprint(model),
        max_length=getattr(model.config, "max_position_embeddings", None),
        batch_size=batch_size, bos=bos, eos=eos, device=next(model.parameters()).device,
    )  # fmt: skip


def load(path: str | Path, *, device: str = "cpu", batch_size: int = 8) -> TorchModel:
    """Return a model from a folder, in the type that it is stored in; nothing is downloaded.

    Raises:
        ModelError: transformers is missing, or the folder holds no causal model and tokenizer.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"hf:{path}: needs transformers; pip install lowtide[hf]") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"hf:{path}: holds no causal model with tokenizer: {error}") from error
    return wrap(
        model.to(torch.device(device)), tokenizer, name=Path(path).name, batch_size=batch_size
    )
