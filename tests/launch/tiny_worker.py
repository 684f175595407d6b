"""A job without torch: a step is a sleep, a checkpoint is a folder with a completion record."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lowtide.core.config import StopConfig
from lowtide.core.restart import StopControl, choose, write_record


def save(run: Path, step: int, stop: StopControl) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.bin").write_text(str(step))
    write_record(folder, step=step, world_size=int(os.environ["WORLD_SIZE"]), config={})
    stop.saved(step, str(folder))


def is_a_peer_gone(run: Path, begin_s: float) -> bool:
    """Tell whether a rank that has been seen since our start has not been for some seconds."""
    if os.environ.get("TINY_PEERS") != "1":
        return False
    seen = [path.stat().st_mtime for path in run.glob("rank*.step")]
    return any(time_s > begin_s and time.time() - time_s > 4 for time_s in seen)


def all_stop(run: Path) -> bool:
    wanted = [run / f"rank{rank}.stops" for rank in range(int(os.environ["WORLD_SIZE"]))]
    end_s = time.monotonic() + 3
    while time.monotonic() < end_s and not all(path.exists() for path in wanted):
        time.sleep(0.05)
    return all(path.exists() for path in wanted)


def main(mode: str, steps: int, step_s: float) -> None:
    run, rank = Path(os.environ["LOWTIDE_RUN_DIR"]), int(os.environ["RANK"])
    if mode == "deaf" and os.environ["LOWTIDE_ATTEMPT"].endswith(".0"):
        (run / f"rank{rank}.step").write_text("0")
        time.sleep(60)  # still starting: nobody listens to signals yet
    stop = StopControl(StopConfig(then="tell"), rank=rank)
    stop.listen()
    (run / f"rank{rank}.stops").unlink(missing_ok=True)
    begin_s = time.time()
    begin = choose(run / "checkpoints").step
    node = os.environ.get("SLURMD_NODENAME", "laptop")
    place = f"rank {rank} of {os.environ['WORLD_SIZE']} on {node}, pid {os.getpid()}"
    print(f"{place}, meets at {os.environ['MASTER_ADDR']}, begins at {begin}", flush=True)
    for step in range(begin + 1, steps + 1):
        time.sleep(step_s)
        (run / f"rank{rank}.step").write_text(str(step))
        if is_a_peer_gone(run, begin_s):
            sys.exit("another rank does not answer")  # as a collective would
        if mode == "crash" and step == begin + 2:
            sys.exit(7)
        if mode == "stuck":
            stop.request()  # asks for a restart each time, and never gets on
        if stop.poll(step):
            (run / f"rank{rank}.stops").touch()
            if not all_stop(run):
                sys.exit("another rank is gone: nothing to agree on")  # as a collective would
            if rank == 0 and mode != "stuck":
                save(run, step, stop)
            stop.finish(step)
            print(f"rank {rank} stops at {step}", flush=True)
            return
    if rank == 0:
        save(run, steps, stop)
        print(f"reached the end at {steps}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
