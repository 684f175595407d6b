"""FORMAT.md read aloud: one point after the other, by coordinates, with Python's own numbers.

Slow and without any of the reference's code: what the reference is held to on small chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Point = tuple[int, ...]
LIMITS = (0, 1, 2, 4, 6, 9, 13, 18, 26, 38, 54, 80, 120, 180, 270, 400, 600, 900, 1400, 2200, 3500)


@dataclass
class Pass:
    """Points in their order, and what the format says of the pass."""

    points: list[Point]
    level: int
    subset: tuple[int, ...]  # axes with odd multiples of s; empty where nothing predicts
    s: int
    group: int
    spacing: int  # of neighbouring points of the pass


def passes(shape: Sequence[int], weights: Sequence[int] | None) -> list[Pass]:
    everything = list(itertools.product(*map(range, shape)))
    if weights is None:
        return [Pass(everything, 1, (), 0, 0, 1)]
    n_levels = 0
    while 2**n_levels < max(shape):
        n_levels += 1
    result = [Pass([(0,) * len(shape)], max(n_levels, 1), (), 0, 0, 1)]
    for level in range(n_levels, 0, -1):
        s = 2 ** (level - 1)
        numbers = sorted(range(1, 2 ** len(shape)), key=lambda bits: (bits.bit_count(), bits))
        for bits in numbers:
            subset = tuple(d for d in range(len(shape)) if bits >> d & 1)
            points = [
                point
                for point in everything
                if all(x % (2 * s) == (s if d in subset else 0) for d, x in enumerate(point))
            ]
            group = 0 if level >= 3 else 1 if level == 2 else 1 + len(subset)
            if points:
                result.append(Pass(points, level, subset, s, group, 2 * s))
    return result


def moved(point: Point, axis: int, by: int) -> Point:
    return (*point[:axis], point[axis] + by, *point[axis + 1 :])


def main_axis(part: Pass, weights: Sequence[int]) -> int:
    return next(d for d in part.subset if weights[d] == max(weights[e] for e in part.subset))


def step_of_level(step: float, level: int, alpha: int, beta: int) -> float:
    f = 1.0
    for _ in range(level - 1):
        f = f * (1 + alpha / 8)
    return step / min(f, 1 + beta / 4)


def predict_on(known: dict[Point, Any], point: Point, d: int, s: int, cubic: bool, T: Any) -> Any:
    a, b = known[moved(point, d, -s)], known.get(moved(point, d, s))
    a3, b3 = known.get(moved(point, d, -3 * s)), known.get(moved(point, d, 3 * s))
    if b is None:
        return a if a3 is None else T(1.5) * a - T(0.5) * a3
    if cubic and a3 is not None and b3 is not None:
        return (T(9) * (a + b) - (a3 + b3)) * T(0.0625)
    if cubic and b3 is not None:
        return ((T(3) * a + T(6) * b) - b3) * T(0.125)
    if cubic and a3 is not None:
        return ((T(6) * a + T(3) * b) - a3) * T(0.125)
    return (a + b) * T(0.5)


def predict(
    known: dict[Point, Any], point: Point, part: Pass, weights: Sequence[int], cubic: bool, T: Any
) -> Any:
    if not part.subset:
        return T(0)
    W = sum(weights[d] for d in part.subset)
    p = None
    for d in part.subset:
        share = weights[d] / W if W else 1 / len(part.subset)
        if share == 0:
            continue
        p_d = predict_on(known, point, d, part.s, cubic, T)
        if share == 1:
            p = p_d
        else:
            p = T(share) * p_d if p is None else p + T(share) * p_d
    return p if np.isfinite(p) else T(0)


def interpolation_encode(
    work: Any, shape: Any, weights: Any, cubic: bool, alpha: int, beta: int, step: float
) -> tuple[list[int], list[Any]]:
    T = work.dtype.type
    values = dict(zip(itertools.product(*map(range, shape)), work, strict=True))
    codes: dict[Point, int] = {}
    known: dict[Point, Any] = {}
    with np.errstate(all="ignore"):
        for part in passes(shape, weights):
            step_l = np.float64(step_of_level(step, part.level, alpha, beta))
            new = {}
            for point in part.points:
                p = predict(known, point, part, weights, cubic, T)
                q = np.rint((np.float64(values[point]) - np.float64(p)) * (np.float64(1) / step_l))
                q = int(q) if abs(q) < 2**30 else 0
                r = T(np.float64(p) + np.float64(q) * step_l)
                if not np.isfinite(r):
                    q, r = 0, p
                codes[point], new[point] = q, r
            known.update(new)
    return [codes[point] for point in values], [known[point] for point in values]


def difference_codes(numbers: Any, shape: Sequence[int], orders: Sequence[int]) -> list[int]:
    """Differences of integers, modulo 2**32, as signed numbers."""
    c = dict(zip(itertools.product(*map(range, shape)), map(int, numbers), strict=True))
    for axis, order in enumerate(orders):
        for _ in range(order):
            c = {point: c[point] - c.get(moved(point, axis, -1), 0) for point in c}
    return [(number + 2**31) % 2**32 - 2**31 for number in c.values()]


# --- the section of codes ---

Lane = dict[Point, None]  # in order, and quick to ask


def lanes_of(part: Pass) -> tuple[Lane, Lane]:
    for axis in range(len(part.points[0])):
        coordinates = sorted({point[axis] for point in part.points})
        if len(coordinates) > 1:
            ours = coordinates[: math.ceil(len(coordinates) / 2)]
            lanes: tuple[Lane, Lane] = ({}, {})
            for point in part.points:
                lanes[point[axis] not in ours][point] = None
            return lanes
    return dict.fromkeys(part.points), {}


def turns_of(lanes: tuple[Lane, Lane]) -> Iterator[tuple[int, Point]]:
    rows: tuple[dict[Point, list[Point]], ...] = ({}, {})
    for lane in (0, 1):
        for point in lanes[lane]:
            rows[lane].setdefault(point[:-1], []).append(point)
    for row, partner in itertools.zip_longest(rows[0].values(), rows[1].values(), fillvalue=[]):
        for points in itertools.zip_longest(row, partner):
            yield from ((lane, point) for lane, point in enumerate(points) if point is not None)


@dataclass
class Section:
    """A section taken apart: `head`, `tables` as written, and what the scan made of the rest."""

    head: int
    tables: list[list[int]]
    codes: list[int]  # C order
    scanned: list[tuple[int, int, int]]  # group, bucket, token in the order of the scan


def read_section(section: bytes, shape: Sequence[int], weights: Sequence[int] | None) -> Section:
    data = iter(section)
    head = next(data)
    h, kept = head & 7, bool(head & 8)
    B = (21 >> h) + 1
    tables: list[list[int]] = []
    for _ in range((6 if kept else 1) * B):
        tables.append([])
        for _ in range(next(data)):
            number = shift = 0
            while (byte := next(data)) & 128:
                number, shift = number | (byte & 127) << shift, shift + 7
            tables[-1].append(number | byte << shift)

    def unsigned(n_bytes: int) -> int:
        return int.from_bytes(bytes(next(data) for _ in range(n_bytes)), "little")

    n_words, *states = (unsigned(4) for _ in range(3))
    words = [unsigned(2) for _ in range(n_words)]
    extra = [byte >> k & 1 for byte in data for k in range(8)]
    m: dict[Point, int] = {}
    u: dict[Point, int] = {}
    scanned = []
    for part in passes(shape, weights):
        lanes = lanes_of(part)
        for lane, point in turns_of(lanes):
            A = 0
            for weight, axis in zip((2, 2, 1), range(len(shape) - 1, -1, -1), strict=False):
                before = moved(point, axis, -part.spacing)
                A += weight * m[before] if before in lanes[lane] else 0
            if part.subset:
                assert weights is not None
                d = main_axis(part, weights)
                A += m[moved(point, d, -part.s)] + m.get(moved(point, d, part.s), 0)
            bucket = sum(limit < A for limit in LIMITS)
            table = tables[(part.group if kept else 0) * B + (bucket >> h)]
            v, token, cum = states[lane] & 4095, 0, 0
            while v >= cum + table[token]:
                cum, token = cum + table[token], token + 1
            states[lane] = table[token] * (states[lane] >> 12) + v - cum
            if states[lane] < 2**16:
                states[lane] = states[lane] << 16 | words.pop(0)
            u[point] = token
            if token >= 16:
                n = (token - 16) // 4 + 4
                low = sum(extra.pop(0) << k for k in range(n - 2))
                u[point] = 1 << n | (token - 16) % 4 << n - 2 | low
            m[point] = min(u[point], 1023)
            scanned.append((part.group, bucket, token))
    assert states == [2**16, 2**16]
    assert words == []
    assert len(extra) < 8
    assert not any(extra)
    codes = [
        u[point] // 2 if u[point] % 2 == 0 else -(u[point] + 1) // 2
        for point in itertools.product(*map(range, shape))
    ]
    return Section(head, tables, codes, scanned)


def counts_of(section: Section, h: int, kept: bool) -> list[dict[int, int]]:
    """For each context of a merging: how often each token occurs in it."""
    B = (21 >> h) + 1
    counts: list[dict[int, int]] = [{} for _ in range((6 if kept else 1) * B)]
    for group, bucket, token in section.scanned:
        context = counts[(group if kept else 0) * B + (bucket >> h)]
        context[token] = context.get(token, 0) + 1
    return counts


def frequencies(counts: dict[int, int]) -> list[int]:
    if not counts:
        return []
    total = sum(counts.values())
    f = [0] * (max(counts) + 1)
    for token, count in counts.items():
        f[token] = max(1, math.floor(count * 4096 / total))
    if sum(f) < 4096:
        largest = min(token for token in counts if counts[token] == max(counts.values()))
        f[largest] += 4096 - sum(f)
    while sum(f) > 4096:
        f[f.index(max(f))] -= 1
    return f


def cost_of(counts: list[dict[int, int]]) -> float:
    cost = 8.0 * len(counts)
    for context in counts:
        total = sum(context.values())
        cost += sum(n * math.log2(total / n) + 10 for n in context.values())
    return cost
