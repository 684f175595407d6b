"""What autograd's hooks pack, share and leave alone, in a plain loop."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend

from lowtide.compression.activations.held import Reader
from lowtide.compression.activations.quantiser import Codes, Quantiser
from lowtide.compression.activations.saving import Saving
from lowtide.core.errors import SavedTensorError
from tests.compression.activations import models
from tests.compression.activations.models import Transformer, batch


class Within:
    """Autograd's hooks for a ``with`` body; `saving` has the counts afterwards."""

    def __init__(self, model: nn.Module | None = None, *, bits: int = 8, seed: int = 0) -> None:
        quantiser = Quantiser(bits=bits, group_size=32, is_stochastic=True)
        self.saving = Saving(quantiser, min_bytes=256)
        self._exact = [] if model is None else [*model.parameters(), *model.buffers()]
        self._seed = seed

    def __enter__(self) -> Saving:
        self.saving.begin(self._exact, self._seed)
        return self.saving

    def __exit__(self, *_: Any) -> None:
        self.saving.end()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Copies of all that was quantised."""
    found: list[Tensor] = []
    stock = Quantiser.encode

    def encode(self: Quantiser, flat: Tensor, generator: Any = None) -> Codes:
        found.append(flat.clone())
        return stock(self, flat, generator)

    monkeypatch.setattr(Quantiser, "encode", encode)
    return found


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def stock_gradients(model: nn.Module, *inputs: Tensor) -> Tensor:
    model.zero_grad()
    model(*inputs).sum().backward()
    return gradients(model)


def test_gradients_come_near_with_more_bits() -> None:
    torch.manual_seed(0)
    model = Transformer()
    expected = stock_gradients(model, *batch(0))
    errors = []
    for bits in (8, 4, 2):
        model.zero_grad()
        with Within(model, bits=bits) as saving:
            loss = model(*batch(0))
        loss.backward()
        assert saving.counts.packed > 10
        errors.append(relative(gradients(model), expected))
    assert errors[0] < 0.02
    assert errors[0] * 5 < errors[1] < errors[2] / 2


def test_a_linear_layers_weight_gradient_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    layer, x, upstream = nn.Linear(16, 4), torch.randn(64, 16), torch.randn(64, 4)
    expected = upstream.T @ x
    draws = []
    for seed in range(400):
        layer.zero_grad()
        with Within(layer, bits=2, seed=seed) as saving:
            y = layer(x)
        y.backward(upstream)
        assert saving.counts.packed == 1
        assert layer.weight.grad is not None
        draws.append(layer.weight.grad.clone())
    found = torch.stack(draws).double()
    deviation = found.std(0)
    assert (deviation > 0).all()
    assert ((found.mean(0) - expected).abs() <= 5 * deviation / 400**0.5).all()


def test_parameters_are_never_packed(encoded: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Transformer()
    model.register_buffer("mask", torch.randn(8, models.LENGTH, 32))
    model.words.weight.requires_grad_(False)  # and not only those that are trained
    with Within(model) as saving:
        loss = model(*batch(0)) + (model.words(batch(0)[0]).requires_grad_() * model.mask).sum()
    loss.backward()
    known = {each.numel(): each.detach().flatten() for each in (*model.parameters(), model.mask)}
    assert saving.counts.raw["parameter"] >= 10
    assert len(encoded) == saving.counts.packed > 10
    for flat in encoded:
        same = known.get(flat.numel())
        assert same is None or not torch.equal(same.sort().values, flat.sort().values)


def test_copies_of_parameters_are_not_packed(encoded: list[Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32, bias=False), torch.randn(16, 32, requires_grad=True)
    with Within(layer) as saving:
        F.linear(x.bfloat16(), layer.weight.to(torch.bfloat16).t())  # a cast by hand
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
    assert saving.counts.raw["parameter"] == 2
    assert [each.numel() for each in encoded] == [16 * 32] * 2


def test_probabilities_and_statistics_stay_exact(encoded: list[Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 16, 32, requires_grad=True)
    weight = torch.randn(32)
    ways = {
        "exact": [
            lambda: F.softmax(x, -1), lambda: x.softmax(-1), lambda: torch.log_softmax(x, -1),
            lambda: F.cross_entropy(x.flatten(0, 2), torch.zeros(512, dtype=torch.long)),
            lambda: MySoftmax.apply(x), lambda: MySoftmax.apply(x.clone().softmax(-1)),
        ],
        "statistic": [
            lambda: F.layer_norm(x, (32,), weight), lambda: F.rms_norm(x, (32,)),
            lambda: F.scaled_dot_product_attention(x, x, x), lambda: Normed.apply(x),
            lambda: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
        ],
    }  # fmt: skip
    for reason, calls in ways.items():
        for index, call in enumerate(calls):
            encoded.clear()
            with Within() as saving:
                call()
            assert saving.counts.raw[reason] >= 1, (reason, index, saving.counts)
            expected = 0 if reason == "exact" else 2 if index == 2 else 1  # q, k, v and the output
            assert len(encoded) == expected, (reason, index)


def test_probabilities_inside_attention_stay_exact(encoded: list[Tensor]) -> None:
    x = torch.randn(2, 4, 16, 32, requires_grad=True)
    with Within() as saving, torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(x, x, x)
    assert saving.counts.raw["exact"] >= 1
    assert encoded
    assert all(each.numel() == x.numel() for each in encoded)


@pytest.mark.parametrize("is_first", [True, False])
def test_attention_has_eight_bits(monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    found: list[int] = []
    stock = Quantiser.encode

    def encode(self: Quantiser, flat: Tensor, generator: Any = None) -> Codes:
        found.append(self.bits)
        return stock(self, flat, generator)

    monkeypatch.setattr(Quantiser, "encode", encode)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 32, requires_grad=True)
    with Within(bits=4) as saving:
        q = x * 2.0
        before = None if is_first else q.sin()
        y = F.scaled_dot_product_attention(q, x, x)
        after = q.sin() if is_first else None
        last = x.cos()
    # q, x as k and v, the output; what is there in 8 bits serves who asks for 4.
    assert found == [8, 8, 8] if is_first else [4, 8, 8, 8]
    assert saving.counts.shared == (3 if is_first else 2)
    del before, y, after, last


class MySoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = x.norm(dim=-1)
        ctx.save_for_backward(x, size)
        return x / size[..., None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / ctx.saved_tensors[1][..., None]


def test_one_activation_is_packed_once_for_all_its_readers() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 32, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(32, 8) for _ in range(3))
    with Within(layers) as saving:
        y = x * 2.0
        outputs = [layer(y) for layer in layers]
        product = y.transpose(0, 1) * y.transpose(0, 1)  # other views of the same elements
        total = sum(each.sum() for each in outputs) + product.sum()
    assert (saving.counts.packed, saving.counts.shared) == (1, 4)
    total.backward()
    with torch.no_grad():
        y.add_(1.0)
    with Within() as saving:
        y = x * 2.0
        first = y.sin()
        with torch.no_grad():
            y.detach().add_(1.0)  # another version is another tensor
        second = y.sin()
    assert (saving.counts.packed, saving.counts.shared) == (2, 0)
    del first, second


def test_memory_is_given_back_when_the_forward_is_over() -> None:
    torch.manual_seed(0)
    model, storages = Transformer(width=64), []
    context = Within(model, bits=4)
    stock = context.saving._pack_activation

    def watched(tensor: Tensor, reason: str | None, quantiser: Quantiser) -> Any:
        found = stock(tensor, reason, quantiser)
        if reason is None:
            storages.append(StorageWeakRef(tensor.untyped_storage()))
        return found

    context.saving._pack_activation = watched  # type: ignore[method-assign]
    with context as saving:
        loss = model(*batch(0))
    assert len(storages) == saving.counts.packed + saving.counts.shared > 10
    assert all(each.expired() for each in storages)
    counts = saving.counts
    quantised = counts.saved_bytes - sum(counts.raw_bytes.values())
    assert saving.live_bytes() == counts.held_bytes - sum(counts.raw_bytes.values())
    # Between the 4 bits of most tensors and the 8 of attention's.
    assert saving.live_bytes() <= quantised * (6 / 32 + 8 / (4 * 32)) * 1.01
    loss.backward()
    assert saving.live_bytes() == 0


def test_nothing_is_left_after_many_steps() -> None:
    torch.manual_seed(0)
    loop = models.attached(Transformer(), models.block_of())
    models.train(loop, 3)
    saving = loop.session.compression._saving
    gc.collect()
    before = sum(type(each) in (Codes, Reader) for each in gc.get_objects())
    gc.disable()  # no cycles: what goes, goes at once
    try:
        models.train(loop, 50)
        assert saving.live_bytes() == 0
        assert sum(type(each) in (Codes, Reader) for each in gc.get_objects()) == before
    finally:
        gc.enable()
    assert len(saving._shared) <= 600
    abandoned = loop.model(*batch(0))  # a graph that no backward pass frees
    assert saving.live_bytes() > 0
    del abandoned
    assert saving.live_bytes() == 0
    loop.close()


def changed_input() -> Tensor:
    x = torch.randn(8, 64, requires_grad=True) * 1.0
    y = x * x
    x.add_(1.0)
    return y


def changed_output() -> Tensor:
    y = torch.randn(8, 64, requires_grad=True).exp()
    y.add_(1.0)
    return y


def changed_small() -> Tensor:
    y = torch.randn(2, requires_grad=True).exp()
    y.add_(1.0)
    return y


@pytest.mark.parametrize("call", [changed_input, changed_output, changed_small])
def test_changes_in_place_are_refused_as_stock_refuses_them(call: Any) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call().sum().backward()
    with Within():
        y = call()
    with pytest.raises(SavedTensorError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changes_in_place_that_stock_allows_are_allowed() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, requires_grad=True)

    def call() -> Tensor:
        y = F.relu_(x * 2.0)
        z = (y + 1.0).sigmoid_()
        y = y.clone()
        z = z.clone()
        z[3] = 0.5
        z += y
        return F.dropout((z * 0.1).tanh_(), 0.5)

    torch.manual_seed(1)
    call().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    torch.manual_seed(1)
    with Within() as saving:
        y = call()
    assert saving.counts.packed >= 3
    y.sum().backward()
    assert x.grad is not None
    assert relative(x.grad, expected) < 0.05


def test_a_graph_can_be_read_twice_and_differentiated_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, requires_grad=True)
    with Within():
        y = (x * 1.0).sin().square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(first, second)
    (curvature,) = torch.autograd.grad(second.sum(), x)
    assert relative(curvature, 2 * torch.cos(2 * x.detach())) < 0.05


def test_hooks_of_others_inside_and_around_keep_working() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64, requires_grad=True)
    theirs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        theirs.append(1)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with Within() as saving:
            first = x.sin()
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                x.sin()
            second = x.cos()
        x.cos()
    assert (len(theirs), saving.counts.packed, saving.counts.shared) == (2, 1, 1)
    del first, second


@pytest.mark.parametrize("way", [models.again, models.again_reentrant])
def test_checkpointing_compresses_the_inputs_of_blocks_only(way: Any) -> None:
    torch.manual_seed(0)
    model = Transformer(checkpoints=way, layers=3)
    expected = stock_gradients(model, *batch(0))
    model.zero_grad()
    with Within(model) as saving:
        loss = model(*batch(0))
    packed = saving.counts.packed
    # The inputs of 3 blocks, and of the last norm and linear layer.
    assert packed == 5
    loss.backward()
    assert saving.counts.packed == packed
    assert saving.live_bytes() == 0
    assert relative(gradients(model), expected) < 0.02


def test_float64_integers_and_sparse_tensors_are_left_alone() -> None:
    x = torch.randn(64, 64, dtype=torch.float64, requires_grad=True)
    rows = torch.eye(64, dtype=torch.float64).to_sparse()
    table = torch.randn(100, 8, requires_grad=True)

    def call() -> Tensor:
        picked = F.embedding(torch.arange(100), table)
        return (x * x).sum() + torch.sparse.mm(rows, x).sum() + picked.sum()

    expected = torch.autograd.grad(call(), (x, table))
    with Within() as saving:
        total = call()
    assert saving.counts.packed == 0
    assert saving.counts.raw["dtype"] >= 3
    assert saving.counts.raw["layout"] == 1
    found = torch.autograd.grad(total, (x, table))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_relu_keeps_its_zeros() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    with Within(bits=2):
        y = x.relu()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x > 0).float())


def test_vmap_inside_a_forward_works() -> None:
    x = torch.randn(16, 64, requires_grad=True)
    with Within():
        y = torch.func.vmap(lambda row: (row * row).sum())(x)
    y.sum().backward()
    assert x.grad is not None
    assert relative(x.grad, 2 * x.detach()) < 0.05
