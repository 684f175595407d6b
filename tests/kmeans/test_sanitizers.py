"""The native K-Means under the sanitizers of the compiler."""

from __future__ import annotations

import pytest

from tests.helpers.sanitizers import needs_compiler, run_under_sanitizers

NAMES = ("assign", "centroids", "kernels_avx2", "kernels_avx512", "kernels_generic", "samples")
SOURCES = [
    "-DLOWTIDE_KMEANS_COLUMNS=2",  # else the kernels compile for a minute
    "tests/csrc/test_kmeans.cpp",
    "csrc/common/thread_pool.cpp",
    *(f"csrc/kmeans/{name}.cpp" for name in (*NAMES, "sums")),
]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_passes_stay_in_bounds_and_apart(sanitizers: str) -> None:
    run_under_sanitizers(sanitizers, SOURCES)
