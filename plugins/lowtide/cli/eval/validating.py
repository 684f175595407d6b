"""``lowtide eval validate``: are these items what they should be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.output import plain, print_json

if TYPE_CHECKING:
    from lowtide.evaluation.tasks.mcq_checks import Finding


def validate(
    files: Annotated[list[Path], typer.Argument(help="JSONL files of items.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every row, and sets of multiple-choice items for what gives answers away.

    Exit code 1 if a row is not right or a set has a finding.
    """
    from lowtide.evaluation.tasks.reading import check_file

    found: list[dict[str, Any]] = []
    for path in files:
        items, problems = check_file(path)
        findings = _findings(items)
        schemas = sorted({item.SCHEMA for item in items})
        found.append(
            {
                "file": str(path), "items": len(items), "schemas": schemas,
                "problems": [
                    {"line": each.line, "field": each.field, "reason": each.reason}
                    for each in problems
                ],
                "findings": [
                    {"kind": each.kind, "items": list(each.items), "message": each.message,
                     "value": each.value}
                    for each in findings
                ],
            }
        )  # fmt: skip
        if not as_json:
            for problem in problems:
                typer.echo(plain(str(problem)))
            for finding in findings:
                ids = f" ({', '.join(finding.items)})" if finding.items else ""
                typer.echo(plain(f"{path}: {finding.kind}: {finding.message}{ids}"))
            typer.echo(f"{path}: {len(items)} items of {', '.join(schemas) or 'no schema'}")
    if as_json:
        print_json({"files": found})
    if any(each["problems"] or each["findings"] for each in found):
        raise typer.Exit(1)


def _findings(items: list[Any]) -> list[Finding]:
    from lowtide.evaluation.tasks.mcq import McqItem
    from lowtide.evaluation.tasks.mcq_checks import check_set

    questions = [item for item in items if isinstance(item, McqItem)]
    return check_set(questions) if questions else []
