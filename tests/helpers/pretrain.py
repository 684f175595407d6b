"""The main example, made small and exact, for the tests that run it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.ranks import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "pretrain"


def write_text(root: Path) -> Path:
    """Write a small collection of text into the new folder `root`; return it."""
    root.mkdir()
    for number, path in enumerate(sorted((REPOSITORY / "plugins" / "lowtide").rglob("*.py"))):
        (root / f"{number}.txt").write_bytes(path.read_bytes())
    return root


def arguments(
    text: Path, run: Path, steps: int, *, torch_adam: bool = True, without: str | None = None
) -> list[str]:
    """Return script and arguments of a run of a tiny model; writes ``ds.json`` beside `text`.

    Args:
        text: Folder of the text.
        run: Folder of the run.
        steps: Length of the run.
        torch_adam: DeepSpeed's C++ Adam carries beta**t along as a product and starts again with a
            power when it resumes, which differs in the last bit. With torch's Adam everything can
            be exact; the offload plugin reproduces DeepSpeed's and is left out then.
        without: A plugin to leave out.
    """
    config = json.loads((EXAMPLE / "ds.json").read_text(encoding="utf-8"))
    if torch_adam:
        config["optimizer"]["params"]["torch_adam"] = True
        del config["lowtide"]["offload"]
    if without is not None:
        del config["lowtide"][without]
    config["scheduler"]["params"]["warmup_num_steps"] = 10
    (text.parent / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    shape = "--layers 2 --width 32 --heads 2 --sequence 32 --vocabulary 300".split()  # noqa: SIM905
    place = ["--config", str(text.parent / "ds.json"), "--data", str(text), "--run-dir", str(run)]
    return [str(EXAMPLE / "train.py"), *shape, *place, "--steps", str(steps)]


def losses(run: Path) -> dict[int, float]:
    """Return losses by step; a step done again after a crash counts as it was the last time."""
    lines = (run / "telemetry" / "rank0.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {
        r["step"]: r["value"]
        for r in records
        if r["kind"] == "scalar" and r["name"] == "train/loss"
    }
