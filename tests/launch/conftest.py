"""One cluster for all tests that need Slurm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.helpers.slurm import Cluster, NoClusterError, cluster, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} on this machine; Debian, Ubuntu: apt-get install "
            "--no-install-recommends slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
        )
    # A short path: munge's socket may have at most 107 characters.
    folder = tmp_path_factory.mktemp("slurm")
    with ExitStack() as stack:
        try:
            running = stack.enter_context(cluster(folder))
        except NoClusterError as error:
            # Like a missing Slurm, a Slurm that does not run here says nothing of Lowtide.
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield running
