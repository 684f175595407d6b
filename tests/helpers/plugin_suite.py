"""Conformance suite for plugins: call `check_plugin` from each plugin's own tests.

It proves, in a plain CPU loop, what every plugin promises: switched off it changes no bit,
attached and detached it leaves no hook, thread or open file, and its settings follow the house's
naming.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import Any

import torch

from lowtide.core.config import plugin_config_class, resolve
from lowtide.core.schema import key_table
from lowtide.hosts import torch_loop


def _train(config: dict[str, Any] | None, steps: int = 6) -> list[float]:
    """Losses of a small model; `config` None means a loop without Lowtide."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = torch_loop.attach(model, optimizer, config=config) if config is not None else None
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        if loop is None:
            loss.backward()
        else:
            loop.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    if loop is not None:
        loop.close()
        assert_no_hooks(model, optimizer)
    return losses


def assert_no_hooks(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fail when a module or the optimizer still carries a hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    left = [
        (name, kind) for name, module in model.named_modules() for kind in kinds
        if getattr(module, kind)
    ]  # fmt: skip
    left += [("optimizer", k) for k in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
             if getattr(optimizer, k)]  # fmt: skip
    assert left == [], left


def resident_bytes() -> int:
    """Return the memory in use, without what malloc keeps of freed blocks for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Return the number of open file descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def check_plugin(name: str, settings: dict[str, Any], *, is_exact: bool) -> None:
    """Check plugin `name` with `settings`.

    Args:
        name: JSON key of the plugin.
        settings: Its block for a small CPU run.
        is_exact: Whether losses with the plugin on equal losses without it, bit for bit.
    """
    stock = _train(None)
    assert _train({"lowtide": {}}) == stock, "an empty block changed the losses"
    off = {"lowtide": {name: {**settings, "enabled": False}}}
    assert _train(off) == stock, f"{name} with enabled: false changed the losses"
    _train({"lowtide": {name: settings}})  # warm: lazy imports may keep files open
    threads, files = threading.active_count(), open_files()
    losses = _train({"lowtide": {name: settings}})
    assert threading.active_count() == threads, f"{name} left a thread"
    assert open_files() <= files, f"{name} left an open file"
    if is_exact:
        assert losses == stock, f"{name} promises exact losses and changed them"
    check_settings(name, settings)


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """Check that settings resolve, survive JSON, and are named and described as the house asks."""
    resolved = resolve({name: settings})
    again = resolve({name: resolved.as_dict()[name]})
    assert again.plugins[name] == resolved.plugins[name], "resolved settings do not resolve again"
    rows = [row for row in key_table() if row.path.startswith(f"lowtide.{name}.")]
    assert rows, "the plugin has no settings, not even enabled"
    assert all(row.description for row in rows), "a key has no description"
    for field in plugin_config_class(name).model_fields:
        for unit in ("_ms", "_us", "_sec", "_mb", "_gb", "_gib", "_mib", "_kb"):
            assert not field.endswith(unit), f"{name}.{field}: use _s or _bytes"
