"""Answers as text: what counts as the same, and patterns."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

from lowtide.core.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
PATTERN_INPUT_CHARACTERS = 20_000
"""A pattern sees at most so many characters, from the end: Python's `re` cannot be timed out."""


def normalise(text: str) -> str:
    """Return `text` in NFKC, lower case, without ASCII punctuation, English articles, odd spaces.

    The normalisation of the SQuAD and LongBench scores, after Unicode's own.
    """
    lowered = unicodedata.normalize("NFKC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(output: str, references: Iterable[str], *, is_normalised: bool = True) -> bool:
    """Tell whether `output` is one of `references`.

    Args:
        output: What the model said.
        references: Right answers.
        is_normalised: Compare after `normalise`; else character by character, outer space aside.
            What normalises to nothing (an answer ``+``) is compared without normalisation.
    """
    for reference in references:
        if output.strip() == reference.strip():
            return True
        if is_normalised and normalise(reference) and normalise(output) == normalise(reference):
            return True
    return False


def compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern ready for use; ``.`` does not match a line's end.

    Raises:
        DataError: not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"pattern: {pattern!r} is no regular expression: {error}") from None


def extract(output: str, pattern: re.Pattern[str]) -> str | None:
    """Return the last match in `output`: its first group, or all of it; None without a match.

    The last one, because models reason first and answer then.
    """
    found = None
    for match in pattern.finditer(output[-PATTERN_INPUT_CHARACTERS:]):
        found = match
    if found is None:
        return None
    return (found.group(1) if pattern.groups else found.group(0)) or ""


def regex_match(output: str, pattern: re.Pattern[str], references: Iterable[str] = ()) -> bool:
    """Tell whether `pattern` is in `output`, and what it extracts is one of `references`, if any.

    Args:
        output: What the model said.
        pattern: From `compiled`.
        references: Right answers; none means that a match is enough.
    """
    found = extract(output, pattern)
    wanted = list(references)
    if found is None:
        return False
    return not wanted or exact_match(found, wanted)
