"""Leaves a training run as it was: modes, gradients, random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Evaluate inside, and go on training after it as if nothing had happened.

    Every module gets its own mode back: a script may keep some in evaluation while it trains. The
    random numbers of Python, NumPy, torch and of every GPU go on where they were.
    """
    modes = [(each, each.training) for each in module.modules()]
    python, array = random.getstate(), np.random.get_state()
    host = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes:
            each.training = mode
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(host)
        if devices:
            torch.cuda.set_rng_state_all(devices)
