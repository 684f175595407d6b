"""A real Slurm of two virtual nodes on this machine: no root, no cgroups, no system services.

Daemons run in the foreground as children of the test, on free ports, with all files in one folder.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.ranks import REPOSITORY, environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "srun", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_START_S = 60.0
_STARTS = 3


class NoClusterError(Exception):
    """Slurm is installed and does not start on this machine."""


def missing_programs() -> list[str]:
    """Return what a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: State, logs, configuration.
        env: Environment of everything that talks to it.
    """

    folder: Path
    env: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, timeout_s: float = 60.0, **env: str) -> str:
        """Run a Slurm command to its end and return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=REPOSITORY, capture_output=True, text=True,
            timeout=timeout_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self, template: str, log: Path, *script: str, options: Sequence[str] = (), **env: str
    ) -> str:
        """Submit ``launch/sbatch/<template>`` as a user would; return the job id."""
        command = ["sbatch", "--parsable", f"--output={log}", *options]
        command += [str(REPOSITORY / "launch" / "sbatch" / template), *script]
        return self.run(*command, **env).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return what Slurm says of a job."""
        text = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job_id: str, *states: str, timeout_s: float, log: Path | None = None) -> str:
        """Wait until a job is in one of `states`; return it.

        Raises:
            AssertionError: in time it is not, or it has ended in another state.
        """
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        deadline_s = time.monotonic() + timeout_s
        state = ""
        while time.monotonic() < deadline_s:
            state = self.job(job_id)["JobState"]
            if state in states:
                return state
            if state in ended:
                break
            time.sleep(0.2)
        raise AssertionError(f"job {job_id} is {state}, not {states}\n{self.evidence(log)}")

    def lose_node(self, index: int) -> None:
        """Kill a node's daemon, as if the machine had lost its power."""
        daemon = self.nodes[index]
        daemon.kill()
        daemon.wait()

    def start_node(self, index: int) -> None:
        """Start a node's daemon."""
        self.nodes[index] = _start(self, ["slurmd", "-D", "-N", f"n{index}"])

    def evidence(self, log: Path | None = None) -> str:
        """Return the ends of the logs, for a failing test."""
        parts = [*sorted((self.folder / "log").iterdir()), *([log] if log is not None else [])]
        found = [path for path in parts if path.exists() and path.stat().st_size]
        tails = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in found]
        return "\n".join(tails)


@contextmanager
def cluster(folder: Path, *, nodes: int = 2) -> Iterator[Cluster]:
    """Start a cluster in `folder`; everything is stopped at the end.

    A port that was free may be taken when the daemon binds it, so a start is tried three times.

    Raises:
        NoClusterError: a daemon does not start; the text holds the logs.
    """
    for left in reversed(range(_STARTS)):
        made = _prepare(folder / f"start{left}", nodes)
        try:
            _start_all(made, nodes)
            break
        except NoClusterError:
            _stop_all(made)
            if not left:
                raise
        except BaseException:
            _stop_all(made)
            raise
    try:
        yield made
    finally:
        _stop_all(made)


def _prepare(folder: Path, nodes: int) -> Cluster:
    for name in ("ctld", "log", *(f"n{i}" for i in range(1, nodes + 1))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(256))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(_configuration(folder, nodes))
    shared = environment({"SLURM_CONF": str(config)})
    shared["PATH"] = os.pathsep.join([shared["PATH"], "/usr/sbin", "/usr/local/sbin"])
    for name in [name for name in shared if name.startswith(("SLURM_", "LOWTIDE_"))]:
        if name != "SLURM_CONF":
            del shared[name]
    return Cluster(folder, shared)


def _start_all(made: Cluster, nodes: int) -> None:
    for command in _daemons(made.folder, made.folder / "munge.key"):
        made.daemons.append(_start(made, command))
        if command[0] == "munged":
            _wait_for(lambda: (made.folder / "munge.sock").exists(), made)
    for index in range(1, nodes + 1):
        made.start_node(index)
    _wait_for(lambda: _idle_nodes(made) == nodes, made)


def _stop_all(made: Cluster) -> None:
    running = [*made.nodes.values(), *reversed(made.daemons)]
    for daemon in running:
        daemon.send_signal(signal.SIGTERM)
    for daemon in running:
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _daemons(folder: Path, key: Path) -> list[list[str]]:
    # --force: munged minds that it is root, and that pytest's folders are closed to other users.
    ends = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{name}={folder / f'munge.{end}'}" for name, end in ends.items()]
    daemons = [["munged", "--foreground", "--force", f"--key-file={key}", *files]]
    return [*daemons, ["slurmctld", "-D", "-i"]]


def _start(made: Cluster, command: Sequence[str]) -> subprocess.Popen[bytes]:
    name = "-".join([command[0], *(word for word in command if word.startswith("n"))])
    with open(made.folder / "log" / f"{name}.out", "ab") as log:
        return subprocess.Popen(
            command, env=made.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def _wait_for(is_true: object, made: Cluster) -> None:
    assert callable(is_true)
    deadline_s = time.monotonic() + _START_S
    while not is_true():
        dead = [daemon.args for daemon in made.daemons if daemon.poll() is not None]
        if dead or time.monotonic() > deadline_s:
            raise NoClusterError(f"Slurm does not start (ended: {dead})\n{made.evidence()}")
        time.sleep(0.1)


def _idle_nodes(made: Cluster) -> int:
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D"],
            env=made.env, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # it waits for a controller that is not up yet
        return 0
    return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def _configuration(folder: Path, nodes: int) -> str:
    host = socket.gethostname().split(".")[0]
    # Each node has an address of its own (all of 127/8 is this machine), as on a real cluster.
    lines = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.{i} Port={free_port()} "
        "CPUs=2 RealMemory=4000 State=UNKNOWN"
        for i in range(1, nodes + 1)
    ]
    settings: Mapping[str, object] = {
        "ClusterName": "lowtidetest",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits for this long: two minutes by default, and with less than 5 s.
        "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=5",
        "StateSaveLocation": folder / "ctld",
        "SlurmdSpoolDir": folder / "%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",  # cgroups are seldom to be had in a container
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "ReturnToService": 2,
        "KillWait": 15,
        "SlurmctldTimeout": 30,
        "SlurmdTimeout": 10,
    }
    every = f"Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP"
    partitions = [
        f"PartitionName=low {every} Default=YES PriorityTier=1 GraceTime=10",
        f"PartitionName=high {every} PriorityTier=10 PreemptMode=off",
    ]
    return "\n".join([*(f"{k}={v}" for k, v in settings.items()), *lines, *partitions]) + "\n"
