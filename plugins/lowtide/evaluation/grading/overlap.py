"""Partial credit: tokens, sets and longest common subsequences, as precision, recall and F1.

F1 alone hides which of the two moved: (0.9, 0.6) and (0.6, 0.9) have the same one. All functions
give all three, and `mean_of_f1` differs from `f1_of_means`: say which one you publish.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lowtide.core.errors import DataError
from lowtide.evaluation.grading.text import normalise

_ROUGE_TOKEN = re.compile(r"[a-z0-9]+")


class Overlap(NamedTuple):
    """Shares of what was said that is right, and of what is right that was said."""

    precision: float
    recall: float
    f1: float


def _overlap(shared: int, said: int, wanted: int) -> Overlap:
    if said == 0 and wanted == 0:
        return Overlap(1.0, 1.0, 1.0)
    if shared == 0:
        return Overlap(0.0, 0.0, 0.0)
    return Overlap(shared / said, shared / wanted, 2 * shared / (said + wanted))


def _best(references: Sequence[str], compare: Callable[[str], Overlap]) -> Overlap:
    if not references:
        raise DataError("references: got none, allowed is one or more right answers")
    return max((compare(reference) for reference in references), key=lambda each: each.f1)


def token_overlap(output: str, references: Sequence[str]) -> Overlap:
    """Compare normalised tokens as multisets; the reference with the best F1 counts.

    This is SQuAD's and LongBench's F1, with its precision and recall.

    Raises:
        DataError: no reference.
    """
    said = Counter(normalise(output).split())

    def compare(reference: str) -> Overlap:
        wanted = Counter(normalise(reference).split())
        return _overlap((said & wanted).total(), said.total(), wanted.total())

    return _best(references, compare)


def rouge_l(output: str, references: Sequence[str]) -> Overlap:
    """Compare by the longest common subsequence of tokens (ROUGE-L on whole texts, beta 1).

    Tokens are runs of a-z and 0-9 in lower case, not stemmed.

    Raises:
        DataError: no reference.

    Source: Lin, "ROUGE" (2004), section 3.1.
    """
    said = _ROUGE_TOKEN.findall(output.lower())

    def compare(reference: str) -> Overlap:
        wanted = _ROUGE_TOKEN.findall(reference.lower())
        return _overlap(common_subsequence(said, wanted), len(said), len(wanted))

    return _best(references, compare)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    One bit of an integer for each element of `second` (Hyyrö 2004): a 10,000-token answer takes
    milliseconds where a table takes a minute.
    """
    places: dict[str, int] = {}
    for position, token in enumerate(second):
        places[token] = places.get(token, 0) | (1 << position)
    everything = (1 << len(second)) - 1
    row = everything
    for token in first:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return (row ^ everything).bit_count()


def parse_set(text: str, *, separator: str = r"[,;\n]|\band\b") -> set[str]:
    """Return the normalised elements of a list in a text; bullets and numbering are dropped."""
    parts = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", part) for part in re.split(separator, text))
    return {element for element in map(normalise, parts) if element}


def set_overlap(said: Iterable[str], wanted: Iterable[str]) -> Overlap:
    """Compare two sets of answers; elements count as equal after `normalise`."""
    one = {normalise(each) for each in said} - {""}
    other = {normalise(each) for each in wanted} - {""}
    return _overlap(len(one & other), len(one), len(other))


def mean_of_f1(overlaps: Sequence[Overlap]) -> float:
    """Return the mean of the items' F1.

    Raises:
        DataError: no items.
    """
    _some(overlaps)
    return sum(each.f1 for each in overlaps) / len(overlaps)


def f1_of_means(overlaps: Sequence[Overlap]) -> float:
    """Return the F1 of mean precision and mean recall; not the mean of the items' F1.

    Raises:
        DataError: no items.
    """
    _some(overlaps)
    precision = sum(each.precision for each in overlaps) / len(overlaps)
    recall = sum(each.recall for each in overlaps) / len(overlaps)
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _some(overlaps: Sequence[Overlap]) -> None:
    if not overlaps:
        raise DataError("overlaps: got none, allowed is one or more items")
