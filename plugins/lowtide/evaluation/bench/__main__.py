"""``python -m lowtide.evaluation.bench plan.json --rows rows.jsonl``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowtide.core.errors import LowtideError
from lowtide.evaluation.bench.plan import read_plan
from lowtide.evaluation.bench.report import show, write_csv
from lowtide.evaluation.bench.study import Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a plan, going on where it was left, and print what it says."""
    parser = argparse.ArgumentParser(prog="lowtide.evaluation.bench", description=main.__doc__)
    parser.add_argument("plan", type=Path, help="JSON file")
    parser.add_argument("--rows", type=Path, help="JSONL file (the plan's name with .rows.jsonl)")
    parser.add_argument("--csv", type=Path, help="also write means to this file")
    parser.add_argument("--fixtures", type=Path, help="folder of trained models")
    options = parser.parse_args(arguments)
    progress = Console(stderr=True)
    try:
        study = Study(
            read_plan(options.plan),
            options.rows or options.plan.with_suffix(".rows.jsonl"),
            fixtures=options.fixtures,
            say=lambda line: progress.print(line, highlight=False, markup=False),
        )
        rows = study.run()
        show(rows, Console())
        if options.csv:
            write_csv(rows, options.csv)
    except LowtideError as error:
        progress.print(str(error), style="red", highlight=False, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
