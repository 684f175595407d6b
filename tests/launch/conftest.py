"""One cluster for all tests that need Slurm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.slurm import Cluster, cluster, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} on this machine; Debian, Ubuntu: apt-get install "
            "--no-install-recommends slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
        )
    # A short path: munge's socket may have at most 107 characters.
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
