"""A checkpoint's contents without a training run: as tensors, and as files for other loaders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lowtide.checkpoint.state.safetensors_file import export
from lowtide.checkpoint.state.view import CheckpointState, Parameter, open_state
from lowtide.checkpoint.state.zero_layout import MASTER
from lowtide.core.errors import CheckpointError, listed

__all__ = ["CheckpointState", "Parameter", "export", "load_state", "open_state"]


def load_state(
    checkpoint: Path, *, kind: str = MASTER, names: Sequence[Sequence[str]] | None = None
) -> dict[str, torch.Tensor]:
    """Return whole tensors by name, put together from the files of all ranks.

    Kind "fp32" is what ``zero_to_fp32`` gives, bit for bit and in its order: buffers (floating
    ones as float32), frozen parameters as they are stored, trained ones as float32, tied names as
    the same tensor. Two things it does not do are done: stage 0, and the frozen parameters of
    stage 1, which it leaves out.

    Args:
        checkpoint: The folder of one tag, or a folder with the file ``latest``.
        kind: "fp32", or an optimizer state such as "exp_avg"; then only the parameters that have
            one are returned.
        names: See `open_state`.

    Raises:
        CheckpointError: the checkpoint or the kind does not exist, or a file is damaged.
    """
    state = open_state(checkpoint, names=names)
    found: dict[str, torch.Tensor] = {}
    if kind == MASTER:
        for name, value in state.buffers.items():
            found[name] = value.float().clone() if value.is_floating_point() else value.clone()
    elif kind not in state.kinds:
        raise CheckpointError(
            f'{state.folder}: has no state "{kind}"; there are {listed(state.kinds)}'
            f"{state.why_nameless and '; it ' + state.why_nameless}"
        )
    for name, parameter in state.parameters.items():
        if state.has(name, kind):
            value = state.tensor(name, kind)
            is_widened = state.stage == 0 and parameter.group is not None and kind == MASTER
            found[name] = value.float() if is_widened else value
    for alias, name in state.shared.items():
        if name in found:
            found[alias] = found[name]
    return found
