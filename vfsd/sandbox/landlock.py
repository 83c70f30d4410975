"""A second wall around the share, where the kernel has Landlock: it needs no rights and no namespace."""

import os
import stat
from collections.abc import Iterable
from typing import Final

from vfsd.sandbox import _linux

# linux/landlock.h: how many of LANDLOCK_ACCESS_FS_*, from bit 0, each version of the interface has
FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
TRUNCATE: Final = 1 << 14
IOCTL_DEV: Final = 1 << 15
OF_A_FILE: Final = WRITE_FILE | READ_FILE | TRUNCATE
TCP: Final = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP, CONNECT_TCP, since 4
SCOPES: Final = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, SIGNAL, since 6
NET_SINCE: Final = 4
SCOPES_SINCE: Final = 6


def available() -> bool:
    return _linux.landlock_abi() > 0


def enter(beneath: Iterable[int]) -> None:
    """Open, make, remove and rename only beneath these directories or files; no program, no device's ioctl.

    beneath: descriptors. For this thread and those it starts, which must have no new privileges. OSError.
    """
    abi = _linux.landlock_abi()
    if abi <= 0:
        return
    rights = (1 << FILE_RIGHTS[min(abi, max(FILE_RIGHTS))]) - 1
    ruleset = _linux.landlock_ruleset(
        rights, TCP if abi >= NET_SINCE else 0, SCOPES if abi >= SCOPES_SINCE else 0
    )
    try:
        for fd in beneath:
            allowed = rights & ~(EXECUTE | IOCTL_DEV)
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                allowed &= OF_A_FILE
            _linux.landlock_allow(ruleset, fd, allowed)
        _linux.landlock_enter(ruleset)
    finally:
        os.close(ruleset)
