"""Which optimizations go together, in which order, and why others do not.

Every rule looks at two optimizations, the earlier one first, and either accepts them by saying
nothing or says why not. A stack is accepted when all its pairs are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowtide.evaluation.optimizations.base import Optimization
from lowtide.evaluation.optimizations.cache.policies import Policy
from lowtide.evaluation.optimizations.cache.quantised import CacheQuantiser
from lowtide.evaluation.optimizations.prompt.compressors import PromptCompressor
from lowtide.evaluation.optimizations.prompt.skipping import TokenSkipping
from lowtide.evaluation.optimizations.pruning.masks import MaskPruning
from lowtide.evaluation.optimizations.pruning.sparsegpt import SparseGpt
from lowtide.evaluation.optimizations.pruning.structured import BlockPartPruning
from lowtide.evaluation.optimizations.quantization.methods import (
    LinearExchange,
    WeightQuantization,
)


def _twice(first: Optimization, second: Optimization) -> str | None:
    if first.name == second.name:
        return "the same method twice has no agreed meaning; give it once, with other parameters"
    return None


def _one_of_a_kind(first: Optimization, second: Optimization) -> str | None:
    kinds: dict[Any, str] = {
        LinearExchange: "weights that are quantised cannot be quantised again",
        MaskPruning: "two masks need a rule for how their parts add up, and there is none",
        Policy: "two cache policies need a merge rule, and neither declares one",
        CacheQuantiser: "the cache is held in one number of bits",
        PromptCompressor: "two prompt compressors need a rule for what the second one sees",
        TokenSkipping: "tokens are skipped once",
    }
    for kind, reason in kinds.items():
        if isinstance(first, kind) and isinstance(second, kind):
            return reason
    return None


def _prune_before_codes(first: Optimization, second: Optimization) -> str | None:
    if isinstance(first, LinearExchange) and isinstance(second, MaskPruning | BlockPartPruning):
        is_simulated = isinstance(first, WeightQuantization) and first.simulated
        if not is_simulated:
            return "weights held as codes cannot be pruned; prune first"
        if isinstance(second, SparseGpt):
            return "its compensation takes weights off the grid; prune first"
    return None


def _choose_before_quantising_the_cache(first: Optimization, second: Optimization) -> str | None:
    if isinstance(first, CacheQuantiser) and isinstance(second, Policy):
        return "entries are chosen before what is kept is quantised; write the policy first"
    return None


def _one_count_to_rerotate(first: Optimization, second: Optimization) -> str | None:
    policy = next((each for each in (first, second) if isinstance(each, Policy)), None)
    has_skipping = isinstance(first, TokenSkipping) or isinstance(second, TokenSkipping)
    if policy is not None and has_skipping and policy.positions == "rerotated":
        return (
            "layers then hold different numbers of entries, so there is no one position to go on "
            "from; use positions=original"
        )
    return None


RULES: tuple[Callable[[Optimization, Optimization], str | None], ...] = (
    _twice,
    _one_of_a_kind,
    _prune_before_codes,
    _choose_before_quantising_the_cache,
    _one_count_to_rerotate,
)


def refusal(first: Optimization, second: Optimization) -> str | None:
    """Return why `second` cannot be applied after `first`, or None when it can."""
    for rule in RULES:
        reason = rule(first, second)
        if reason is not None:
            return reason
    return None
