"""The cost model: the fit of a link, the time of a GEMM, what runs beside what."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import ConfigError, UnknownNameError
from lowtide.tensor_parallel.costs import (
    GPUS,
    GemmRates,
    Link,
    LinkSample,
    Machine,
    fit_link,
    machine,
)
from lowtide.tensor_parallel.footprint import (
    DecoderShape,
    block_parameters,
    end_parameters,
)
from lowtide.tensor_parallel.presets import preset
from lowtide.tensor_parallel.timing import Batch, block_time, end_time, update_s
from lowtide.tensor_parallel.traffic import (
    BOTTLENECK,
    FULL_RANK,
    NAIVE,
    SCHEMES,
    BlockShape,
    Kind,
    Scheme,
    in_turns,
)
from lowtide.tensor_parallel.work import (
    PASSES,
    backward_sweeps,
    block_linears,
    forward_sweeps,
    recomputed_linears,
    recomputed_sweeps,
)

KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = [1e3 * 10 ** (step / 3) for step in range(16)]
BLOCK = BlockShape(
    width=64, mlp_width=96, heads=8, kv_heads=4, head_width=8, attention_rank=16, mlp_rank=24
)
BATCH = Batch(micro_batch=2, sequence=128)


def ring_s(sample: LinkSample, alpha_s: float, beta: float) -> float:
    """Return the time of a ring, written from its steps: each moves 1/p of the payload."""
    steps = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[sample.kind]
    steps *= sample.ranks - 1
    return steps * (sample.messages * alpha_s + sample.payload_bytes / sample.ranks / beta)


def samples_of(
    sizes: list[float], alpha_s: float, beta: float, *, noise: float = 0.0, outliers: int = 0
) -> list[LinkSample]:
    random = np.random.default_rng(3)
    found = []
    for place, size in enumerate(sizes):
        for kind in KINDS:
            for ranks in (2, 4):
                sample = LinkSample(kind=kind, ranks=ranks, payload_bytes=size, seconds=1.0)
                seconds = ring_s(sample, alpha_s, beta) * random.lognormal(0.0, noise)
                if outliers and place % outliers == 0:
                    seconds *= 4.0
                found.append(dataclasses.replace(sample, seconds=seconds))
    return found


@pytest.mark.parametrize(("alpha_s", "beta"), [(1.3e-5, 2.2e11), (2e-4, 1.1e9), (1e-6, 1e12)])
def test_fit_finds_the_link_exactly_when_nothing_disturbs(alpha_s: float, beta: float) -> None:
    link = fit_link(samples_of(SIZES, alpha_s, beta))
    assert link.alpha_s == pytest.approx(alpha_s, rel=1e-6)
    assert link.beta_bytes_per_s == pytest.approx(beta, rel=1e-6)
    assert link.residual == pytest.approx(0.0, abs=1e-9)


def test_fit_predicts_sizes_it_has_not_seen_when_times_scatter() -> None:
    truth = (1.3e-5, 2.2e11)
    link = fit_link(samples_of(SIZES[::2], *truth, noise=0.05))
    errors = [link.error(sample) for sample in samples_of(SIZES[1::2], *truth)]
    assert max(map(abs, errors)) < 0.02
    assert link.alpha_s == pytest.approx(truth[0], rel=0.02)
    assert link.beta_bytes_per_s == pytest.approx(truth[1], rel=0.02)
    assert 0.01 < (link.residual or 0.0) < 0.06  # the median of |N(0, 0.05)| is 0.034


def test_fit_is_little_disturbed_by_interrupted_repeats() -> None:
    truth = (1.3e-5, 2.2e11)
    disturbed = samples_of(SIZES, *truth, noise=0.02, outliers=3)
    link = fit_link(disturbed)
    assert link.alpha_s == pytest.approx(truth[0], rel=0.02)  # least squares: 10 and 12 %
    assert link.beta_bytes_per_s == pytest.approx(truth[1], rel=0.02)


def test_fit_takes_several_messages_as_one_sample() -> None:
    truth = (1e-5, 1e11)
    found = []
    for messages, size in ((1, 1e6), (7, 1e6), (3, 1e8), (4, 3e7)):
        sample = LinkSample(
            kind="all_reduce", ranks=4, payload_bytes=size, seconds=1.0, messages=messages
        )
        found.append(dataclasses.replace(sample, seconds=ring_s(sample, *truth)))
    link = fit_link(found)
    assert (link.alpha_s, link.beta_bytes_per_s) == pytest.approx(truth, rel=1e-6)
    assert [link.error(sample) for sample in found] == pytest.approx([0.0] * 4, abs=1e-9)


def test_fit_has_no_negative_latency() -> None:
    """Times that grow faster than sizes would pull the latency below zero."""
    found = [
        LinkSample(kind="all_reduce", ranks=2, payload_bytes=size, seconds=size**1.1 / 1e10)
        for size in SIZES
    ]
    link = fit_link(found)
    assert link.alpha_s == 0.0
    assert link.beta_bytes_per_s > 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (samples_of(SIZES, 1e-5, 1e11)[:2], "got 2, allowed are 3 or more"),
        (
            [LinkSample(kind="all_reduce", ranks=1, payload_bytes=8, seconds=1)] * 3,
            "2 or more ranks and a positive time",
        ),
        (
            [LinkSample(kind="all_reduce", ranks=2, payload_bytes=8, seconds=0)] * 3,
            "2 or more ranks and a positive time",
        ),
        (
            [
                LinkSample(kind="all_reduce", ranks=2, payload_bytes=size, seconds=1e-4)
                for size in SIZES
            ],
            "do not grow with their sizes",
        ),
    ],
)
def test_samples_that_say_nothing_are_refused(samples: list[LinkSample], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_link(samples)


def test_one_rank_takes_no_time() -> None:
    link = Link(alpha_s=1e-5, beta_bytes_per_s=1e9)
    assert all(link.seconds(kind, 1e9, 1) == 0.0 for kind in KINDS)


def test_gemm_reaches_more_of_the_peak_the_more_it_computes_per_byte() -> None:
    gemms = machine("A100-80GB").gemms
    shares = [gemms.utilisation((16384, k, 4096)) for k in (64, 256, 1024, 4096, 16384)]
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < 0.4
    assert 0.7 < shares[-1] < gemms.peak_share
    bound = 2.0 * 16384 * 1024 * 4096 / 312e12
    assert gemms.seconds((16384, 1024, 4096)) > bound
    assert gemms.seconds((4096, 1024, 16384)) == gemms.seconds((16384, 1024, 4096))


def test_a_batch_of_gemms_is_launched_once() -> None:
    gemms = machine("A100-80GB").gemms
    one, three = (gemms.seconds((256, 64, 64), count) for count in (1, 3))
    assert three == pytest.approx(3 * one - 2 * gemms.kernel_s)


def test_measured_gemms_replace_the_model() -> None:
    made = GemmRates(peak_flops_per_s=1e12, memory_bytes_per_s=1e12, measured={(4, 5, 6): 0.25})
    assert made.seconds((4, 5, 6)) == 0.25
    assert made.seconds((4, 5, 6), 3) == 0.75
    assert made.seconds((4, 6, 5)) != 0.25


def test_machines_go_by_their_names() -> None:
    assert machine("A100").name == machine("a100-80gb").name == "A100-80GB"
    assert machine("h200").gpu is GPUS["H200-141GB"]
    given = machine("H100", link_bytes_per_s=1e11, hop_s=0.0)
    assert given.link == Link(alpha_s=0.0, beta_bytes_per_s=1e11)
    for name, gpu in GPUS.items():
        link = machine(name).link
        assert 0.5 * gpu.link_bytes_per_s < link.beta_bytes_per_s < gpu.link_bytes_per_s


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("A10-80GB", {}, UnknownNameError, 'Did you mean "a100-80gb"'),
        ("A100", {"link_bytes_per_s": 0.0}, ConfigError, "link_bytes_per_s: got 0.0"),
        ("A100", {"link_bytes_per_s": float("nan")}, ConfigError, "link_bytes_per_s: got nan"),
        ("A100", {"hop_s": -1.0}, ConfigError, "hop_s: got -1.0"),
    ],
)
def test_machines_that_cannot_be_are_refused(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        machine(name, **options)


def flat(**changes: Any) -> Machine:
    """Return a machine on which every kernel takes a second and nothing else takes time."""
    gemms = GemmRates(
        peak_flops_per_s=1e30, memory_bytes_per_s=1e30, memory_share=0.0, kernel_s=1.0
    )
    made = machine("A100").replace(
        gemms=gemms,
        attention_flops_per_s=1e30,
        stream_bytes_per_s=1e30,
        kernel_s=0.0,
        link=Link(alpha_s=0.0, beta_bytes_per_s=1e30),
    )
    return made.replace(**changes)


def test_every_gemm_is_counted_once() -> None:
    for scheme in SCHEMES:
        linears = block_linears(BLOCK, 2, scheme)
        found = block_time(BLOCK, 2, scheme, batch=BATCH, machine=flat())
        assert found.forward.gemm_s == pytest.approx(len(linears))
        assert found.backward.gemm_s == pytest.approx(2 * len(linears))
        assert found.recompute.total_s == 0.0
        assert found.total_s == pytest.approx(3 * len(linears))


def test_attention_and_sweeps_are_counted_once() -> None:
    made = flat(
        gemms=dataclasses.replace(flat().gemms, kernel_s=0.0),
        attention_flops_per_s=1e9,
        stream_bytes_per_s=1e9,
    )
    tokens, sequence = 256, 128
    for scheme, heads in ((BOTTLENECK, 4), (NAIVE, 8)):
        found = block_time(BLOCK, 2, scheme, batch=BATCH, machine=made)
        pairs = sequence * sequence / 2 * 2  # of query and key, in both sequences
        attention_s = 2 * 2 * pairs * heads * 8 / 1e9  # two products of 8 wide heads
        assert found.forward.attention_s == pytest.approx(attention_s)
        assert found.backward.attention_s == pytest.approx(2.5 * attention_s)
        elements = sum(sweep.elements for sweep in forward_sweeps(BLOCK, 2, scheme))
        assert found.forward.sweep_s == pytest.approx(2 * elements * tokens / 1e9)
        elements = sum(sweep.elements for sweep in backward_sweeps(BLOCK, 2, scheme))
        assert found.backward.sweep_s == pytest.approx(2 * elements * tokens / 1e9)


def test_sweeps_touch_only_what_a_rank_holds() -> None:
    d, f, qk, latents = 64 // 2, 96 // 2, (64 + 32) // 2, 4 * 16 + 3 * 24
    found = {s.name: s.elements for s in forward_sweeps(BLOCK, 2, BOTTLENECK)}
    assert found == {
        "norm": 4 * d,
        "rotary": 2 * qk,
        "gate": 3 * f,
        "residual": 6 * d,
        "latents": 3 * latents,
    }
    naive = {s.name: s.elements for s in forward_sweeps(BLOCK, 2, NAIVE)}
    assert naive["gate"] == 2 * found["gate"]
    assert naive["latents"] == 2 * latents // 2
    assert "latents" not in {s.name for s in forward_sweeps(BLOCK, 2, FULL_RANK)}


@pytest.mark.parametrize(("message_s", "hidden_s"), [(0.25, 0.25), (40.0, 1.0)])
def test_a_message_hides_at_most_the_gemm_beside_it(message_s: float, hidden_s: float) -> None:
    """Four latents go back, each beside the weight gradient of its own B, one second long."""
    alpha_s = message_s / 2  # two steps between two ranks
    made = flat(link=Link(alpha_s=alpha_s, beta_bytes_per_s=1e30))
    shape = dataclasses.replace(BLOCK, kv_heads=8)  # q, k and v: one batched GEMM
    found = block_time(shape, 2, BOTTLENECK, batch=BATCH, machine=made)
    assert found.backward.message_s == pytest.approx(4 * message_s)
    assert found.backward.hidden_s == pytest.approx(4 * hidden_s)
    assert found.forward.message_s == pytest.approx(4 * message_s)
    assert found.forward.hidden_s == 0.0
    exposed = dataclasses.replace(BOTTLENECK, is_overlapped=False)
    later = block_time(shape, 2, exposed, batch=BATCH, machine=made)
    assert later.backward.hidden_s == 0.0
    assert later.total_s - found.total_s == pytest.approx(4 * hidden_s)


@pytest.mark.parametrize(
    ("scheme", "message_s", "hidden_s"),
    [
        # GEMMs before, between and after its messages: 1, 2, 2, 2 and 1 of one second each.
        (BOTTLENECK, 0.25, 2.0),
        (BOTTLENECK, 1.5, 2.5 + 3.0 + 3.0 + 2.5),
        (BOTTLENECK, 40.0, 3.0 + 4.0 + 4.0 + 3.0),
        # Both factors before each of its messages, nothing after the last.
        (NAIVE, 40.0, 4.0 + 4.0 + 4.0 + 2.0),
        # Gathered, both GEMMs, scattered; twice. The first and the last have one neighbour.
        (FULL_RANK, 40.0, 2.0 + 2.0 + 2.0 + 2.0),
    ],
)
def test_halves_hide_what_the_other_half_computes(
    scheme: Scheme, message_s: float, hidden_s: float
) -> None:
    steps = 1 if scheme is FULL_RANK else 2  # of a ring of two
    made = flat(link=Link(alpha_s=message_s / steps, beta_bytes_per_s=1e30))
    shape = dataclasses.replace(BLOCK, kv_heads=8)
    found = block_time(shape, 2, in_turns(scheme), batch=BATCH, machine=made)
    plain = block_time(shape, 2, scheme, batch=BATCH, machine=made)
    assert found.forward.message_s == pytest.approx(8 * message_s)
    assert found.forward.hidden_s == pytest.approx(hidden_s)
    assert found.forward.gemm_s == 2 * plain.forward.gemm_s  # here GEMMs do not get shorter
    assert found.backward.gemm_s == 2 * plain.backward.gemm_s
    assert found.backward.message_s == pytest.approx(2 * plain.backward.message_s)
    assert found.backward.hidden_s == pytest.approx(2 * plain.backward.hidden_s)
    alone = Batch(micro_batch=1, sequence=128)
    assert block_time(shape, 2, in_turns(scheme), batch=alone, machine=made) == block_time(
        shape, 2, scheme, batch=alone, machine=made
    )


def test_recomputation_costs_what_runs_again() -> None:
    linears = block_linears(BLOCK, 2, BOTTLENECK)
    none, latents, parts = (
        block_time(BLOCK, 2, BOTTLENECK, batch=BATCH, machine=machine("A100"), tier=tier)  # type: ignore[arg-type]
        for tier in ("none", "latents", "sharded_latents")
    )
    assert latents.recompute.message_s == none.recompute.total_s == 0.0
    assert parts.recompute.message_s > 0.0
    made = machine("A100").gemms
    again_s = sum(
        made.seconds(layer.gemm(256, "forward"), layer.count)
        for layer in recomputed_linears(linears)
    )
    assert latents.recompute.gemm_s == pytest.approx(again_s)
    kernels = sum(sweep.kernels for sweep in recomputed_sweeps(BLOCK, 2, BOTTLENECK))
    assert latents.recompute.sweep_s > kernels * machine("A100").kernel_s
    assert latents.forward == none.forward
    whole = block_time(BLOCK, 2, NAIVE, batch=BATCH, machine=machine("A100"), tier="latents")
    assert whole.recompute.gemm_s == pytest.approx(whole.forward.gemm_s)
    assert whole.recompute.message_s == pytest.approx(whole.forward.message_s)


def test_ends_and_update() -> None:
    decoder = DecoderShape(block=BLOCK, layers=3, vocabulary=1000)
    found = end_time(decoder, 2, BOTTLENECK, batch=BATCH, machine=flat())
    assert found.gemm_s == pytest.approx(len(PASSES))  # the head's
    made = flat(stream_bytes_per_s=1.0)
    swept = end_time(decoder, 2, BOTTLENECK, batch=BATCH, machine=made)
    # Embedding and norm on half of d: 5 and 6 times; 30 bytes for each of a rank's logits.
    assert swept.sweep_s == pytest.approx(256 * (2 * 11 * 32 + 30 * 500))
    parameters = 3 * block_parameters(BLOCK, 2, BOTTLENECK) + end_parameters(decoder, 2)
    assert update_s(decoder, 2, BOTTLENECK, made) == 30 * parameters
    with_latency = flat(link=Link(alpha_s=1.0, beta_bytes_per_s=1e30))
    ours = end_time(decoder, 2, BOTTLENECK, batch=BATCH, machine=with_latency)
    assert ours.message_s == pytest.approx(2 * 2 + 1 + 1)  # loss, gather, scatter
    assert ours.hidden_s == pytest.approx(1.0)  # the scatter, beside the weight's gradient


def test_model_follows_the_paper_in_what_wins_where() -> None:
    """One GPU: naive and ours are alike. Four: ours, full rank, naive (BOOST, iteration times)."""

    def times(ranks: int) -> list[float]:
        block = preset("llama-7b").decoder(1024).block
        batch, made = Batch(micro_batch=4, sequence=4096), machine("A100")
        schemes = (BOTTLENECK, FULL_RANK, NAIVE)
        return [
            block_time(block, ranks, scheme, batch=batch, machine=made).total_s
            for scheme in schemes
        ]

    ours, full, naive = times(1)
    assert naive < ours < 1.05 * naive
    assert ours < full
    ours, full, naive = times(4)
    assert ours < full < naive
