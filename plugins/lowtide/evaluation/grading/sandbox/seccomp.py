"""A filter of system calls for a process that has to compute and nothing else.

Standard library alone: the child loads this file by its path, before it reads what it will run.
The filter needs no privilege and no namespace. It refuses to make processes, threads, sockets,
signals to others, programs, files to write, and what could look into another process; reading
files, memory and pipes that are open stay. Numbers of system calls are those of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

# name -> (x86_64, aarch64); None where the machine has no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    # processes, programs, and what reaches into them
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157), "setpgid": (109, 154), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # files: names, links, modes, times; open itself is looked at below
    "creat": (85, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # memory that no limit of the process counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # ways around this filter, and the machine itself
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "setns": (308, 268),
    "unshare": (272, 97), "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "syslog": (103, 116),
    "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92),
}  # fmt: skip
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)
_CLONE3, _KILL, _TGKILL, _PRLIMIT = (435, 435), (62, 129), (234, 131), (302, 261)
_CLONE = (56, 220)
_NEWEST = 450  # calls from here on are newer than this list: they are said not to exist
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort), ("true", ctypes.c_ubyte), ("false", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def instructions(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """Return the filter as (code, jump if true, jump if false, k).

    Args:
        machine: As `platform.machine` says.
        pid: Of the process that it is for: it may signal itself.
    """
    column, architecture = _MACHINES[machine]
    found = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _NEWEST),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]

    def when(call: tuple[int | None, int | None], body: list[tuple[int, int, int, int]]) -> None:
        number = call[column]
        if number is not None:
            found.append((_IF_EQUAL, 0, len(body), number))
            found.extend(body)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)  # low half, little-endian

    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    for call in (*_REFUSED.values(), _CLONE):
        when(call, [refuse])
    # The C library asks for the older call where this one is missing.
    for call in (_CLONE3, _OPENAT2):
        when(call, [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)])
    for call, index in ((_OPEN, 1), (_OPENAT, 2)):
        when(call, [argument(index), (_IF_BITS, 0, 1, _CHANGING), refuse, allow])
    for call in (_KILL, _TGKILL):
        when(call, [argument(0), (_IF_EQUAL, 1, 0, pid), refuse, allow])
    when(_PRLIMIT, [argument(0), (_IF_EQUAL, 1, 0, 0), refuse, allow])
    found.append(allow)
    return found


def apply() -> str | None:
    """Put the filter on this process for good; return why it cannot be had, or None."""
    machine = platform.machine()
    if machine not in _MACHINES:
        return f"no filter is written for {machine}"
    program = instructions(machine, os.getpid())
    array = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return f"no_new_privs: {os.strerror(ctypes.get_errno())}"
    call = _Program(len(program), array)
    if library.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(call), 0, 0):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return None
