"""``python -m lowtide.run train.py ...``: run an unchanged script with Lowtide switched on.

Works under every launcher (``torchrun ... -m lowtide.run train.py``, ``deepspeed --module
lowtide.run train.py``, ``srun python -m lowtide.run train.py``). The script's DeepSpeed JSON
decides what is active; without a ``"lowtide"`` block nothing changes.

Exit codes: the script's own; 2 for a configuration error; 130 after Ctrl-C.
"""

from __future__ import annotations

import itertools
import os
import runpy
import sys
import traceback

from lowtide.core.errors import ConfigError, LowtideError

USAGE = "usage: python -m lowtide.run [-m] SCRIPT_OR_MODULE [ARG ...]"


def main(argv: list[str] | None = None) -> int:
    """Run the script in `argv` (default: the command line) as ``__main__``; return an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher puts its option between the module and the script: hand it on.
    launcher = list(itertools.takewhile(lambda word: word.startswith("--local"), arguments))
    arguments = arguments[len(launcher) :]
    is_module = arguments[:1] == ["-m"]
    if is_module:
        arguments = arguments[1:]
    if not arguments or (arguments[0] in ("-h", "--help") and not is_module):
        sys.stderr.write(f"{USAGE}\n")
        return 0 if arguments else 2
    target = arguments[0]
    if not is_module and not os.path.exists(target):
        sys.stderr.write(f"lowtide.run: script {target} does not exist (in {os.getcwd()})\n")
        return 2
    try:
        if "SLURM_STEP_ID" in os.environ:  # plain srun sets no RANK, which torch needs
            from lowtide.launch.node import slurm_rank_variables

            os.environ.update(slurm_rank_variables())
        from lowtide.hosts.deepspeed import enable

        enable()
        sys.argv = [target, *launcher, *arguments[1:]]
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
            runpy.run_path(target, run_name="__main__")
    except KeyboardInterrupt:
        return 130
    except LowtideError as error:
        _tell_torchrun(error)
        _show(error)
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        _tell_torchrun(error)
        raise
    return 0


def _tell_torchrun(error: Exception) -> None:
    """Hand `error` to torchrun, whose closing summary then shows the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _show(error: LowtideError) -> None:
    if os.environ.get("LOWTIDE_DEBUG") == "1":
        traceback.print_exception(error)
        return
    rank = os.environ.get("RANK", "0")
    # A wrong configuration is the same on every rank: one line, not one per rank.
    if rank == "0" or not isinstance(error, ConfigError):
        where = f" (rank {rank})" if rank != "0" else ""
        sys.stderr.write(f"lowtide{where}: {type(error).__name__}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
