"""The main job three times on the same text: full rank, low rank on one rank, low rank on two.

    python examples/tensor_parallel/twins.py [--steps 300] [--width 128] [options of the main job]

Prints sizes, bits per byte of the validation text, and what two ranks sent each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JOB = HERE.parent / "pretrain" / "train.py"


@dataclass(frozen=True)
class Twin:
    """One of the three runs."""

    name: str
    ranks: int
    config: dict[str, Any]

    def train(self, folder: Path, options: list[str]) -> None:
        """Run the main job in `folder`, from the start."""
        folder.mkdir(parents=True)
        config = folder / "ds.json"
        config.write_text(json.dumps(self.config, indent=2), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", str(self.ranks), str(JOB), "--config", str(config),
             "--run-dir", str(folder / "run"), *options],
            check=True,
        )  # fmt: skip


def twins(config: dict[str, Any]) -> list[Twin]:
    """Return the three runs; all of them see the same windows at each step."""
    full, single = deepcopy(config), deepcopy(config)
    del full["lowtide"]["tensor_parallel"]
    full["train_micro_batch_size_per_gpu"] //= 2  # two ranks read different windows
    single["lowtide"]["tensor_parallel"]["degree"] = 1
    return [
        Twin("full rank, 2 data-parallel ranks", 2, full),
        Twin("low rank, 1 rank", 1, single),
        Twin("low rank, 2 tensor-parallel ranks", 2, config),
    ]


def result(folder: Path) -> dict[str, Any]:
    """Read what a run recorded of itself."""
    scores: list[tuple[int, float]] = []
    counters: dict[str, float] = {}
    steps = 0
    with open(folder / "run" / "telemetry" / "rank0.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["kind"] == "scalar" and record["name"] == "validation/bits_per_byte":
                scores.append((record["step"], record["value"]))
            if record["kind"] == "step":
                steps = record["step"]
                for name, value in record.get("counters", {}).items():
                    counters[name] = value
    sent = {k: v for k, v in counters.items() if k.startswith("lowtide.tensor_parallel.")}
    return {"scores": scores, "steps": steps, "sent": sent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--folder", default="runs/twins", help="must not exist yet")
    parser.add_argument("--steps", type=int, default=300)
    known, options = parser.parse_known_args()
    config = json.loads(Path(known.config).read_text(encoding="utf-8"))
    folder = Path(known.folder)
    found = []
    for number, twin in enumerate(twins(config)):
        place = folder / str(number)
        twin.train(place, ["--steps", str(known.steps), *options])
        found.append((twin, result(place)))
    print(f"\n{'':36}{'bits per byte':>14}")
    for twin, facts in found:
        print(f"{twin.name:36}{facts['scores'][-1][1]:14.4f}")
    pairs = zip(found[1][1]["scores"], found[2][1]["scores"], strict=True)
    gap = max(abs(one - two) / one for (_, one), (_, two) in pairs)
    print(f"one rank and two: validation scores differ by at most {gap:.2%} on the way")
    print("sent in all, validation included, over the number of steps:")
    for name, value in sorted(found[2][1]["sent"].items()):
        print(f"  {name.removeprefix('lowtide.tensor_parallel.'):32}"
              f"{value / found[2][1]['steps']:16,.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
