"""The native coders under the sanitizers of the compiler, damaged sections included."""

from __future__ import annotations

from tests.helpers.sanitizers import needs_compiler, run_under_sanitizers

SOURCES = [
    "tests/csrc/test_compression.cpp",
    *(
        f"csrc/compression/{name}.cpp"
        for name in (
            *("contexts", "differences", "entropy_decode", "entropy_encode"),
            *("interpolation", "scan", "tables", "verify"),
        )
    ),
]


@needs_compiler
def test_coders_stay_in_bounds_on_whole_and_on_damaged_sections() -> None:
    run_under_sanitizers("address,undefined", SOURCES)


@needs_compiler
def test_networks_stay_in_bounds_and_refuse_layers_that_do_not_fit() -> None:
    names = ("compression/network", "compression/differences", "compression/mixed")
    names += ("compression/scan", "common/thread_pool")
    sources = [f"csrc/{name}.cpp" for name in names]
    run_under_sanitizers("address,undefined", ["tests/csrc/test_network.cpp", *sources])
