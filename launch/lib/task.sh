#!/usr/bin/env bash
# What srun starts on a node: its environment, then `lowtide launch node|probe`.
set -euo pipefail
trap '' USR1 # the warning before the time limit is for the workers; ignored is inherited
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib/env.sh
source "$here/env.sh"
lowtide_env "${here%/launch/lib}"
exec "$LOWTIDE_PYTHON" -m lowtide.launch "$@"
