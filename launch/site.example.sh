# shellcheck shell=bash disable=SC2034
# What is special about your cluster. Copy to launch/site.sh (git ignores it) and edit; nothing else
# needs editing. It is sourced by the batch script and again on every node of the job. LOWTIDE_SITE
# names another file.

# --- the Python of the job
# module load cuda/12.8 python/3.11
# export LOWTIDE_PYTHON=/shared/venvs/lowtide/bin/python     # default: .venv here, else python3

# --- the network, only where the default is wrong
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export LOWTIDE_HEAD_ADDRESS=10.0.0.1                       # default: asked of Slurm
# export LOWTIDE_PORT=29500                                  # default: made from the job id

# --- how a job runs
# export LOWTIDE_NPROC=8                                     # ranks per node; default: its GPUs
# export LOWTIDE_MODE=rank                                   # one Slurm task per rank, no torchrun
# export LOWTIDE_CONFIG=ds.json                              # checked on every node before the start
# export LOWTIDE_CHECKPOINTS=/pfs/mine/checkpoints           # default: $LOWTIDE_RUN_DIR/checkpoints
# export LOWTIDE_MAX_STARTS=3                                # starts from one step before giving up
# export LOWTIDE_ON_FAILURE=requeue                          # default: fail. A crash is tried again too
# export LOWTIDE_PREFLIGHT_S=120                             # default: 60, time for all nodes to answer
# export LOWTIDE_PREFLIGHT=0                                 # default: 1, check the nodes first

# --- what sbatch reads itself; set these in the shell in which you submit
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=myproject
