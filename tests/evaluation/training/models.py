"""A small language model over bytes, its batches, and suites for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.evaluation.rows import mcq_rows, write

TEXT = (b"It was the best of times, it was the worst of times, it was the age of wisdom. " * 12)[
    :900
]


class Bytes(nn.Module):
    """Predicts the next byte; dropout draws random numbers in training."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mixing = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.frozen = nn.Dropout(0.5)  # a script may keep a part in evaluation
        self.frozen.eval()
        self.head = nn.Linear(width, 256)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.dropout(self.embedding(tokens_BT))
        x_BTD = self.frozen(torch.tanh(self.mixing(x_BTD)[0]))
        logits_BTV: Tensor = self.head(x_BTD)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


class Attending(nn.Module):
    """The same in linear layers alone, whose weights ZeRO 3 divides and gathers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        past_BTD = x_BTD.cumsum(dim=1) / 8
        x_BTD = self.second(self.dropout(F.gelu(self.first(x_BTD + past_BTD))))
        logits_BTV: Tensor = self.head(x_BTD)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1000 * step + rank)
    data = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - 33, (4,), generator=random)
    rows = data[starts[:, None] + torch.arange(33)]
    return rows[:, :-1], rows[:, 1:]


def write_suite(folder: Path, *, with_texts: bool = False) -> Path:
    """Write a suite: a loss over bytes, and with texts all other kinds."""
    (folder / "held_out.txt").write_bytes(TEXT[::-1])
    tasks: list[dict[str, Any]] = [
        {
            "name": "held_out",
            "kind": "loss",
            "file": "held_out.txt",
            "window": 64,
            "vocabulary": 256,
        }
    ]
    if with_texts:
        rows = mcq_rows(5)
        rows[1]["choices"] = [*rows[1]["choices"][:2], "a third one"]  # not as many as others
        rows[1]["answer"] = 0
        write(folder / "mcq.jsonl", *rows)
        opens = [
            {"schema": "open/1", "id": f"o{n}", "prompt": "It was the " * (n + 1),
             "references": ["best"], "grader": {"type": "exact"}}
            for n in range(3)
        ]  # fmt: skip
        write(folder / "open.jsonl", *opens)
        tasks += [
            {"name": "mcq", "kind": "mcq", "file": "mcq.jsonl", "shuffles": 2},
            {"name": "open", "kind": "open", "file": "open.jsonl", "max_tokens": 3},
        ]
    path = folder / "suite.json"
    path.write_text(json.dumps({"format": 1, "tasks": tasks}))
    return path


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: Any) -> str:
    return bytes(int(each) for each in ids).decode(errors="replace")
