"""What one srun task becomes: torchrun for its node, or one rank."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowtide.core.errors import LaunchError
from lowtide.core.restart import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE
from lowtide.launch import slurm
from lowtide.launch.plan import FIRST_PORT, PORTS, Plan

TASK_VARIABLE = "LOWTIDE_TASK"  # launch/lib/task.sh: sets up the environment of each node


@dataclass(frozen=True, kw_only=True)
class Start:
    """A command and what it needs in its environment."""

    command: list[str]
    environment: dict[str, str]


def task_command(verb: str) -> list[str]:
    """Return the command that runs ``lowtide launch <verb>`` on a node."""
    wrapper = os.environ.get(TASK_VARIABLE)
    return [wrapper, verb] if wrapper else [sys.executable, "-m", "lowtide.launch", verb]


def interface_of(address: str) -> str | None:
    """Return the network interface of this node that owns `address`, or None."""
    import psutil  # type: ignore[import-untyped]

    own = {
        str(entry.address).partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
    }
    if address not in own and address.startswith("127."):
        return own.get("127.0.0.1")
    return own.get(address)


def step_command(plan: Plan, script: Sequence[str]) -> list[str]:
    """Return the srun line that starts `script` on every node of the plan."""
    per_node = plan.procs_per_node if plan.mode == "rank" else 1
    nodes = len(plan.nodes)
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * per_node}"]
    command += [f"--ntasks-per-node={per_node}", "--export=ALL", "--label"]
    # One node that fails ends the others: they would wait for it until their time is up.
    command += ["--kill-on-bad-exit=1"]
    return [*command, *task_command("node"), "--", *script]


def node_index(plan: Plan, environment: Mapping[str, str] = os.environ) -> int:
    """Return which of the plan's nodes this is.

    Raises:
        LaunchError: none of them, or nothing tells.
    """
    if plan.job_id is None:
        return 0
    name = environment.get("SLURMD_NODENAME")
    if name in plan.nodes:
        return plan.nodes.index(name)
    raise LaunchError(
        f"this node is {name or 'not known (SLURMD_NODENAME is not set)'}, the plan is for "
        f"{', '.join(plan.nodes)}; start one task per node with srun inside the same job"
    )


def make_start(
    plan: Plan, script: Sequence[str], environment: Mapping[str, str] = os.environ
) -> Start:
    """Return what this task is to run.

    Args:
        plan: The plan of this start.
        script: ``train.py ARG...`` or ``-m module ARG...``.
        environment: This task's.

    Raises:
        LaunchError: the script is missing, or Slurm started another number of tasks.
    """
    if not script or (script[0] == "-m" and len(script) == 1):
        raise LaunchError("no script given; write it after --, e.g. -- train.py --epochs 3")
    if script[0] != "-m" and not os.path.isfile(script[0]):
        raise LaunchError(f"script {script[0]} does not exist (in {os.getcwd()} on this node)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    added = {
        RUN_DIR_VARIABLE: plan.run_dir,
        ATTEMPT_VARIABLE: plan.attempt,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, (cores or 1) // plan.procs_per_node)),
        "NCCL_DEBUG": "WARN",
        # torchrun kills workers this long after SIGTERM: 30 s by default, for some a short save.
        # The grace time of the cluster ends it in any case.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
    }
    interface = interface_of(plan.addresses[node_index(plan, environment)])
    if len(plan.nodes) > 1 and interface is not None:
        # gloo looks its own address up by the host's name, which often means 127.0.1.1.
        added["GLOO_SOCKET_IFNAME"] = interface
    # The user's and the site's settings count more than ours, except for who and where we are.
    ours = (RUN_DIR_VARIABLE, ATTEMPT_VARIABLE)
    added = {k: v for k, v in added.items() if k in ours or k not in environment}
    if plan.mode == "rank":
        return Start(
            command=[sys.executable, *script],
            environment={**added, **_rank_variables(plan, environment)},
        )
    index = node_index(plan, environment)
    command = [sys.executable, "-m", "torch.distributed.run"]
    # Static: rank 0 runs on the head. Under c10d it lands on any node, with its files and logs.
    command += ["--rdzv-backend", "static", "--rdzv-endpoint", f"{plan.addresses[0]}:{plan.port}"]
    command += ["--rdzv-id", plan.attempt, "--nnodes", str(len(plan.nodes))]
    command += ["--node-rank", str(index), "--local-addr", plan.addresses[index]]
    command += ["--nproc-per-node", str(plan.procs_per_node)]
    command += ["--max-restarts", "0"]  # to start again is Slurm's business
    command += ["--log-dir", str(plan.log_dir / f"node{index}"), "--tee", "3"]
    return Start(command=[*command, *script], environment=added)


def _rank_variables(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    index = node_index(plan, environment)
    local = int(environment.get("SLURM_LOCALID", "0")) if plan.job_id else 0
    tasks = int(environment.get("SLURM_NTASKS", "1")) if plan.job_id else 1
    if tasks != plan.world_size:
        raise LaunchError(
            f"mode rank: srun started {tasks} tasks, the plan has {plan.world_size} ranks "
            f"({len(plan.nodes)} nodes x {plan.procs_per_node}); give srun "
            f"--ntasks={plan.world_size} --ntasks-per-node={plan.procs_per_node}"
        )
    return {
        "RANK": str(index * plan.procs_per_node + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.procs_per_node),
        "MASTER_ADDR": plan.addresses[0],
        "MASTER_PORT": str(plan.port),
    }


def slurm_rank_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return RANK and the like for a task of plain ``srun python -m lowtide.run train.py``.

    Every task derives the same meeting point for itself. Empty where a launcher has set the rank
    already, and outside a step of several tasks.

    Raises:
        LaunchError: the first node has no address that others can reach.
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or tasks == "1":
        return {}
    nodes = slurm.node_names(environment.get("SLURM_STEP_NODELIST", ""))
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    head = environment.get("LOWTIDE_HEAD_ADDRESS")
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": head or slurm.node_address(nodes[0], is_only=len(nodes) == 1),
        "MASTER_PORT": environment.get("LOWTIDE_PORT") or str(FIRST_PORT + number % PORTS),
    }


def become(start: Start) -> None:
    """Replace this process by the command. Does not return."""
    # Slurm sends the warning to every process of the step. torchrun has no handler and would die
    # of it before the workers have saved; ignored is inherited, and the workers set their own.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.execvpe(start.command[0], start.command, {**os.environ, **start.environment})
