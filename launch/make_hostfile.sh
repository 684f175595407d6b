#!/usr/bin/env bash
# Inside a Slurm job: print the nodes for DeepSpeed's own launcher.
#
#   launch/make_hostfile.sh > hostfile
#   deepspeed --hostfile hostfile --launcher slurm --no_ssh_check \
#       --master_addr "$(awk 'NR == 1 {print $1}' hostfile)" train.py ...
#
# Without --master_addr DeepSpeed asks the first node by ssh, which many clusters forbid.
# Ranks per node: LOWTIDE_NPROC, else the node's GPUs, else 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib/env.sh
source "$here/lib/env.sh"
lowtide_env "${here%/launch}"
[ -n "${SLURM_JOB_ID:-}" ] || lowtide_die "not inside a Slurm job: use salloc or sbatch"
lowtide_launch hostfile
