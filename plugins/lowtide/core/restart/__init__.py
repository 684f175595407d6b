"""Stop on request, all ranks at one step; find where to go on.

*Stop.* A signal (time limit, preemption, Ctrl-C) sets a flag and nothing more. Once per optimizer
step the flag is max-reduced over all ranks, so one signal on one rank stops every rank after the
same step. The newest state is saved, and then, last of all, rank 0 writes ``stop.json`` into the
run folder: whoever started the job decides by that file whether to start it again, never by an
exit code, which launchers replace by their own.

*Go on.* Beside every checkpoint that a host with a session writes stands a record, written after
all ranks have written their parts. `choose` returns the newest checkpoint whose record and files
agree. DeepSpeed's own ``latest`` is written by rank 0 when its own part is on disk; after a kill
it may name a checkpoint that other ranks never finished.
"""

from lowtide.core.restart.records import (
    RECORD_FILE,
    STOP_FILE,
    TRASH,
    Choice,
    FindDamage,
    StopRecord,
    choose,
    find_damage,
    find_missing_parts,
    find_zip_damage,
    forget_record,
    has_right_checksum,
    json_checksum,
    read_record,
    read_stop,
    replace_synced,
    sync_folder,
    write_durable,
    write_record,
    write_stop,
)
from lowtide.core.restart.stop import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, StopControl

__all__ = [
    "ATTEMPT_VARIABLE",
    "RECORD_FILE",
    "RUN_DIR_VARIABLE",
    "STOP_FILE",
    "TRASH",
    "Choice",
    "FindDamage",
    "StopControl",
    "StopRecord",
    "choose",
    "find_damage",
    "find_missing_parts",
    "find_zip_damage",
    "forget_record",
    "has_right_checksum",
    "json_checksum",
    "read_record",
    "read_stop",
    "replace_synced",
    "sync_folder",
    "write_durable",
    "write_record",
    "write_stop",
]
