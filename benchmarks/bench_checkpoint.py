"""What a checkpoint costs, against torch.save and torch.distributed.checkpoint, in one process.

A made-up trainer runs "forward and backward" (matrix products on one thread, about a second) and
then an update that changes every tensor in place. Every round goes through all rivals and through
iterations without a checkpoint, so that drift of the machine hits all of them alike; printed are
medians over the rounds, after one round to warm up. Nothing is timed without fsync.

- blocked: seconds in which the training thread could not go on: the call, and the wait before the
  update;
- stretch: how much longer forward and backward took than in the same round without a checkpoint;
- durable: from the request until everything is synced (for Lowtide: committed, with its record);
- raw: the same number of bytes written past the page cache by four threads, in the same round.

    python benchmarks/bench_checkpoint.py [--gib 1] [--rounds 7] [--folder DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from checkpoint_asking import asking
from checkpoint_restore import restore
from checkpoint_sizes import many_tensors, memory
from checkpoint_training import every_iteration, idle, training

warnings.simplefilter("ignore")

SECTIONS: list[tuple[str, Callable[[argparse.Namespace, Path], None]]] = [
    ("training", training),
    ("idle", idle),
    ("every_iteration", every_iteration),
    ("asking", asking),
    ("many_tensors", many_tensors),
    ("memory", memory),
    ("restore", restore),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="state of the rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iteration-s", type=float, default=1.0, help="forward and backward")
    parser.add_argument("--folder", default=None, help="on the disk to measure (system's temp)")
    names = [name for name, _ in SECTIONS]
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    return parser.parse_args()


def main() -> int:
    options = parse()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29641", RANK="0", WORLD_SIZE="1")
    os.environ.update(LOCAL_RANK="0", CROSS_RANK="0", CROSS_SIZE="1")  # DeepSpeed's writer asks
    dist.init_process_group("gloo")
    print(json.dumps({"folder": options.folder or tempfile.gettempdir(), "load": os.getloadavg()}))
    for name, section in SECTIONS:
        if name not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="lowtide-bench-", dir=options.folder) as folder:
            section(options, Path(folder))
        sys.stdout.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
