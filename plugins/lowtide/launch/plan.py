"""Who runs where: nodes, addresses, port, ids, where to go on, when to be warned."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowtide.core.errors import CheckpointError, LaunchError
from lowtide.core.restart import choose, read_stop
from lowtide.launch import slurm

PLAN_VARIABLE = "LOWTIDE_PLAN"  # how the plan travels from the batch script to every node
DEFAULT_LEAD_S = 180.0
SLURM_EARLY_S = 60.0  # Slurm's clock for --signal ticks in minutes
MARGIN_S = 30.0
FIRST_PORT, PORTS = 20000, 12000  # ends below the range from which systems hand out ports
PORTS_TRIED = 50
MODES = ("torchrun", "rank")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for; empty values are found out.

    Attributes:
        run_dir: Folder of the run, the same in every start.
        config: DeepSpeed JSON, only checked, or None.
        checkpoints: Folder that ``save_checkpoint`` gets. [run_dir/checkpoints]
        procs_per_node: Ranks per node. [GPUs of the node, else 1]
        mode: "torchrun" (one task per node) or "rank" (one task per rank).
        head_address: Address of the first node. [asked of Slurm]
        port: Port on the first node. [made from the job id, the next free one]
    """

    run_dir: Path
    config: Path | None = None
    checkpoints: Path | None = None
    procs_per_node: int | None = None
    mode: str = "torchrun"
    head_address: str | None = None
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One start of a job.

    Attributes:
        attempt: ``<job id>.<restart count>``; names logs and ties ``stop.json`` to this start.
        job_id: Slurm's, or None outside Slurm. A task of an array is ``<array>_<task>``: the plain
            number of one of them stands for the whole array.
        restart_count: How often Slurm has started the job before.
        run_dir: Folder of the run.
        config: DeepSpeed JSON, or None.
        checkpoints: Folder of the checkpoints.
        nodes: Node names; the first is the head, where rank 0 runs.
        addresses: One per node.
        port: Rendezvous port on the head.
        procs_per_node: Ranks per node.
        mode: "torchrun" or "rank".
        resume_tag: Checkpoint to go on from, or None.
        resume_step: Optimizer steps in it.
        skipped: Why newer checkpoints are not used.
        lead_s: How long before the time limit the job should be warned.
        is_lead_measured: Whether `lead_s` comes from earlier saves of this run.
    """

    attempt: str
    job_id: str | None
    restart_count: int
    run_dir: str
    config: str | None
    checkpoints: str
    nodes: tuple[str, ...]
    addresses: tuple[str, ...]
    port: int
    procs_per_node: int
    mode: str
    resume_tag: str | None
    resume_step: int
    skipped: tuple[str, ...]
    lead_s: float
    is_lead_measured: bool

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes) * self.procs_per_node

    @property
    def log_dir(self) -> Path:
        """Folder of this start's logs."""
        return Path(self.run_dir) / "logs" / self.attempt

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types, with what follows from it."""
        return {**asdict(self), "world_size": self.world_size, "log_dir": str(self.log_dir)}

    def to_json(self) -> str:
        """Return one line for the environment of every node."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Plan:
        """Read what `to_json` put into ``$LOWTIDE_PLAN``.

        Raises:
            LaunchError: it is not there or damaged.
        """
        text = environment.get(PLAN_VARIABLE)
        if text is None:
            raise LaunchError(
                f"{PLAN_VARIABLE} is not set on this node; start through launch/lowtide_run.sh or "
                "launch/sbatch/train.sbatch, and let srun export the environment (--export=ALL)"
            )
        try:
            fields = json.loads(text)
            lists = {name: tuple(fields[name]) for name in ("nodes", "addresses", "skipped")}
            return cls(**{**fields, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise LaunchError(f"{PLAN_VARIABLE}: cannot be read ({error})") from error


def make_plan(request: Request, environment: Mapping[str, str] = os.environ) -> Plan:
    """Derive the plan of this start from what was asked and from Slurm's environment.

    Raises:
        LaunchError: an address, a port or a number of ranks cannot be had; says which and why.
    """
    if request.mode not in MODES:
        raise LaunchError(f"mode {request.mode!r}: allowed are {', '.join(MODES)}")
    job_id = _job_id(environment)
    nodes = _nodes(job_id, environment)
    addresses = _addresses(nodes, job_id=job_id, head=request.head_address)
    restart_count = _number(environment, "SLURM_RESTART_COUNT", 0)
    run_dir = request.run_dir.expanduser().absolute()
    checkpoints = request.checkpoints or _last_checkpoints(run_dir) or run_dir / "checkpoints"
    checkpoints = checkpoints.expanduser().absolute()
    choice = choose(checkpoints)
    lead_s = measured_lead_s(run_dir)
    return Plan(
        attempt=f"{job_id or f'local-{os.getpid()}'}.{restart_count}",
        job_id=job_id,
        restart_count=restart_count,
        run_dir=str(run_dir),
        config=None if request.config is None else str(request.config.expanduser().absolute()),
        checkpoints=str(checkpoints),
        nodes=tuple(nodes),
        addresses=tuple(addresses),
        port=request.port or _port(environment.get("SLURM_JOB_ID"), addresses[0]),
        procs_per_node=request.procs_per_node or _procs_per_node(environment),
        mode=request.mode,
        resume_tag=choice.tag,
        resume_step=choice.step,
        skipped=tuple(choice.skipped),
        lead_s=lead_s or DEFAULT_LEAD_S,
        is_lead_measured=lead_s is not None,
    )


def _job_id(environment: Mapping[str, str]) -> str | None:
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array and task:
        return f"{array}_{task}"
    return environment.get("SLURM_JOB_ID")


def _nodes(job_id: str | None, environment: Mapping[str, str]) -> list[str]:
    if job_id is None:
        return [socket.gethostname()]
    nodelist = environment.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise LaunchError("SLURM_JOB_ID is set but SLURM_JOB_NODELIST is not: not inside a job?")
    nodes = slurm.node_names(nodelist)
    # A job of two nodes that quietly trains on one is the worst outcome of all.
    wanted = _number(environment, "SLURM_JOB_NUM_NODES", len(nodes))
    if len(nodes) != wanted:
        raise LaunchError(f"Slurm promised {wanted} nodes and lists {len(nodes)}: {nodelist}")
    return nodes


def _addresses(nodes: list[str], *, job_id: str | None, head: str | None) -> list[str]:
    if job_id is None:
        return [head or "127.0.0.1"]
    is_only = len(nodes) == 1
    rest = [slurm.node_address(node) for node in nodes[1:]]
    return [head or slurm.node_address(nodes[0], is_only=is_only), *rest]


def _last_checkpoints(run_dir: Path) -> Path | None:
    """Return the folder that the last stop of this run saved to, wherever the script puts it."""
    with contextlib.suppress(CheckpointError):
        stop = read_stop(run_dir)
        if stop is not None and stop.checkpoint is not None:
            return Path(stop.checkpoint).parent
    return None


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise LaunchError(f"{name}: got {text!r}, a whole number is needed") from error


def _procs_per_node(environment: Mapping[str, str]) -> int:
    gpus = _number(environment, "SLURM_GPUS_ON_NODE", 0)
    return gpus or len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1


def _port(job_id: str | None, address: str) -> int:
    """Return a port made from the job id: jobs that share a node then hardly ever meet."""
    number = int(job_id) if job_id is not None and job_id.isdigit() else os.getpid()
    first = number % PORTS
    for offset in range(PORTS_TRIED):
        port = FIRST_PORT + (first + offset) % PORTS
        if is_port_free(address, port) is not False:
            return port
    raise LaunchError(f"{address}: no free port in {PORTS_TRIED} from {FIRST_PORT + first} on")


def is_port_free(address: str, port: int) -> bool | None:
    """Return whether `port` can be listened on, or None when `address` is another machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As torch's store does: a port that waits for the last packets of a dead job is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, 0))
        except OSError:
            return None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def measured_lead_s(run_dir: Path) -> float | None:
    """Return how long before its limit a run must be warned, from what its saves have cost.

    Slurm's early minute, two steps (the ranks agree during the second), one save, a margin; the
    largest seen of each. None without
    records: then `DEFAULT_LEAD_S` is a guess.
    """
    step_s = save_s = 0.0
    for path in telemetry_files(run_dir):
        for record in step_records(path):
            saves = record.get("spans", {}).get("save", {})
            count = max(int(saves.get("count", 0)), 1)
            save_s = max(save_s, float(saves.get("total_s", 0.0)) / count)
            each_s = float(record.get("duration_s", 0.0)) / max(int(record.get("steps", 1)), 1)
            step_s = max(step_s, each_s)
    if save_s == 0.0:
        return None
    return 10 * math.ceil((SLURM_EARLY_S + 2 * step_s + save_s + MARGIN_S) / 10)


def telemetry_files(run_dir: Path) -> list[Path]:
    """Return rank 0's telemetry of a run, where the main job and its users put it."""
    return [*run_dir.glob("rank0.jsonl"), *run_dir.glob("telemetry/rank0.jsonl")]


def step_records(path: Path) -> list[dict[str, Any]]:
    """Return the step records of one rank's telemetry; damaged lines are left out."""
    records = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith('{"kind": "step"'):
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
    return records
