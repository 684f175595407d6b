"""Takes from the process that calls it what code under test has no use for; cannot be undone.

Standard library alone: the child loads this file by its path. Each layer says by itself whether
it is there: limits, capabilities, namespaces, Landlock; the filter of system calls comes last.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import sysconfig
from typing import Any

_NEW_IPC, _NEW_USER, _NEW_NET = 0x08000000, 0x10000000, 0x40000000
_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38
_CAPABILITIES_V3 = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_READ = (1 << 2) | (1 << 3)  # files, folders
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15}  # interface version -> how many rights it knows
_READABLE = (
    "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/sys/devices/system/cpu",
)  # fmt: skip


def apply(limits: dict[str, Any], seccomp: Any) -> list[str]:
    """Lock this process down; return the layers that hold.

    Args:
        limits: ``cpu_s``, ``memory_bytes``.
        seccomp: The module beside this one.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of this user may read or write our memory
    layers = []
    _limit(limits)
    layers.append("limits")
    if _leave_namespaces(library):
        layers.append("namespaces")
    library.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if _drop_capabilities(library):
        layers.append("capabilities")
    if _read_only_python(library):
        layers.append("landlock")
    if seccomp.apply() is None:
        layers.append("seccomp")
    return layers


def _limit(limits: dict[str, Any]) -> None:
    cpu_s = int(limits["cpu_s"])
    for name, soft, hard in (
        ("RLIMIT_CPU", cpu_s, cpu_s + 1),  # the first can be caught, the second not
        ("RLIMIT_AS", limits["memory_bytes"], limits["memory_bytes"]),
        ("RLIMIT_FSIZE", 0, 0),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_NOFILE", 64, 64),
        ("RLIMIT_NPROC", 0, 0),  # does not hold for root
        ("RLIMIT_MEMLOCK", 0, 0),
        ("RLIMIT_MSGQUEUE", 0, 0),
    ):
        number = getattr(resource, name)
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(number, (soft, hard))


def _leave_namespaces(library: ctypes.CDLL) -> bool:
    """Go where there is no network device; as somebody else than root this takes a user's own."""
    flags = _NEW_NET | _NEW_IPC
    return not (library.unshare(flags) and library.unshare(flags | _NEW_USER))


def _drop_capabilities(library: ctypes.CDLL) -> bool:
    number = _CAPSET.get(os.uname().machine)
    if number is None:
        return False
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    return not library.syscall(number, header, bytes(24))


def _read_only_python(library: ctypes.CDLL) -> bool:
    """Let files be read where Python and its packages are, and nowhere else."""
    version = library.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << _LANDLOCK_RIGHTS.get(version, 15)) - 1
    ruleset = library.syscall(_LANDLOCK_CREATE, struct.pack("=Q", rights), 8, 0)
    if ruleset < 0:
        return False
    own = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()]
    for path in {os.path.realpath(each) for each in (*own, *_READABLE)} - {"/"}:
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _LANDLOCK_READ if os.path.isdir(path) else 1 << 2
        rule = struct.pack("=Qi", allowed, place)
        library.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(place)
    return not library.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
