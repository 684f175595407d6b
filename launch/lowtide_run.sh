#!/usr/bin/env bash
# Run a training script on this machine or, inside a Slurm job, on all of its nodes.
#
#   LOWTIDE_RUN_DIR=runs/mine launch/lowtide_run.sh [--dry-run] train.py ARG...
#   LOWTIDE_RUN_DIR=runs/mine launch/lowtide_run.sh -m lowtide.run train.py ARG...
#
# Settings come from the environment; launch/site.example.sh lists them. Exit code: 0 after a good
# end and after a requeue, 1 when a node is not ready, 2 for wrong settings, else the script's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib/env.sh
source "$here/lib/env.sh"
lowtide_env "${here%/launch}"

is_dry=0
if [ "${1:-}" = --dry-run ]; then
    is_dry=1
    shift
fi
[ $# -gt 0 ] || lowtide_die "no script given: launch/lowtide_run.sh [--dry-run] SCRIPT [ARG...]"
[ -n "${LOWTIDE_RUN_DIR:-}" ] ||
    lowtide_die "LOWTIDE_RUN_DIR is not set; name the run's folder, the same in every start"
if [ "$is_dry" = 1 ]; then
    lowtide_launch plan --dry-run -- "$@"
    exit
fi

# Before the script's own work: whoever gets the warning early must not die of it.
trap '' USR1
LOWTIDE_PLAN=$(lowtide_launch plan --line)
export LOWTIDE_PLAN
lowtide_launch begin

if [ -z "${SLURM_JOB_ID:-}" ]; then
    [ "${LOWTIDE_PREFLIGHT:-1}" = 0 ] || lowtide_launch preflight
    status=0
    lowtide_launch step -- "$@" || status=$?
    lowtide_launch resubmit --exit-code "$status"
    exit
fi

# From here on the shell must outlive a TERM that is meant for the workers: what follows their end
# is decided at the very end. Ctrl-C (in salloc) ends the step, which ignores it in the background.
step=
trap : TERM
trap '[ -z "$step" ] || kill -TERM "$step"' INT
status=0
[ "${LOWTIDE_PREFLIGHT:-1}" = 0 ] || lowtide_launch preflight || status=$?
if [ "$status" = 0 ]; then
    lowtide_launch step -- "$@" &
    step=$!
    while true; do
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
fi
lowtide_launch resubmit --exit-code "$status"
