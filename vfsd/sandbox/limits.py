"""What is left of a process's means when it enters its sandbox."""

import fcntl
import os
import resource
from collections.abc import Collection

from vfsd.sandbox import _linux


def plug(keep: Collection[int], own_descriptors: int, null: int) -> None:
    """Make /dev/null of every descriptor but those.

    Their numbers stay taken: objects that still have one may close it at any time.
    own_descriptors: of this process's /proc/self/fd.
    """
    for fd in held(own_descriptors):
        if fd not in keep and fd != null:
            os.dup2(null, fd, inheritable=False)


def held(own_descriptors: int) -> set[int]:
    """The descriptors of this process, of whose /proc/self/fd that is one."""
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=own_descriptors)
    try:
        found = [int(name) for name in os.listdir(listing)]
    finally:
        os.close(listing)
    return set(filter(is_open, found))  # but those that the listing took


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def restrict() -> None:
    """No core dump and no other process shows what the guest has in memory. OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _linux.make_undumpable()
