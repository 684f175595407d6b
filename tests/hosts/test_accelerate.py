"""Accelerate adapter: our block passes, everything else stays as it was, undo leaves no trace."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lowtide.core.errors import ConfigError
from lowtide.hosts import _shared_batches
from lowtide.hosts import accelerate as adapter
from tests.helpers.ranks import run_command

BLOCK = {"telemetry": {"trace": "auto"}}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    adapter.uninstall()
    yield
    adapter.uninstall()


@pytest.fixture
def plugin_class() -> Any:
    return pytest.importorskip("accelerate.utils").DeepSpeedPlugin


def make(plugin_class: Any, **extra: Any) -> Any:
    return plugin_class(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": "auto",
            "lowtide": BLOCK,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
            **extra,
        }
    )


def process(plugin: Any, **known: Any) -> None:
    known.setdefault("train_micro_batch_size_per_gpu", 3)
    plugin.deepspeed_config_process(must_match=False, **known)


def test_auto_in_our_block_raises_without_the_adapter(plugin_class: Any) -> None:
    # When this starts to fail, accelerate has changed and the adapter may go.
    with pytest.raises(ValueError, match=r"lowtide\.telemetry\.trace"):
        process(make(plugin_class))


def test_auto_in_our_block_passes_untouched(plugin_class: Any) -> None:
    adapter.install()
    plugin = make(plugin_class)
    keys, block = list(plugin.deepspeed_config), plugin.deepspeed_config["lowtide"]
    process(plugin)
    assert list(plugin.deepspeed_config) == keys
    assert plugin.deepspeed_config["lowtide"] is block
    assert block == BLOCK
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 3


@pytest.mark.parametrize("extra", [{"own": "auto"}, {"own": {"deep": {"key": "auto"}}}])
def test_auto_elsewhere_raises_as_before(plugin_class: Any, extra: dict[str, Any]) -> None:
    stock = plugin_class(hf_ds_config={"zero_optimization": {"stage": 1}, **extra})
    with pytest.raises(ValueError, match="own") as before:
        process(stock)
    adapter.install()
    plugin = make(plugin_class, **extra)
    with pytest.raises(ValueError, match="own") as after:
        process(plugin)
    assert str(after.value) == str(before.value)
    assert plugin.deepspeed_config["lowtide"] == BLOCK  # put back although the walk raised


def test_mismatch_elsewhere_raises_as_before(plugin_class: Any) -> None:
    adapter.install()
    plugin = make(plugin_class, gradient_clipping=1.0)
    with pytest.raises(ValueError, match=r"gradient_clipping=1\.0 vs arg gradient_clipping=2"):
        plugin.deepspeed_config_process(gradient_clipping=2.0, train_micro_batch_size_per_gpu=3)


def test_config_without_block_is_walked_as_before(plugin_class: Any) -> None:
    adapter.install()
    plugin = plugin_class(hf_ds_config={"zero_optimization": {"stage": 1}, "lowtide": None})
    process(plugin)
    assert plugin.deepspeed_config["lowtide"] is None


def test_uninstall_leaves_no_trace(plugin_class: Any) -> None:
    import transformers.integrations.deepspeed  # so that all is there to be changed
    import transformers.trainer  # noqa: F401

    def current() -> list[Any]:
        return [
            vars(getattr(sys.modules[patch.module], patch.owner))[patch.method]
            for patch in adapter._PATCHES
        ]

    stock, names, finders = current(), dict(vars(plugin_class)), list(sys.meta_path)
    adapter.install()
    adapter.install()
    assert not set(current()) & set(stock)
    adapter.uninstall()
    adapter.uninstall()
    assert current() == stock
    assert dict(vars(plugin_class)) == names
    assert sys.meta_path == finders


def test_version_without_the_walk_is_left_alone_with_a_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = ModuleType("accelerate.utils")
    fake.DeepSpeedPlugin = type("DeepSpeedPlugin", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate.utils", fake)
    adapter.install()
    assert "accelerate.utils.DeepSpeedPlugin.deepspeed_config_process" in caplog.text
    assert "write the value out" in caplog.text
    adapter.uninstall()


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that looks like Accelerate and has not been imported yet."""
    package = tmp_path / "lowtide_later" / "utils"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "class DeepSpeedPlugin:\n"
        "    deepspeed_config = {'lowtide': {'a': 'auto'}, 'b': 1}\n"
        "    def deepspeed_config_process(self):\n"
        "        return dict(self.deepspeed_config)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    walk = dataclasses.replace(adapter._PATCHES[0], module="lowtide_later.utils")
    monkeypatch.setattr(adapter, "_PATCHES", (walk,))
    yield "lowtide_later.utils"
    adapter.uninstall()
    for name in ("lowtide_later", "lowtide_later.utils"):
        sys.modules.pop(name, None)


def test_late_import_is_patched_and_the_import_hook_goes(later: str) -> None:
    finders = list(sys.meta_path)
    adapter.install()
    assert len(sys.meta_path) == len(finders) + 1
    assert later not in sys.modules
    module = __import__(later, fromlist=["DeepSpeedPlugin"])
    assert sys.meta_path == finders
    assert module.DeepSpeedPlugin().deepspeed_config_process() == {"lowtide": None, "b": 1}
    assert module.__spec__ is not None
    assert "exec_module" not in vars(module.__spec__.loader)
    adapter.uninstall()
    assert module.DeepSpeedPlugin().deepspeed_config_process()["lowtide"] == {"a": "auto"}


def test_late_import_is_stock_when_uninstalled_before_it(later: str) -> None:
    finders = list(sys.meta_path)
    adapter.install()
    adapter.uninstall()
    assert sys.meta_path == finders
    module = __import__(later, fromlist=["DeepSpeedPlugin"])
    assert module.DeepSpeedPlugin().deepspeed_config_process()["lowtide"] == {"a": "auto"}


def test_bad_block_is_told_where_accelerate_reads_it(plugin_class: Any) -> None:
    adapter.install()
    with pytest.raises(ConfigError, match=r"lowtide\.telemetry\.dirr: unknown key"):
        make(plugin_class, lowtide={"telemetry": {"dirr": "x"}})


def test_the_configuration_that_deepspeed_gets_stays_as_it_was(plugin_class: Any) -> None:
    # Also for a second engine, `zero.Init`, and whoever uses it after `disable`.
    block = {"tensor_parallel": {"degree": 2, "rank": 8}}
    stock = make(plugin_class, lowtide=block).deepspeed_config
    adapter.install()
    plugin = make(plugin_class, lowtide=block)
    process(plugin)
    assert {**plugin.deepspeed_config, "train_micro_batch_size_per_gpu": "auto"} == stock
    with _shared_batches._data_parallel(pretended(plugin)) as is_shared:
        assert is_shared
        assert "tensor_parallel" not in plugin.deepspeed_config


def pretended(plugin: Any) -> Any:
    state = SimpleNamespace(deepspeed_plugin=plugin, num_processes=4, process_index=3)
    return SimpleNamespace(state=state)


def test_a_schedule_of_its_own_needs_no_state_of_accelerate(plugin_class: Any) -> None:
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.state import AcceleratorState

    adapter.install()
    AcceleratorState._reset_state(reset_partial_state=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    AcceleratedScheduler(schedule, optimizer, step_with_optimizer=False).step()
    assert schedule.get_last_lr() == [0.5]
    assert not AcceleratorState._shared_state


def test_both_tensor_parallelisms_are_refused_where_accelerate_reads_them(
    plugin_class: Any,
) -> None:
    adapter.install()
    block = {"tensor_parallel": {"degree": 2, "rank": 8}}
    with pytest.raises(ConfigError, match=r"tensor_parallel\.autotp_size is 2 too"):
        make(plugin_class, lowtide=block, tensor_parallel={"autotp_size": 2})


def test_a_job_that_does_not_divide_is_refused(plugin_class: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    adapter.install()
    plugin = make(plugin_class, lowtide={"tensor_parallel": {"degree": 2, "rank": 8}})
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerate.PartialState(cpu=True)
        one = accelerate.Accelerator(deepspeed_plugin=plugin)
        with pytest.raises(ConfigError, match="does not divide the 1 rank"):
            one.prepare_data_loader(torch.utils.data.DataLoader([1, 2]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_install_does_not_import_accelerate() -> None:
    script = (
        "import sys\n"
        "from lowtide.hosts import accelerate\n"
        "accelerate.install()\n"
        "assert 'accelerate' not in sys.modules\n"
        "from accelerate.utils import DeepSpeedPlugin\n"
        "block = {'telemetry': {'trace': 'auto'}}\n"
        "config = {'zero_optimization': {'stage': 1}, 'lowtide': block}\n"
        "DeepSpeedPlugin(hf_ds_config=config).deepspeed_config_process(must_match=False)\n"
    )
    run_command([sys.executable, "-c", script], timeout_s=100).check()
