"""Before torch is loaded: does every node answer, alike, and reach the folder and the first node?

`check` starts one small task per node through srun and compares what comes back; `probe` is what
runs there. A fault costs seconds here and otherwise shows as a start that hangs without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lowtide.core.config import load_block, resolve
from lowtide.core.errors import ConfigError, LaunchError
from lowtide.launch.node import node_index, task_command
from lowtide.launch.plan import PLAN_VARIABLE, Plan

LIMIT_S = 60.0
_START_S = 20.0  # for srun and Python to start on all nodes
_KILL_S = 10.0
PACKAGES = ("lowtide", "torch", "deepspeed", "megatron-core", "transformers", "numpy")
_MARK = "lowtide-probe "
_TOKEN_VARIABLE = "LOWTIDE_PREFLIGHT_TOKEN"
_LIMIT_VARIABLE = "LOWTIDE_PREFLIGHT_S"


def probe(plan: Plan) -> dict[str, Any]:
    """Look at this node; never raises for a fault of the node, it reports it.

    Returns:
        "node", "python", "packages" and "problems": one line of text each.
    """
    index = node_index(plan)
    problems = [*_config_problems(plan), *_folder_problems(plan, index)]
    problems += _rank_problems(plan)
    limit_s = float(os.environ.get(_LIMIT_VARIABLE, LIMIT_S))
    problems += _network_problems(plan, index, max(5.0, limit_s - _START_S))
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "node": plan.nodes[index],
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": packages,
        "problems": problems,
    }


def _config_problems(plan: Plan) -> list[str]:
    if plan.config is None:
        return []
    try:
        resolve(load_block(plan.config) or {})
    except (ConfigError, OSError) as error:
        return [f"configuration {plan.config}: {error}"]
    return []


def _folders(plan: Plan) -> dict[str, Path]:
    folders = {"run folder": Path(plan.run_dir), "checkpoint folder": Path(plan.checkpoints)}
    if folders["checkpoint folder"].is_relative_to(folders["run folder"]):
        del folders["checkpoint folder"]
    return folders


def _folder_problems(plan: Plan, index: int) -> list[str]:
    token = os.environ.get(_TOKEN_VARIABLE, "")
    problems = []
    for name, folder in _folders(plan).items():
        mine = folder / f".preflight-{token}-{index}"
        try:
            mine.write_text(plan.nodes[index], encoding="utf-8")
        except OSError as error:
            problems.append(f"{name} {folder} cannot be written ({error.strerror})")
            continue
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
        if not (folder / f".preflight-{token}").exists():
            place = f"{name} {folder} is not the same as on {plan.nodes[0]}"
            problems.append(f"{place}: put it on a file system that all nodes share")
    return problems


def _rank_problems(plan: Plan) -> list[str]:
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and int(gpus) < plan.procs_per_node:
        found = f"Slurm gave it {gpus} GPUs for {plan.procs_per_node} ranks"
        remedy = f"ask for --gpus-per-node={plan.procs_per_node}, or set LOWTIDE_NPROC"
        return [f"{found}; {remedy}"]
    return []


def _network_problems(plan: Plan, index: int, limit_s: float) -> list[str]:
    if index == 0:
        return _answer_all(plan, limit_s)
    head, port = plan.addresses[0], plan.port
    why = "no answer"
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        try:
            with socket.create_connection((head, port), timeout=5) as connection:
                connection.sendall(bytes([index % 256]))
                return []
        except socket.gaierror as error:  # a name, and it leads nowhere: waiting does not help
            why = error.strerror or str(error)
            break
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.3)
    line = f"{plan.nodes[0]} at {head} port {port} cannot be reached from here ({why})"
    remedy = "a firewall, or the wrong interface; LOWTIDE_HEAD_ADDRESS and LOWTIDE_PORT name others"
    return [f"{line}: {remedy}"]


def _answer_all(plan: Plan, limit_s: float) -> list[str]:
    """Listen on the rendezvous port until every other node has called."""
    head = plan.addresses[0]
    family = socket.AF_INET6 if ":" in head else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((head, 0))  # tells an address that is not ours from a port that is taken
        except OSError as error:
            return [f"address {head} is not one of this node's ({error.strerror})"]
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((head, plan.port))
            server.listen(len(plan.nodes))
        except OSError as error:
            line = f"port {plan.port} on {head} cannot be used ({error.strerror})"
            return [f"{line}; set LOWTIDE_PORT to another one, or leave it out"]
        calls = 0
        end_s = time.monotonic() + limit_s
        while calls < len(plan.nodes) - 1 and time.monotonic() < end_s:
            server.settimeout(max(0.1, end_s - time.monotonic()))
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                connection.settimeout(5)
                with connection:
                    calls += len(connection.recv(1))  # a port scanner says nothing
    return []  # the node that could not call says so itself


def print_probe(plan: Plan) -> None:
    """Write the probe's findings for `check` to stdout."""
    sys.stdout.write(f"{_MARK}{json.dumps(probe(plan))}\n")


def check(plan: Plan, *, limit_s: float = LIMIT_S) -> tuple[list[dict[str, Any]], list[str]]:
    """Probe all nodes of the plan; return what they said and one line per problem.

    Raises:
        LaunchError: srun cannot be started.
    """
    found, noise = _probe_all(plan, limit_s)
    problems = [f"{each['node']}: {line}" for each in found for line in each["problems"]]
    is_deaf = any("cannot be used" in p or "is not one of this node's" in p for p in problems)
    if is_deaf:  # then nobody can call; once is enough
        problems = [line for line in problems if "cannot be reached" not in line]
    silent = [node for node in plan.nodes if node not in {each["node"] for each in found}]
    for node in silent:
        said = "; ".join(noise[-3:]) or "nothing at all"
        problems.append(f"{node}: no answer within {limit_s:.0f} s; srun said: {said}")
    return found, problems + _differences(found)


def silent_nodes(plan: Plan, *, limit_s: float = 30.0) -> list[str]:
    """Return the nodes of the plan that do not answer within `limit_s`."""
    found, _ = _probe_all(plan, limit_s)
    return [node for node in plan.nodes if node not in {each["node"] for each in found}]


def _differences(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    first, lines = found[0], []
    for other in found[1:]:
        versions = [("Python", first["python"].split()[0], other["python"].split()[0])]
        names = sorted({*first["packages"], *other["packages"]})
        versions += [
            (n, *(each["packages"].get(n, "missing") for each in (first, other))) for n in names
        ]
        lines += [
            f"{other['node']}: {name} is {there}, on {first['node']} it is {here}; "
            "use the same environment on all nodes"
            for name, here, there in versions
            if here != there
        ]
    return lines


def _probe_all(plan: Plan, limit_s: float) -> tuple[list[dict[str, Any]], list[str]]:
    token = uuid.uuid4().hex
    markers = [folder / f".preflight-{token}" for folder in _folders(plan).values()]
    for marker in markers:
        with contextlib.suppress(OSError):  # the head's probe says it better
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    environment = {**os.environ, PLAN_VARIABLE: plan.to_json(), _TOKEN_VARIABLE: token}
    environment[_LIMIT_VARIABLE] = str(limit_s)
    try:
        lines = list(_run(_command(plan), environment, limit_s))
    finally:
        for marker in markers:
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)
    found = []
    noise = []
    for line in lines:
        _, mark, text = line.partition(_MARK)
        if mark:
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
        elif line.strip():
            noise.append(line.strip())
    return sorted(found, key=lambda each: plan.nodes.index(each["node"])), noise


def _command(plan: Plan) -> list[str]:
    if plan.job_id is None:
        return task_command("probe")
    nodes = str(len(plan.nodes))
    # As many tasks as nodes, whatever the job was given for its own steps.
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap",
            "--export=ALL", *task_command("probe")]  # fmt: skip


def _run(command: Sequence[str], environment: dict[str, str], limit_s: float) -> Iterator[str]:
    try:
        process = subprocess.Popen(
            command, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]}: {error.strerror}") from error
    timers = [
        threading.Timer(limit_s, process.terminate),
        threading.Timer(limit_s + _KILL_S, process.kill),
    ]
    for timer in timers:
        timer.start()
    try:
        with process:
            yield from process.stdout or ()
    finally:
        for timer in timers:
            timer.cancel()
