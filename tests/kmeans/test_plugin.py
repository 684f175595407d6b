"""The kmeans key: its settings, and codebooks in a plain loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowtide.core.config import resolve
from lowtide.core.errors import ConfigError
from lowtide.hosts import torch_loop
from lowtide.kmeans import codebook
from tests.helpers.plugin_suite import check_plugin

SMALL = {"n_clusters": 4, "sub_dim": 2, "every_n_steps": 2}


def test_conformance() -> None:
    check_plugin("kmeans", SMALL, is_exact=True)
    check_plugin("kmeans", {**SMALL, "use": "activations", "include": ["0"]}, is_exact=True)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"use": "codebooks"}, "lowtide.kmeans.use"),
        ({"n_cluster": 8}, 'Did you mean "n_clusters"'),
        ({"n_clusters": 1}, "lowtide.kmeans.n_clusters"),
        ({"sub_dim": 0}, "lowtide.kmeans.sub_dim"),
        ({"every_n_steps": 0}, "lowtide.kmeans.every_n_steps"),
        ({"max_vectors": 100}, '"max_vectors": 100 is less than "n_clusters": 256'),
        ({"use": "activations"}, '"use": "activations" needs "include"'),
        ({"fault_tolerance": {"mode": "on"}}, "lowtide.kmeans.fault_tolerance.mode"),
        ({"fault_tolerance": {"kappa": 0.0}}, "lowtide.kmeans.fault_tolerance.kappa"),
        ({"fault_tolerance": {"modes": "off"}}, 'Did you mean "mode"'),
    ],
)
def test_wrong_settings_are_named(block: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"kmeans": block})
    assert expected in str(caught.value)


def loop_of(**settings: Any) -> torch_loop.TorchLoop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.LayerNorm(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return torch_loop.attach(model, optimizer, config={"lowtide": {"kmeans": SMALL | settings}})


def train(loop: torch_loop.TorchLoop, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loop.optimizer.zero_grad()
        loop.backward(loop.model(x).square().mean())
        loop.optimizer.step()


def books_of(loop: torch_loop.TorchLoop) -> dict[str, codebook.Codebook]:
    return loop.session.plugins["kmeans"].codebooks  # type: ignore[attr-defined, no-any-return]


def test_matrices_have_codebooks_and_vectors_have_none() -> None:
    loop = loop_of()
    train(loop, 1)
    assert books_of(loop) == {}
    train(loop, 1)
    books = books_of(loop)
    assert list(books) == ["0.weight", "2.weight"]
    for name, book in books.items():
        values = dict(loop.model.named_parameters())[name].detach()
        decoded = book.decode(book.encode(values))
        error = ((decoded - values).norm() / values.norm()).item()
        assert book.relative_error == pytest.approx(error, rel=1e-5)
        assert book.step == 2
    scalars = loop.session.telemetry.snapshot()["scalars"]
    assert scalars["kmeans/0.weight/relative_error"] == books["0.weight"].relative_error
    loop.close()


def test_later_fits_go_on_from_the_centroids_of_before() -> None:
    loop = loop_of(n_clusters=16, max_iter=1)
    train(loop, 2)
    first = books_of(loop)["0.weight"].relative_error
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # the same weights from now on
    errors = []
    for _ in range(4):
        train(loop, 2)
        errors.append(books_of(loop)["0.weight"].relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] < first
    loop.close()


def test_chosen_names_alone_are_fitted(caplog: pytest.LogCaptureFixture) -> None:
    loop = loop_of(include=["*.weight", "nothing.*"], exclude=["2.*", "none"])
    train(loop, 4)
    assert list(books_of(loop)) == ["0.weight"]
    loop.close()
    told = [each.getMessage() for each in caplog.records]
    assert told.count('kmeans: "nothing.*" names no parameter of the model') == 1
    assert told.count('kmeans: "none" names no parameter of the model') == 1


def test_outputs_of_the_due_step_alone_are_clustered() -> None:
    loop = loop_of(use="activations", include=["0"], every_n_steps=3)
    seen: list[int] = []
    module = loop.model[0]
    for step in range(3):
        loop.model.train()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loop.optimizer.zero_grad()
        loop.backward(loop.model(x).square().mean())
        seen.append(len(module._forward_hooks))
        loop.backward(loop.model(x + 1.0).square().mean())  # a second micro-batch, not looked at
        expected = module(x).detach()  # with the weights of this forward
        loop.optimizer.step()
    assert seen == [0, 0, 1]
    assert len(module._forward_hooks) == 0
    book = books_of(loop)["0"]
    decoded = book.decode(book.encode(expected))
    error = ((decoded - expected).norm() / expected.norm()).item()
    assert book.relative_error == pytest.approx(error, rel=1e-5)
    loop.close()


def test_evaluation_is_not_sampled(caplog: pytest.LogCaptureFixture) -> None:
    loop = loop_of(use="activations", include=["0"], every_n_steps=1)
    loop.model.eval()
    with torch.no_grad():
        loop.model(torch.randn(8, 16))
    assert len(loop.model[0]._forward_hooks) == 0
    loop.close()


def test_small_and_broken_tensors_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    loop = loop_of(n_clusters=400, max_vectors=400)
    train(loop, 4)
    assert books_of(loop) == {}  # 256 vectors in a matrix
    told = [each.getMessage() for each in caplog.records]
    assert sum("0.weight has too few vectors" in text for text in told) == 1
    loop.close()
    caplog.clear()
    loop = loop_of()
    train(loop, 2)
    before = books_of(loop)
    with torch.no_grad():
        loop.model[0].weight[0, 0] = torch.nan
    train(loop, 2)
    books = books_of(loop)
    assert books["0.weight"] is before["0.weight"]
    loop.close()
    assert any("0.weight at step 4" in each.getMessage() for each in caplog.records)


def test_files_are_read_and_bad_ones_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = loop_of(path=str(tmp_path / "books"))
    train(loop, 2)
    books = books_of(loop)
    loop.close()
    path = tmp_path / "books" / "codebooks-rank00000.safetensors"
    again = loop_of(path=str(tmp_path / "books"))
    assert (books_of(again)["0.weight"].centroids == books["0.weight"].centroids).all()
    again.close()
    other = loop_of(path=str(tmp_path / "books"), sub_dim=4)
    assert books_of(other) == {}
    other.close()
    path.write_bytes(b"no safetensors")
    caplog.set_level(logging.WARNING)
    broken = loop_of(path=str(tmp_path / "books"))
    assert books_of(broken) == {}
    train(broken, 2)  # and written anew
    broken.close()
    assert "starting without the codebooks of before" in caplog.text
    assert np.array_equal(codebook.load(path)["0.weight"].centroids, books["0.weight"].centroids)


def test_a_folder_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    loop = loop_of(path=str(tmp_path / "file" / "books"))
    train(loop, 2)
    assert books_of(loop)
    loop.close()
    assert "codebooks cannot be written" in caplog.text
