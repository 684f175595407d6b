"""Processes for writers that meet faults: one that has all modules, and its children.

    python -m tests.checkpoint.writer_worker

Reads requests, one JSON object per line, and answers each with one. Every case runs in a forked
child, which ends as any interpreter does; to start one anew for each would take most of the time.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.checkpoint.writer_cases import PAGE, Draft, Way, aligned_array, finish, simple


def write_beside_a_good_job(way: Way, folder: Path) -> dict[str, Any]:
    """Write to a folder with faults and, at once, to one without."""
    writer = way.open(slabs=4)
    bad = Draft(folder / "faulty").literal(b"h" * 100).entry(0, aligned_array(20 * PAGE, 100))
    bad.patch(0)
    good = simple(folder / "good", 10 * PAGE + 7)
    tickets = [writer.submit([draft.plan()]) for draft in (bad, good)]
    good.check(finish(tickets[1])[0])
    is_durable = tickets[0].wait_durable(20.0)
    is_free = tickets[0].wait_captured(20.0)
    error = None if tickets[0].error is None else str(tickets[0].error)
    if is_durable:
        bad.check(tickets[0].results()[0].crc32)
    is_closed = writer.close(timeout_s=20.0)
    facts = writer.facts()
    return {
        "is_durable": is_durable,
        "is_free": is_free,
        "error": error,
        "is_closed": is_closed,
        "open": [fd for fd in os.listdir("/proc/self/fd") if "faulty" in target(fd)],
        "is_direct": facts["is_direct"],
        "direct_reason": facts["direct_reason"],
    }


def grow_beside_a_guess(way: Way, folder: Path) -> dict[str, Any]:
    """Write a file that is told in two parts and was expected to become much more."""
    writer = way.open(slabs=16)
    draft = Draft(folder / "faulty").entry(0, aligned_array(8 * PAGE, 0))
    first = dataclasses.replace(draft.plan(), expected_bytes=40 * PAGE)
    ticket = writer.submit([first], is_partial=True)
    end_s = time.monotonic() + 20.0
    while ticket.progress().written_bytes < 8 * PAGE and time.monotonic() < end_s:
        time.sleep(0.001)
    held = draft.path.stat()
    draft.literal(b"the rest").patch(0)
    ticket.extend(draft.plan())
    draft.check(*finish(ticket))
    assert writer.close(timeout_s=20.0)
    return {"size": held.st_size, "held": held.st_blocks * 512}


def target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def hang(way: Way, folder: Path) -> dict[str, Any]:
    """Meet a disk that does not answer; the process must still end."""
    writer = way.open(slabs=16)
    ticket = writer.submit([simple(folder / "faulty", 8 * PAGE).plan()])
    seen: dict[str, Any] = {"is_captured": ticket.wait_captured(20.0)}
    seen["is_durable"] = ticket.wait_durable(0.3)
    seen["idle_s"] = ticket.progress().idle_s
    begin_s = time.monotonic()
    seen["is_closed"] = writer.close(timeout_s=0.1)
    seen["close_s"] = time.monotonic() - begin_s
    seen["error"] = str(ticket.error)
    return seen


def hang_unclosed(way: Way, folder: Path) -> dict[str, Any]:
    """Leave it to the interpreter's end to deal with a writer that hangs."""
    global kept
    writer = way.open(slabs=2)
    kept = writer, writer.submit([simple(folder / "faulty", 8 * PAGE).plan()])
    time.sleep(0.2)
    return {}


def hang_in_direct_lane(way: Way, folder: Path) -> dict[str, Any]:
    """Let writes hang that read live memory: that must never be given back."""
    writer = way.open(slabs=2)
    draft = Draft(folder / "faulty").entry(0, aligned_array(30 * PAGE, 0))
    ticket = writer.submit([draft.plan()])
    seen: dict[str, Any] = {"is_captured": ticket.wait_captured(0.5)}
    ticket.cancel()
    seen["is_free"] = ticket.wait_captured(0.3)
    seen["is_closed"] = writer.close(timeout_s=0.0)
    draft.arrays.clear()
    del ticket
    from lowtide.checkpoint.writer import native_writer

    seen["abandoned"] = len(native_writer._abandoned)
    return seen


def exit_with_work(way: Way, folder: Path) -> dict[str, Any]:
    """End the interpreter in the middle of a job."""
    global kept
    writer = way.open(slabs=2, bytes_per_s=50_000.0)
    kept = writer, writer.submit([simple(folder / "late", 500_000).plan()])
    return {}


def exit_with_waiting_threads(way: Way, folder: Path) -> dict[str, Any]:
    """End the interpreter while daemon threads wait for a job."""
    global kept
    writer = way.open(slabs=2, bytes_per_s=50_000.0)
    ticket = writer.submit([simple(folder / "late", 500_000).plan()])
    for wait in (ticket.wait_captured, ticket.wait_durable) * 4:
        threading.Thread(target=wait, daemon=True).start()
    kept = writer
    time.sleep(0.2)
    return {}


def limit_file_size(way: Way, folder: Path) -> dict[str, Any]:
    """Write more than the process may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (15 * PAGE, 15 * PAGE))
    return write_beside_a_good_job(way, folder)


def fork(way: Way, folder: Path) -> dict[str, Any]:
    """Fork in the middle of a job: the child ends, the parent goes on."""
    from lowtide.core.errors import CheckpointError

    writer = way.open(slabs=4, bytes_per_s=400_000.0)
    draft = simple(folder / "good", 100_000)
    ticket = writer.submit([draft.plan()])
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            refusals = 0
            for call in (
                lambda: ticket.wait_durable(1.0),
                lambda: ticket.progress(),
                lambda: writer.submit([draft.plan()]),
                lambda: writer.facts(),
                lambda: writer.close(timeout_s=1.0),
            ):
                try:
                    call()
                except CheckpointError as error:
                    refusals += "parent process" in str(error)
            if refusals != 5:
                os._exit(9)
            del ticket, writer, call
            own = way.open(slabs=4)  # one of its own works
            mine = simple(folder / f"child{os.getpid()}", 30_000)
            mine.check(finish(own.submit([mine.plan()]))[0])
            sys.exit(7)  # through the interpreter's whole end
        children.append(child)
        time.sleep(0.02)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    draft.check(finish(ticket)[0])
    return {"codes": codes, "is_closed": writer.close(timeout_s=20.0)}


def run_case(request: dict[str, Any]) -> None:
    """Run one case in a child, which prints what it saw as JSON."""
    for stream, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ["FAULT"] = request["fault"]
    way = Way(request["implementation"], request["io"], request["direct"])
    seen = globals()[request["case"]](way, Path(request["folder"]))
    print(json.dumps(seen), flush=True)
    if not request["ends"]:
        os._exit(0)


def exit_code(child: int, timeout_s: float) -> int:
    """Return how a child ended; one that does not is killed."""
    end_s = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def main() -> None:
    assert threading.active_count() == 1, "a fork would lose the others"
    gc.freeze()  # the children need not look for garbage in the modules when they end
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run_case(request)
            return  # through the interpreter's whole end
        print(json.dumps({"code": exit_code(child, request["timeout_s"])}), flush=True)


if __name__ == "__main__":
    main()
