"""``lowtide launch``: plan, check and judge the starts of a job.

``launch/sbatch/train.sbatch`` calls these in turn; people call `plan`, `preflight` and `status`.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.output import print_json
from lowtide.core.errors import LaunchError

if TYPE_CHECKING:
    from lowtide.launch.plan import Plan

app = typer.Typer(
    help="Start jobs on one machine or under Slurm; stop and restart them.", no_args_is_help=True
)

REQUEUE_WAIT_S = 120.0

RunDir = Annotated[
    Path, typer.Option("--run-dir", envvar="LOWTIDE_RUN_DIR", help="The same in every start.")
]
Config = Annotated[
    Path | None, typer.Option("--config", envvar="LOWTIDE_CONFIG", help="DeepSpeed JSON to check.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        envvar="LOWTIDE_CHECKPOINTS",
        help="What save_checkpoint gets. [default: RUN_DIR/checkpoints]",
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc", envvar="LOWTIDE_NPROC", min=1, help="Ranks per node. [default: its GPUs, or 1]"
    ),
]
Mode = Annotated[
    str,
    typer.Option(
        "--mode", envvar="LOWTIDE_MODE", help='"torchrun" per node, or one task per "rank".'
    ),
]
Head = Annotated[
    str | None,
    typer.Option("--head-address", envvar="LOWTIDE_HEAD_ADDRESS", help="Of the first node."),
]
Port = Annotated[
    int | None,
    typer.Option("--port", envvar="LOWTIDE_PORT", min=1024, max=65535, help="On the first node."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Script = Annotated[
    list[str] | None, typer.Argument(metavar="-- SCRIPT [ARG]...", help="What to run.")
]


def _plan(**asked: Any) -> Plan:
    from lowtide.launch.plan import Request, make_plan

    return make_plan(Request(**asked))


@app.command("plan")
def plan(
    run_dir: RunDir,
    config: Config = None,
    checkpoints: Checkpoints = None,
    nproc: Nproc = None,
    mode: Mode = "torchrun",
    head_address: Head = None,
    port: Port = None,
    as_json: AsJson = False,
    as_line: Annotated[
        bool, typer.Option("--line", help="Print one line of JSON for $LOWTIDE_PLAN.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Also print the exact command of every node.")
    ] = False,
    script: Script = None,
) -> None:
    """Show nodes, addresses, port, ids, where the run goes on, the lead time. Changes nothing."""
    made = _plan(
        run_dir=run_dir, config=config, checkpoints=checkpoints, procs_per_node=nproc, mode=mode,
        head_address=head_address, port=port,
    )  # fmt: skip
    if as_line:
        typer.echo(made.to_json())
        return
    commands = _commands(made, script or []) if dry_run else []
    if as_json:
        print_json({**made.as_dict(), **({"commands": commands} if dry_run else {})})
        return
    pairs = zip(made.nodes, made.addresses, strict=True)
    lead = "measured" if made.is_lead_measured else "a guess: nothing was saved yet"
    _print_pairs(
        {
            "start": made.attempt,
            "nodes": ", ".join(f"{node} ({address})" for node, address in pairs),
            "ranks": f"{made.world_size} ({made.procs_per_node} per node, mode {made.mode})",
            "meeting point": f"{made.addresses[0]} port {made.port}",
            "run folder": made.run_dir,
            "goes on from": f"{made.resume_tag}, step {made.resume_step}"
            if made.resume_tag
            else f"the beginning (no complete checkpoint in {made.checkpoints})",
            "warn before end": f"--signal=USR1@{made.lead_s:.0f} ({lead})",
        }
    )
    for line in [*made.skipped, *commands]:
        typer.echo(line)


def _commands(made: Plan, script: list[str]) -> list[str]:
    from lowtide.launch.node import make_start, step_command

    lines = [shlex.join(step_command(made, script))] if made.job_id else []
    for index, node in enumerate(made.nodes):
        place = {"SLURMD_NODENAME": node, "SLURM_NODEID": str(index)}
        place |= {"SLURM_NTASKS": str(made.world_size), "SLURM_LOCALID": "0"}
        start = make_start(made, script, place)
        settings = [f"{name}={shlex.quote(value)}" for name, value in start.environment.items()]
        lines.append(f"{node}: {' '.join(settings)} {shlex.join(start.command)}")
    return lines


def _print_pairs(pairs: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, Text(value))
    Console(soft_wrap=True, highlight=False).print(table)


@app.command("begin", hidden=True)
def begin(
    max_starts: Annotated[int, typer.Option(envvar="LOWTIDE_MAX_STARTS", min=1)] = 3,
) -> None:
    """Note this start; refuse it when the job does not get on (batch script)."""
    from lowtide.launch import attempts
    from lowtide.launch.plan import Plan

    made = Plan.from_environment()
    for line in made.skipped:
        typer.echo(f"lowtide: {line}")
    typer.echo(f"lowtide: {attempts.begin(made, max_starts=max_starts)}")


@app.command("preflight")
def preflight(
    run_dir: RunDir,
    config: Config = None,
    checkpoints: Checkpoints = None,
    nproc: Nproc = None,
    mode: Mode = "torchrun",
    head_address: Head = None,
    port: Port = None,
    limit_s: Annotated[
        float, typer.Option("--limit-s", envvar="LOWTIDE_PREFLIGHT_S", min=10, help="Time for all.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Check every node of this job: it answers, has the same versions, reaches folder and head.

    Exit code 1 with one line per problem.
    """
    import os

    from lowtide.launch import preflight as checks
    from lowtide.launch.plan import PLAN_VARIABLE, Plan

    if PLAN_VARIABLE in os.environ:
        made = Plan.from_environment()
    else:
        made = _plan(
            run_dir=run_dir, config=config, checkpoints=checkpoints, procs_per_node=nproc,
            mode=mode, head_address=head_address, port=port,
        )  # fmt: skip
    found, problems = checks.check(made, limit_s=limit_s)
    if as_json:
        print_json({"ok": not problems, "nodes": found, "problems": problems})
    else:
        for line in problems:
            typer.echo(f"lowtide: preflight: {line}", err=True)
        if not problems:
            versions = " ".join(f"{n} {v}" for n, v in found[0]["packages"].items())
            typer.echo(
                f"lowtide: preflight: {len(found)} node(s) ready; "
                f"Python {found[0]['python'].split()[0]}, {versions}"
            )
    if problems:
        raise typer.Exit(1)


@app.command("probe", hidden=True)
def probe() -> None:
    """Look at this node (started by preflight)."""
    from lowtide.launch.plan import Plan
    from lowtide.launch.preflight import print_probe

    print_probe(Plan.from_environment())


@app.command("step", hidden=True, context_settings={"ignore_unknown_options": True})
def step(script: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Start the script on every node, through srun (batch script); without Slurm here."""
    import os

    from lowtide.launch.node import become, make_start, step_command
    from lowtide.launch.plan import Plan

    made = Plan.from_environment()
    start = make_start(made, script or []) if made.job_id is None else None
    if start is not None:
        become(start)
    command = step_command(made, script or [])
    os.execvp(command[0], command)


@app.command("hostfile")
def hostfile(run_dir: RunDir = Path("."), nproc: Nproc = None, head_address: Head = None) -> None:
    """Print this job's nodes for `deepspeed --hostfile`: one address and its slots per line."""
    made = _plan(run_dir=run_dir, procs_per_node=nproc, head_address=head_address)
    for address in made.addresses:
        typer.echo(f"{address} slots={made.procs_per_node}")


@app.command("node", hidden=True, context_settings={"ignore_unknown_options": True})
def node(script: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Become torchrun for this node, or this task's rank (started by srun)."""
    from lowtide.launch.node import become, make_start
    from lowtide.launch.plan import Plan

    become(make_start(Plan.from_environment(), script or []))


@app.command("resubmit")
def resubmit(
    exit_code: Annotated[int, typer.Option("--exit-code", help="How the job step ended.")] = 0,
    on_failure: Annotated[
        str,
        typer.Option(
            envvar="LOWTIDE_ON_FAILURE", help='"fail", or "requeue" where no stop.json was left.'
        ),
    ] = "fail",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Decide by ``stop.json`` what follows the end of this start, and requeue the job if so.

    The exit code is that of the batch script: 0 after a good end or a requeue.
    """
    from dataclasses import asdict

    from lowtide.launch import slurm
    from lowtide.launch.attempts import decide
    from lowtide.launch.plan import Plan
    from lowtide.launch.preflight import silent_nodes

    if on_failure not in ("fail", "requeue"):
        raise LaunchError(f'LOWTIDE_ON_FAILURE: got {on_failure!r}, allowed: "fail", "requeue"')
    made = Plan.from_environment()
    decision = decide(
        made,
        exit_code,
        requeues_failures=on_failure == "requeue",
        find_silent=lambda: silent_nodes(made),
    )
    if as_json:
        print_json(asdict(decision))
    else:
        typer.echo(f"lowtide: {decision.action}: {decision.reason}")
    if decision.action == "requeue" and made.job_id is not None and not dry_run:
        slurm.requeue(made.job_id)
        # Now Slurm ends the batch script. To leave by ourselves would look like the job's end.
        time.sleep(REQUEUE_WAIT_S)
    raise typer.Exit(decision.exit_code)


@app.command("status")
def status(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    checkpoints: Checkpoints = None,
    as_json: AsJson = False,
) -> None:
    """Show the starts of a run, its last stop, its newest complete checkpoint, its last step."""
    from lowtide.launch.status import run_status

    found = run_status(run_dir, checkpoints=checkpoints)
    if as_json:
        print_json(found)
        return
    stop, starts = found["stop"], found["attempts"]
    age_s = found["last_step_age_s"]
    _print_pairs(
        {
            "run": found["run_dir"],
            "job": f"{found['job']} {found['job_state'] or '(Slurm does not know it any more)'}"
            if found["job"]
            else "not under Slurm",
            "starts": f"{len(starts)}"
            + "".join(f"; {s['attempt']} from step {s['resume_step']}" for s in starts[-3:]),
            "last step": "none recorded"
            if found["last_step"] is None
            else f"{found['last_step']}, {age_s:.0f} s ago",
            "checkpoint": f"{found['checkpoint'] or 'none that is complete'}",
            "last stop": f"{stop['reason']} at step {stop['step']}" if stop else "none recorded",
        }
    )
    for line in found["skipped_checkpoints"]:
        typer.echo(line)
