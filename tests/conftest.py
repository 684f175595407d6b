"""Fixtures for all tests: the probe plugin, and one start of each distributed worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lowtide.core.registry import plugins
from tests.helpers.probe_plugin import ProbePlugin

# Before anything imports it: its asserts are to show what they compared.
pytest.register_assert_rewrite("tests.helpers.codec_suite")

# One thread per process: tests share two cores, and several of them start ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def probe() -> Iterator[type[ProbePlugin]]:
    """Register the probe plugin under the key "probe" for one test."""
    plugins.register("probe", ProbePlugin)
    yield ProbePlugin
    plugins.unregister("probe")
