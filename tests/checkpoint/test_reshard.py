"""Loading into other numbers of ranks and other ZeRO stages, against stock's universal format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.reshard_worker import MATRIX, VARIANTS
from tests.helpers.ranks import run_ranks

WORKER = "tests/checkpoint/reshard_worker.py"
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 3 ranks saved, in all stages and two precisions."""
    folder = tmp_path_factory.mktemp("reshard")
    run_ranks([WORKER, str(folder), "save"], nproc=3, timeout_s=180).check()
    return folder


@pytest.fixture(scope="module")
def by_two(root: Path) -> list[Facts]:
    """One start of 2 ranks: they save, load what 3 saved, and load their own otherwise."""
    argv = [WORKER, str(root), "save", "load", "variants", "partial"]
    return run_ranks(argv, nproc=2, timeout_s=280).check().results


@pytest.fixture(scope="module")
def loaded(root: Path, by_two: list[Facts]) -> dict[str, list[Facts]]:
    """Facts of all ranks by case."""
    found: dict[str, list[Facts]] = {}
    for nproc in MATRIX:
        results = by_two
        if nproc != 2:
            argv = [WORKER, str(root), "load"]
            results = run_ranks(argv, nproc=nproc, timeout_s=180).check().results
        for case in results[0]:
            if " to " in case:
                found[case] = [result[case] for result in results]
    return found


def cases() -> list[tuple[str, bool]]:
    return [
        (f"{source} to w{size}_z{stage}_{precision}{'_cpu' if is_offloaded else ''}", has_rival)
        for size, rows in MATRIX.items()
        for source, stage, precision, is_offloaded, has_rival in rows
    ]


def check_loaded(facts: Facts, saved_by: int, *, is_other_precision: bool = False) -> None:
    assert facts["needs"]
    assert facts["states"] == []  # masters and moments, through DeepSpeed's own accessors
    assert facts["weights"] == []  # and what the model computes with, frozen ones, buffers
    # Saved again, the checkpoint says the same; frozen parameters are in the new precision.
    frozen = ["fp32 frozen.bias", "fp32 frozen.weight"] if is_other_precision else []
    assert facts["saved_again"] == frozen
    assert facts["client"] == [7, [0, 1, 2], False]
    assert facts["counters"] == [3, 3 * 4 * saved_by, 0]
    assert facts["scheduler"] == 2


@pytest.mark.parametrize("case", [case for case, _ in cases()])
def test_everything_arrives_when_ranks_or_stage_differ(
    loaded: dict[str, list[Facts]], case: str
) -> None:
    for facts in loaded[case]:
        source, target = case.split(" to ")
        is_other = source.split("_")[2] != target.split("_")[2]
        check_loaded(facts, int(source[1]), is_other_precision=is_other)
        assert facts["lr"] == [0.005, 0.0015]
        assert facts["decay"] == [0.1, 0.0]


@pytest.mark.parametrize("case", [case for case, has_rival in cases() if has_rival])
def test_it_is_stocks_universal_load_bit_for_bit(loaded: dict[str, list[Facts]], case: str) -> None:
    for facts in loaded[case]:
        assert facts["universal_files"] == []
        assert facts["rival"] == []
        assert facts["losses"] == facts["rival_losses"]
        assert facts["rival_after"] == []
        assert len(set(facts["losses"])) == 3


def test_training_goes_on_alike_when_only_the_stage_differs(
    loaded: dict[str, list[Facts]],
) -> None:
    # Stock cannot go from stage 2 to 3 or back: held to its load within the stage.
    case, rival = "w2_z3_bf16 to w3_z2_bf16_cpu", "w2_z3_bf16 to w3_z3_bf16"
    for facts, other in zip(loaded[case], loaded[rival], strict=True):
        assert facts["losses"] == pytest.approx(other["rival_losses"], abs=1e-3)


@pytest.mark.parametrize("case", [row[0] for row in VARIANTS])
def test_everything_arrives_in_other_layouts(by_two: list[Facts], case: str) -> None:
    precision = "fp32" if case in ("to_order", "from_plain", "to_plain", "scaled") else "bf16"
    rival = "w2_z2_bf16 to w2_z1_bf16" if precision == "bf16" else "w2_z1_fp32 to w2_z2_fp32"
    for result in by_two:
        facts = result[case]
        check_loaded(facts, 2)
        if case == "elastic":  # stores no hyperparameters, neither for stock
            continue
        if case != "from_plain_bf16":  # one group
            assert facts["lr"] == [0.005, 0.0015]
            assert facts["decay"] == [0.1, 0.0]
            tolerance = 2e-2 if case == "scaled" else 1e-3  # fp16
            wanted = result[rival]["rival_losses"]
            assert facts["losses"] == pytest.approx(wanted, abs=tolerance)
        assert facts["scale"] == (512 if case == "scaled" else 1)


def test_nothing_is_resharded_when_the_layout_is_the_same(by_two: list[Facts]) -> None:
    assert [facts["same_layout_needs"] for facts in by_two] == [False, False]


def test_only_what_was_asked_for_is_loaded(by_two: list[Facts]) -> None:
    for facts in by_two:
        assert facts["no_scheduler"] == [-1, True]
        assert facts["untrained"] == [0, 0]
        # differing masters, steps, tensors with optimizer state, scheduler's step
        assert facts["load_optimizer_states"] == [[], 3, 0, 2]
        assert facts["load_module_only"] == [[], 0, 0, 2]
        assert facts["groups_module_only"] == "no error"
        assert facts["buffer_not_strict"] == "no error"
        assert facts["buffer_kept"] == [1.0, 1.0]


def test_all_ranks_raise_when_one_cannot_read(by_two: list[Facts]) -> None:
    text = "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt: cannot be read"
    assert text in by_two[0]["damaged"]
    assert text in by_two[1]["damaged"]
    assert by_two[0]["damaged"].startswith("rank 1 cannot load it: ")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("pipeline", "this engine runs with pipeline parallelism; "),
        ("no_folder", "nowhere: holds neither *_states.pt nor a readable file latest"),
        ("width", '"first.weight" is (13, 7) there and (15, 7) here'),
        ("groups", "its optimizer has 2 parameter groups, this one 1"),
        ("buffer", 'only one of the two has the buffers "extra"'),
    ],
)
def test_what_does_not_fit_is_refused(by_two: list[Facts], case: str, text: str) -> None:
    for facts in by_two:
        assert text in facts[case]
