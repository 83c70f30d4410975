"""Which files a guest maps into its DAX window: what the operator chose, and what its front end can map."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import PAGESIZE
from typing import Final, NamedTuple

from vfsd.fuse import abi
from vfsd.hostfs.ops.mappings import Mappings


class DaxPolicy(NamedTuple):
    """Which regular files have FUSE_ATTR_DAX: a guest that leaves it to the daemon (mount option
    dax=inode, or none) maps these.

    size_min: bytes, those at least that large; None: no file by its size. whole: of those, only what
    fills ranges of 2 MiB to the end. writable: of those, only what the daemon may write to.
    marked: those whose inode has FS_XFLAG_DAX (`chattr +x`).
    mappable: in place of all that, what INIT finds the front end able to map.
    """

    size_min: int | None = None
    whole: bool = False
    writable: bool = False
    marked: bool = False
    mappable: bool = False


AUTO: Final = DaxPolicy(mappable=True)
ALWAYS: Final = DaxPolicy(size_min=0)
NEVER: Final = DaxPolicy()
WHOLE: Final = DaxPolicy(size_min=abi.DAX_RANGE, whole=True)
WHOLE_WRITABLE: Final = WHOLE._replace(writable=True)

DAX_POLICIES: Final = {
    "auto": AUTO,
    "always": ALWAYS,
    "never": NEVER,
    "inode": DaxPolicy(marked=True),
    "whole": WHOLE,
}

# A file's size and whether it is mapped for writing; which files can be mapped where the front end takes a
# range of it, the most first. QEMU up to at least 11.1.3 takes only the last: what it maps is memory to it.
TRIALS: Final = (
    (PAGESIZE, False, ALWAYS),
    (abi.DAX_RANGE, False, WHOLE),
    (abi.DAX_RANGE, True, WHOLE_WRITABLE),
)

FILES: Final = {
    ALWAYS: "every file",
    WHOLE: "files of whole 2 MiB",
    WHOLE_WRITABLE: "files of whole 2 MiB that may be written",
    NEVER: "no file",
}


def find_mappable(mappings: Mappings, proc_fd: int) -> DaxPolicy:
    """What the front end can map, by trial; nothing else may be mapped meanwhile.

    proc_fd: of /proc/self/fd. OSError: it can't be known now.
    """
    for size, writable, policy in TRIALS:
        with trial_file(size, writable, proc_fd) as fd:
            if mappings.can_map(fd, writable):
                return policy
    return NEVER


@contextmanager
def trial_file(size: int, writable: bool, proc_fd: int) -> Iterator[int]:
    """Not empty, which QEMU would make longer. OSError."""
    fd = os.memfd_create("vfsd-dax", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        if not writable:
            whole_rights = fd
            fd = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
            os.close(whole_rights)
        yield fd
    finally:
        os.close(fd)
