"""Any causal language model of torch: a function from tokens to logits, and a tokenizer if any.

Shape letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        agree: For ranks that hold parts of one model and must do as many forward passes: from how
            many are needed here, or None where this rank failed before them, to how many are
            done. Extra ones repeat the last batch. Raises where another rank failed.
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
        agree: Callable[[int | None], int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size: got {batch_size}, allowed is 1 or more")
        self.name = name
        self._logits, self._encode, self._decode = logits, encode, decode
        self._fingerprint = fingerprint
        self._max_length, self._batch_size = max_length, batch_size
        self._bos, self._eos = bos, eos
        self._device = torch.device(device)
        self._agree = agree

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
        return self._score(lambda: rows)

    def _score(self, make_rows: Callable[[], Sequence[TokenRow]]) -> list[LogLikelihood]:
        cut: list[TokenRow] = []

        def prepare() -> list[list[int]]:
            cut.extend(self._fitting(row) for row in make_rows())
            return self._batches(sorted(range(len(cut)), key=lambda at: -len(cut[at].ids)))

        found: dict[int, LogLikelihood] = {}

        def read(batch: list[int]) -> None:
            part = [cut[index] for index in batch]
            found.update(zip(batch, self._score_batch(part), strict=True))

        self._go_through(prepare, read)
        return [found[index] for index in range(len(cut))]

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        size = self._batch_size
        return [list(indices[at : at + size]) for at in range(0, len(indices), size)]

    def _go_through(
        self, prepare: Callable[[], list[list[int]]], work: Callable[[list[int]], None]
    ) -> None:
        """Work on batches, as many as other ranks do.

        What fails before or after forward passes is raised when the others are not kept waiting.
        """
        try:
            batches = prepare()
        except Exception:
            if self._agree is not None:
                self._agree(None)
            raise
        if self._agree is not None:
            wanted = self._agree(len(batches))
            batches = batches + batches[-1:] * (wanted - len(batches))
        failure: DataError | None = None
        for batch in batches:
            try:
                work(batch)
            except DataError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _fitting(self, row: TokenRow) -> TokenRow:
        if not 1 <= row.first < len(row.ids):
            raise DataError(
                f"tokens: scoring starts at {row.first} of {len(row.ids)}; allowed is 1 or more, "
                "with a token behind it: a text needs a context, or the model a bos"
            )
        # The last token is predicted and not read.
        over = 0 if self._max_length is None else len(row.ids) - 1 - self._max_length
        if over <= 0:
            return row
        if over >= row.first:
            raise DataError(
                f"tokens: {len(row.ids) - row.first} are scored, allowed are {self._max_length}, "
                "which the model reads; take shorter windows"
            )
        return TokenRow(row.ids[over:], row.first - over)

    def _score_batch(self, rows: Sequence[TokenRow]) -> list[LogLikelihood]:
        logits_BTV = self._forward([row.ids[:-1] for row in rows])
        found = []
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            ids = _tensor(row.ids[row.first :]).to(logits_TV.device)
            # Position t predicts token t + 1. Only these positions, or float32 would take much.
            predicted = logits_TV[row.first - 1 : len(row.ids) - 1].float().log_softmax(dim=-1)
            scores = predicted.gather(1, ids[:, None]).double()
            is_greedy = bool((predicted.argmax(dim=-1) == ids).all())
            found.append(LogLikelihood(float(scores.sum()), len(ids), is_greedy))
        return found

    def _forward(self, rows: Sequence[Any]) -> Tensor:
        """Return logits of rows padded on the right, shape (B, T, V)."""
        width = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = _tensor(row)
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
        return self._score(lambda: [self._row(request) for request in requests])

    def _row(self, request: Continuation) -> TokenRow:
        before = self._encoded(request.context) if request.context else ()
        ids = self._encoded(request.context + request.text)
        pairs = zip(before, ids, strict=False)
        first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids)))
        if first == 0 and self._bos is not None:
            return TokenRow((self._bos, *ids), 1)
        return TokenRow(ids, max(1, first))

    # -- generating -------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], options: Generation) -> list[str]:
        """Return an answer to each prompt, up to a stop or `eos`.

        A prompt that is too long loses tokens on the left.

        Raises:
            DataError: there is no `encode` or `decode`, or a prompt without tokens.
        """
        rows: list[list[int]] = []

        def prepare() -> list[list[int]]:
            self._decoded(())  # before any forward pass: is there a decode?
            rows.extend(self._prompt(prompt, options.max_tokens) for prompt in prompts)
            return self._batches(range(len(rows)))

        answers: dict[int, str] = {}

        def work(batch: list[int]) -> None:
            drawing = [_generator(options.seed, prompts[index]) for index in batch]
            texts = self._continue([rows[index] for index in batch], drawing, options)
            answers.update(zip(batch, texts, strict=True))

        self._go_through(prepare, work)
        return [answers[index] for index in range(len(rows))]

    def _prompt(self, prompt: str, max_tokens: int) -> list[int]:
        ids = self._encoded(prompt) or (() if self._bos is None else (self._bos,))
        if not ids:
            raise DataError("prompt: has no tokens, and the model no bos")
        room = None if self._max_length is None else self._max_length - max_tokens
        if room is not None and room < 1:
            raise DataError(
                f"max_tokens: got {max_tokens}, allowed is less than what the model reads, "
                f"{self._max_length}"
            )
        return list(ids if room is None else ids[-room:])

    def _continue(
        self, prompts: list[list[int]], drawing: list[torch.Generator], options: Generation
    ) -> list[str]:
        answers = [_Answer(list(prompt), len(prompt)) for prompt in prompts]
        failure: DataError | None = None
        for _ in range(options.max_tokens):
            # Other ranks count on all forward passes, whatever becomes of this one's answers.
            if self._agree is None and (failure or all(each.is_done for each in answers)):
                break
            try:
                logits_BTV = self._forward([each.ids for each in answers])
                for each, logits_TV, generator in zip(answers, logits_BTV, drawing, strict=True):
                    self._extend(each, logits_TV, generator, options)
            except DataError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return [each.text for each in answers]

    def _extend(
        self, answer: _Answer, logits_TV: Tensor, generator: torch.Generator, options: Generation
    ) -> None:
        if answer.is_done:
            return
        token = _pick(logits_TV[len(answer.ids) - 1], options.temperature, generator)
        if token == self._eos:
            answer.is_done = True
            return
        answer.ids.append(token)
        text = self._decoded(answer.ids[answer.begin :])
        answer.text = cut_at_stop(text, options.stop)
        answer.is_done = answer.text != text

    def _encoded(self, text: str) -> tuple[int, ...]:
        if self._encode is None:
            raise DataError(
                f'model "{self.name}": has no encode, so it takes tokens alone; give encode=, or '
                'evaluate a "loss" task over bytes or tokens'
            )
        try:
            return tuple(int(token) for token in self._encode(text))
        except Exception as error:
            raise DataError(f'model "{self.name}": encode failed: {error!r}') from error

    def _decoded(self, ids: Sequence[int]) -> str:
        if self._decode is None:
            raise DataError(f'model "{self.name}": has no decode; give decode=')
        try:
            return self._decode(ids)
        except Exception as error:
            raise DataError(f'model "{self.name}": decode failed: {error!r}') from error


@dataclass(slots=True)
class _Answer:
    """One that is being generated: prompt and answer, and where the answer begins."""

    ids: list[int]
    begin: int
    text: str = ""
    is_done: bool = False


def _tensor(ids: Any) -> Tensor:
    return torch.from_numpy(np.array(ids, dtype=np.int64))


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
