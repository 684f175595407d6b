"""What codecs really do to the fields of `lowtide.quality.study`: labels to learn and test on.

Measuring takes minutes, so labels are kept in a folder, one JSON line for each field and step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality_codecs

from lowtide.quality.candidates import Candidate
from lowtide.quality.measurement import measure
from lowtide.quality.study.fields import Snapshot, snapshots

GRID = tuple(10 ** (-1 - half / 2) for half in range(9))  # 1e-1 to 1e-5, half decades
BETWEEN = tuple(10**-exponent for exponent in (1.25, 2.75, 4.25))  # only ever tested on
METRICS = ("psnr_db", "dssim", "error_autocorr", "spectral_error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One candidate on one field at one step."""

    candidate: Candidate
    values: dict[str, float | None]
    encode_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """One field at one step, and all that was measured on it."""

    snapshot: Snapshot
    measured: list[Measured]


def labelled(seed: int, *, edge: int, steps: int, folder: Path) -> list[Labelled]:
    """Return all fields with their labels, measured now or read from `folder`."""
    path = folder / f"labels-seed{seed}-edge{edge}-steps{steps}.jsonl"
    made = list(snapshots(edge=edge, steps=steps, seed=seed))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for snapshot in made:
                file.write(json.dumps([*_rows(snapshot)]) + "\n")
        part.rename(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for snapshot, line in zip(made, lines, strict=True):
        measured = [
            Measured(
                candidate=Candidate.of(row["codec"]), values=row["values"],
                encode_s=row["encode_s"], decode_s=row["decode_s"],
            )
            for row in json.loads(line)
        ]  # fmt: skip
        found.append(Labelled(snapshot=snapshot, measured=measured))
    return found


def _rows(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    for codec in quality_codecs.installed():
        for bound in sorted((*GRID, *BETWEEN), reverse=True):
            candidate = Candidate.of({**codec, "mode": "rel", "bound": bound})
            report = measure(snapshot.values, candidate, METRICS)
            values = {name: report.value(name) for name in ("compression_ratio", *METRICS)}
            yield {
                "codec": candidate.config(), "values": values,
                "encode_s": report.encode_s, "decode_s": report.decode_s,
            }  # fmt: skip
