"""Any causal language model of torch: a function from tokens to logits, and a tokenizer if any.

Shape letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import DataError
from lowtide.evaluation.models.protocol import (
    Continuation,
    Generation,
    LogLikelihood,
    TokenRow,
    cut_at_stop,
)

Logits = Callable[[Tensor], Tensor]
Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


class TorchModel:
    """Scores and generates with a function from tokens to logits.

    Rows are padded on the right, which a causal model cannot see; there is no cache, so that
    nothing is asked of the model but its logits, and an answer of n tokens takes n forward passes.

    Args:
        logits: From int64 tokens, shape (B, T), to float logits, shape (B, T, V).
        encode: From text to tokens, without special ones. None: only tokens can be scored.
        decode: From tokens to text.
        name: As rows have it.
        fingerprint: Hash of the weights, see `module_fingerprint`; or a function that gives it.
        max_length: Most tokens that the model reads; None is no limit.
        batch_size: Rows of one forward pass.
        bos: Token before a text without context; None leaves the first token of such a text out.
        eos: Token that ends an answer.
        device: Where tokens go.
        forwards: From the number of forward passes that are needed here to that which are done:
            ranks that hold parts of one model must agree. Extra ones repeat the last batch.
    """

    def __init__(
        self,
        logits: Logits,
        *,
        encode: Encode | None = None,
        decode: Decode | None = None,
        name: str = "torch",
        fingerprint: str | Callable[[], str] = "",
        max_length: int | None = None,
        batch_size: int = 8,
        bos: int | None = None,
        eos: int | None = None,
        device: torch.device | str = "cpu",
        forwards: Callable[[int], int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size: got {batch_size}, allowed is 1 or more")
        self.name = name
        self._logits, self._encode, self._decode = logits, encode, decode
        self._fingerprint = fingerprint
        self._max_length, self._batch_size = max_length, batch_size
        self._bos, self._eos = bos, eos
        self._device = torch.device(device)
        self._forwards = forwards

    def fingerprint(self) -> str:
        """Return the hash that was given."""
        return self._fingerprint() if callable(self._fingerprint) else self._fingerprint

    # -- scoring ----------------------------------------------------------------------------

    def score_tokens(self, rows: Sequence[TokenRow]) -> list[LogLikelihood]:
        """Return how likely the scored tokens of each row are.

        A row that is too long loses tokens on the left that are not scored.

        Raises:
            DataError: a row without a scored token, or whose scored tokens are too many.
        """
        cut = [self._fitting(row) for row in rows]
        order = sorted(range(len(cut)), key=lambda index: -len(cut[index].ids))
        found: dict[int, LogLikelihood] = {}
        batches = [
            order[at : at + self._batch_size] for at in range(0, len(order), self._batch_size)
        ]
        for batch in self._agreed(batches):
            scores = self._score_batch([cut[index] for index in batch])
            found.update(zip(batch, scores, strict=True))
        return [found[index] for index in range(len(rows))]

    def _agreed(self, batches: list[list[int]]) -> list[list[int]]:
        """Return the batches, with as many more as other ranks need."""
        wanted = len(batches) if self._forwards is None else self._forwards(len(batches))
        if wanted > len(batches) and not batches:
            raise DataError("a rank without rows cannot take part in forward passes")
        return batches + batches[-1:] * (wanted - len(batches))

    def _fitting(self, row: TokenRow) -> TokenRow:
        if not 1 <= row.first < len(row.ids):
            raise DataError(
                f"tokens: scoring starts at {row.first} of {len(row.ids)}; allowed is 1 or more, "
                "with a token behind it: a text needs a context, or the model a bos"
            )
        over = 0 if self._max_length is None else len(row.ids) - self._max_length
        if over <= 0:
            return row
        if over >= row.first:
            raise DataError(
                f"tokens: {len(row.ids) - row.first} are scored, the model reads "
                f"{self._max_length} with one before them; take shorter windows"
            )
        return TokenRow(row.ids[over:], row.first - over)

    def _score_batch(self, rows: Sequence[TokenRow]) -> list[LogLikelihood]:
        logits_BTV = self._forward([row.ids for row in rows])
        found = []
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            ids = torch.tensor(row.ids[row.first :], device=logits_TV.device)
            # Position t predicts token t + 1. Only these positions, or float32 would take much.
            predicted = logits_TV[row.first - 1 : len(row.ids) - 1].float().log_softmax(dim=-1)
            scores = predicted.gather(1, ids[:, None]).double()
            is_greedy = bool((predicted.argmax(dim=-1) == ids).all())
            found.append(LogLikelihood(float(scores.sum()), len(ids), is_greedy))
        return found

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return logits of rows padded on the right, shape (B, T, V)."""
        width = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            logits = self._logits(tokens.to(self._device))
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DataError(
                f"logits: got {shape}, allowed is a tensor of shape (rows, positions, vocabulary) "
                f"= ({len(rows)}, {width}, ...)"
            )
        return logits

    def loglikelihood(self, requests: Sequence[Continuation]) -> list[LogLikelihood]:
        """Return how likely each text is after its context.

        Context and text are encoded together. Where a token spans both, it is scored.

        Raises:
            DataError: there is no `encode`, or a request cannot be scored.
        """
        return self.score_tokens([self._row(request) for request in requests])

    def _row(self, request: Continuation) -> TokenRow:
        before = self._encoded(request.context) if request.context else ()
        ids = self._encoded(request.context + request.text)
        pairs = zip(before, ids, strict=False)
        first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids)))
        if first == 0 and self._bos is not None:
            return TokenRow((self._bos, *ids), 1)
        return TokenRow(ids, max(1, first))

    def _encoded(self, text: str) -> tuple[int, ...]:
        if self._encode is None:
            raise DataError(
                f'model "{self.name}": has no encode, so it takes tokens alone; give encode=, or '
                'evaluate a "loss" task over bytes or tokens'
            )
        return tuple(int(token) for token in self._encode(text))

    # -- generating -------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], options: Generation) -> list[str]:
        """Return an answer to each prompt, up to a stop or `eos`.

        A prompt that is too long loses tokens on the left.

        Raises:
            DataError: there is no `encode` or `decode`, or a prompt without tokens.
        """
        if self._decode is None:
            raise DataError(f'model "{self.name}": has no decode; give decode=')
        rows = []
        for prompt in prompts:
            ids = self._encoded(prompt) or (() if self._bos is None else (self._bos,))
            if not ids:
                raise DataError("prompt: has no tokens, and the model no bos")
            room = None if self._max_length is None else self._max_length - options.max_tokens
            if room is not None and room < 1:
                raise DataError(
                    f"max_tokens: got {options.max_tokens}, allowed is less than what the model "
                    f"reads, {self._max_length}"
                )
            rows.append(list(ids if room is None else ids[-room:]))
        drawing = [_generator(options.seed, prompt) for prompt in prompts]
        answers: dict[int, str] = {}
        indices = list(range(len(rows)))
        batches = [
            indices[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)
        ]
        for batch in self._agreed(batches):
            if batch[0] in answers:  # one for the other ranks
                self._idle(rows[batch[0]], options)
                continue
            texts = self._continue([rows[i] for i in batch], [drawing[i] for i in batch], options)
            answers.update(zip(batch, texts, strict=True))
        return [answers[index] for index in indices]

    def _idle(self, row: list[int], options: Generation) -> None:
        for _ in range(options.max_tokens):
            self._forward([row])

    def _continue(
        self, prompts: list[list[int]], drawing: list[torch.Generator], options: Generation
    ) -> list[str]:
        rows = [list(prompt) for prompt in prompts]
        said: list[str] = [""] * len(rows)
        is_done = [False] * len(rows)
        for _ in range(options.max_tokens):
            if all(is_done) and self._forwards is None:
                break
            logits_BTV = self._forward(rows)
            for at, row in enumerate(rows):
                if is_done[at]:
                    continue
                token = _pick(logits_BTV[at, len(row) - 1], options.temperature, drawing[at])
                if token == self._eos:
                    is_done[at] = True
                    continue
                row.append(token)
                text = self._decoded(row[len(prompts[at]) :])
                said[at] = cut_at_stop(text, options.stop)
                is_done[at] = said[at] != text
        return said

    def _decoded(self, ids: Sequence[int]) -> str:
        if self._decode is None:
            raise DataError(f'model "{self.name}": has no decode; give decode=')
        return self._decode(ids)


def _generator(seed: int, prompt: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    shares = (logits_V.double().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(shares, 1, generator=generator))


def module_fingerprint(module: torch.nn.Module) -> str:
    """Return SHA-256 of all parameters and buffers: names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def logits_of(outputs: Any) -> Any:
    """Return the logits of what a model's forward pass returned: itself, or its ``logits``."""
    return getattr(outputs, "logits", outputs)
