# shellcheck shell=bash
# Sourced by the batch script and by every task: site file, Python, nothing else.

lowtide_die() {
    printf 'lowtide: %s\n' "$*" >&2
    exit 2
}

lowtide_env() {
    local home=$1
    export LOWTIDE_HOME=$home
    export LOWTIDE_TASK=$home/launch/lib/task.sh
    local site=${LOWTIDE_SITE:-$home/launch/site.sh}
    if [ -e "$site" ]; then
        # Modules and environments of other people's making: they use unset variables, and their
        # last command may be a test that is false.
        set +eu
        # shellcheck source=/dev/null
        source "$site"
        set -eu
    elif [ -n "${LOWTIDE_SITE:-}" ]; then
        lowtide_die "LOWTIDE_SITE: $site does not exist on $(uname -n)"
    fi
    if [ -z "${LOWTIDE_PYTHON:-}" ]; then
        LOWTIDE_PYTHON=python3
        [ -x "$home/.venv/bin/python" ] && LOWTIDE_PYTHON=$home/.venv/bin/python
    fi
    command -v "$LOWTIDE_PYTHON" >/dev/null ||
        lowtide_die "no $LOWTIDE_PYTHON on $(uname -n); set LOWTIDE_PYTHON in $site"
    export LOWTIDE_PYTHON
    # ninja and the like lie beside the interpreter.
    PATH=$(dirname "$(command -v "$LOWTIDE_PYTHON")"):$PATH
    export PATH
    # Since 22.05 srun does not take the job's -c over by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

lowtide_launch() {
    "$LOWTIDE_PYTHON" -m lowtide.launch "$@"
}
