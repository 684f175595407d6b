"""Byte-level BPE: trained once on the training text, then read from the prepared data.

Every byte is in the base alphabet, so any text can be encoded and comes back unchanged, and each
token stands for a fixed number of bytes. That is what makes bits per byte exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
TRAINING_BYTES = 12 * 2**20
"""Merges learnt from this much text hardly differ from those of all of it, and cost less time."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary.

    Args:
        texts: documents in a fixed order; only the first ``TRAINING_BYTES`` bytes are used.
        vocabulary: number of token ids wanted; a small text may end with fewer.

    Returns:
        The tokenizer; the same texts in the same order give the same one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        # Sorted, because the ids of equally frequent symbols follow this order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(texts, TRAINING_BYTES), trainer=trainer)
    return tokenizer


def _head(texts: Iterable[str], limit_bytes: int) -> Iterable[str]:
    used_bytes = 0
    for text in texts:
        if used_bytes >= limit_bytes:
            return
        used_bytes += len(text.encode())
        yield text


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Count the bytes each token stands for.

    Returns:
        int32 array indexed by token id; 0 for the end of text, which is not part of the text.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int32)
    for token, index in tokenizer.get_vocab().items():
        # The byte-level alphabet writes each byte as exactly one character.
        lengths[index] = 0 if index == END_OF_TEXT_ID else len(token)
    return lengths


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer written by ``Tokenizer.save``."""
    return Tokenizer.from_file(str(path))
