"""What ``lowtide doctor`` looks at. No probe imports torch or a host; none can hang the command."""

from __future__ import annotations

from lowtide.cli.probes.machine import cuda, extensions, io_uring, locked_memory, shared_memory
from lowtide.cli.probes.row import Probe, Row, run_probes
from lowtide.cli.probes.software import (
    PACKAGES,
    Package,
    apex,
    compilers,
    native_part,
    package_row,
    python,
)

__all__ = ["Package", "Probe", "Row", "all_probes", "run_probes"]


def _package_probe(package: Package) -> Probe:
    def probe() -> list[Row]:
        return [package_row(package)]

    probe.__name__ = package.name
    return probe


def all_probes() -> list[Probe]:
    """Return every probe in the order in which findings are shown."""
    packages = [_package_probe(package) for package in PACKAGES]
    return [
        python, *packages, compilers, native_part, cuda, apex, io_uring, locked_memory,
        shared_memory, extensions,
    ]  # fmt: skip
