"""Run the GPU tests and all benchmarks on this machine and write down what they said.

Usage: make gpu [ARGS="-k offload"]; arguments go to pytest. The report is
``benchmarks/results/<date>-<gpu>.md`` and holds the commands, their exit status and their last
lines, nothing that was not printed by them.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
SHOWN_LINES = 80
NO_TESTS_COLLECTED = 5  # pytest's exit status


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One command that ran."""

    command: str
    status: int
    duration_s: float
    output: str

    def markdown(self) -> str:
        note = ""
        if "pytest" in self.command and self.status == NO_TESTS_COLLECTED:
            note = " (no test carries the mark gpu)"
        lines = self.output.rstrip().splitlines()
        cut = f"[{len(lines) - SHOWN_LINES} lines before]\n" if len(lines) > SHOWN_LINES else ""
        tail = cut + "\n".join(lines[-SHOWN_LINES:])
        return (
            f"## `{self.command}`\n\nExit status {self.status}{note}, {self.duration_s:.0f} s.\n\n"
            f"```text\n{tail}\n```\n"
        )


def run(arguments: Sequence[str], console: Console) -> Outcome:
    """Run one command, showing its output while it runs."""
    command = " ".join(["python", *arguments])
    console.rule(command)
    begin_s = time.perf_counter()
    lines = []
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout or ():
            console.out(line, end="", highlight=False)
            lines.append(line)
    duration_s = time.perf_counter() - begin_s
    return Outcome(
        command=command, status=process.returncode, duration_s=duration_s, output="".join(lines)
    )


def first_line(*command: str) -> str:
    """Return the first line a command prints, or why there is none."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return next(iter(done.stdout.splitlines()), "unknown")


def main(arguments: Sequence[str]) -> int:
    import torch

    console = Console()
    if not torch.cuda.is_available():
        console.print(
            f"make gpu needs an NVIDIA GPU that torch can use; torch {torch.__version__} sees none."
            " Check nvidia-smi, and that torch is a CUDA build.",
            style="red",
        )
        return 1
    gpu = torch.cuda.get_device_name(0)
    results = [run(["-m", "pytest", "-m", "gpu", *arguments], console)]
    scripts = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    results += [run([str(script.relative_to(ROOT))], console) for script in scripts]
    now = datetime.datetime.now(datetime.timezone.utc)
    is_clean = first_line("git", "status", "--porcelain") == "unknown"  # it printed nothing
    facts = {
        "GPU": f"{torch.cuda.device_count()} x {gpu}",
        "Driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Python": platform.python_version(),
        "Commit": first_line("git", "rev-parse", "HEAD") + ("" if is_clean else " with changes"),
        "Date": now.strftime("%Y-%m-%d %H:%M UTC"),
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    report = ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d}-{name}.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    body = "\n".join(outcome.markdown() for outcome in results)
    report.write_text(f"# GPU report\n\n{table}\n\n{body}", encoding="utf-8")
    console.print(f"Report: {report.relative_to(ROOT)}")
    failed = [r for r in results if r.status not in (0, NO_TESTS_COLLECTED)]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
