"""Run benchmarks and write down what they said, with hardware, commit and commands.

    python benchmarks/report.py                            every benchmark
    python benchmarks/report.py host_overhead -- --pairs 4000   one, with its own options
    python benchmarks/report.py --gpu [-- -k offload]      GPU tests first; options go to pytest

`make bench` and `make gpu` call it. The report is ``benchmarks/results/<date>-<what>-<machine>.md``
and holds nothing that the commands did not print.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
SHOWN_LINES = 160
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


def machine() -> tuple[str, dict[str, str]]:
    """Return a short name of this machine and the facts that a reader of the figures needs."""
    import torch

    from lowtide.core.telemetry import environment

    facts = environment()
    # Only "unknown" when it printed nothing, so when there is no change.
    is_clean = first_line("git", "status", "--porcelain", "--untracked-files=no") == "unknown"
    commit = first_line("git", "rev-parse", "HEAD") + ("" if is_clean else " with changes")
    table = {
        "CPU": f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB",
        "System": f"{facts['platform']}, Python {facts['python']}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "DeepSpeed": str(facts.get("deepspeed", "not installed")),
        "Load before": f"{os.getloadavg()[0]:.2f} (mean number of running processes, 1 minute)",
        "Commit": commit,
        "Date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M UTC}",
    }
    name = f"{facts['cores']}-cores"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        table["GPU"] = f"{torch.cuda.device_count()} x {name}, driver {first_line(*query)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), table


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what stands behind ``--`` for the commands themselves."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    known = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description="Run benchmarks and write a report.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (all)")
    parser.add_argument("--gpu", action="store_true", help="run the GPU tests first")
    options = parser.parse_args(words[:cut])
    for name in options.names:
        if name not in known:
            parser.error(f"no benchmark {name!r}; there are {', '.join(known)}")
    options.names = options.names or known
    options.topic = "-".join(options.names) if options.names != known else "all"
    return options, words[cut + 1 :]


def main(arguments: Sequence[str]) -> int:
    """Run what `arguments` name; return 0 when every command ended well."""
    import torch

    options, rest = parse(arguments)
    console = Console()
    if options.gpu and not torch.cuda.is_available():
        console.print(
            f"make gpu needs an NVIDIA GPU that torch can use; torch {torch.__version__} sees none."
            " Check nvidia-smi, and that torch is a CUDA build.",
            style="red",
        )
        return 1
    name, facts = machine()
    commands = [["-m", "pytest", "-m", "gpu", *rest]] if options.gpu else []
    rest = [] if options.gpu else rest
    commands += [[f"benchmarks/bench_{topic}.py", *rest] for topic in options.names]
    results = [run(command, console) for command in commands]
    topic = "gpu" if options.gpu and options.topic == "all" else options.topic.replace("_", "-")
    report = BENCHMARKS / "results" / f"{facts['Date'][:10]}-{topic}-{name}.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    body = "\n".join(outcome.markdown() for outcome in results)
    report.write_text(f"# Benchmark report: {topic}\n\n{table}\n\n{body}", encoding="utf-8")
    console.print(f"Report: {report.relative_to(ROOT)}")
    return 1 if any(r.status not in (0, NO_TESTS_COLLECTED) for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
