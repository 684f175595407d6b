"""What is asked of Slurm, through ``scontrol`` only: accounting (``sacct``) is often not there."""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import subprocess
import time

from lowtide.core.errors import LaunchError

TIMEOUT_S = 30.0
REQUEUE_PATIENCE_S = 300.0


def scontrol(*words: str) -> str:
    """Return what ``scontrol`` prints.

    Raises:
        LaunchError: it is not there, fails, or does not answer in time.
    """
    command = ["scontrol", *words]
    text = " ".join(command)
    if shutil.which("scontrol") is None:
        raise LaunchError(
            f"`{text}`: scontrol is not on PATH; load Slurm's module in your site file "
            "(launch/site.example.sh shows where), or run on the host and not in the container"
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"`{text}`: no answer within {TIMEOUT_S:.0f} s; the Slurm controller is down or busy"
        ) from error
    if done.returncode != 0:
        raise LaunchError(f"`{text}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def node_names(nodelist: str) -> list[str]:
    """Return the nodes of a Slurm list such as ``n[1-3,7]``, in Slurm's order."""
    return scontrol("show", "hostnames", nodelist).split()


def node_address(node: str, *, is_only: bool = False) -> str:
    """Return the IP address at which the other nodes reach `node`.

    Slurm's own address comes first: it works for Slurm. A name that leads to this machine itself
    (Debian writes ``127.0.1.1 <hostname>`` into /etc/hosts) is refused: every node would then form
    a job of its own.

    Args:
        node: A node name.
        is_only: The job has no other node, so a loopback address does no harm.

    Raises:
        LaunchError: there is none; the text lists what was tried.
    """
    found = re.search(r"\bNodeAddr=(\S+)", scontrol("-o", "show", "node", node))
    given = found[1] if found else node
    try:
        return str(ipaddress.ip_address(given))  # even a loopback one: Slurm itself says so
    except ValueError:
        pass
    tried = []
    for name in dict.fromkeys([given, node]):
        try:
            records = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            tried.append(f"{name} ({error.strerror or error})")
            continue
        for record in sorted(records, key=lambda each: each[0] != socket.AF_INET):
            address = str(record[4][0])
            if is_only or not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
                return address
            tried.append(f"{name} -> {address} (this machine itself)")
    raise LaunchError(
        f"node {node}: no address at which other nodes reach it. Tried {'; '.join(tried)}. "
        "Set LOWTIDE_HEAD_ADDRESS to the address of the first node, or ask for NodeAddr in "
        "slurm.conf"
    )


def job_facts(job: str) -> dict[str, str]:
    """Return Slurm's facts about a job ("JobState", "PreemptTime", ...), empty when forgotten."""
    try:
        text = scontrol("-o", "show", "job", job)
    except LaunchError:
        return {}
    return dict(re.findall(r"\b(\w+)=(\S*)", text))


def requeue(job: str) -> None:
    """Put a job back into the queue; Slurm then ends its batch script.

    A controller that is too busy to answer is asked again for some minutes.

    Raises:
        LaunchError: Slurm refuses, or does not answer.
    """
    end_s = time.monotonic() + REQUEUE_PATIENCE_S
    while True:
        try:
            scontrol("requeue", job)
            return
        except LaunchError as error:
            is_busy = "no answer" in str(error) or "Unable to contact" in str(error)
            if not is_busy or time.monotonic() > end_s:
                raise
        time.sleep(5)
