"""The file systems that a server sees: its share and nothing else."""

import os
from contextlib import suppress
from typing import Final

from vfsd.sandbox import _linux

# linux/mount.h
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
RESTRICTED: Final = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV

AT_FDCWD: Final = -100
OWN_DESCRIPTORS: Final = b"/proc/self/fd"
PROC: Final = b"/proc"


def hide_proc() -> bool:
    """Cover /proc by one of this process namespace, with processes alone. False: it may not be.

    In a mount namespace of its own.
    """
    # A container that hides parts of its /proc is not allowed a new one.
    with suppress(OSError):
        proc = processes_alone()
        try:
            _linux.move_mount(proc, b"/proc")
        finally:
            os.close(proc)
        return True
    return False


def processes_alone() -> int:
    """A descriptor of a procfs of this process namespace, without /proc/sys and the like. OSError."""
    return _linux.new_mount(b"proc", {b"subset": b"pid"})


def apart(path: bytes) -> int:
    """A descriptor of a directory. OSError.

    In a mount of its own, where that may be: from there no way leads to what is above.
    """
    try:
        return _linux.clone_tree(AT_FDCWD, path, recursive=False)
    except PermissionError:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def enter_directory() -> None:
    """Make the working directory the root, with what is mounted below it. OSError.

    In a mount namespace made while it was the working directory: so no path is looked up that somebody could
    change meanwhile.
    """
    pivot(_linux.clone_tree(AT_FDCWD, b"", recursive=True))


def enter_nothing() -> None:
    """Have an empty directory for a root. OSError."""
    os.chdir("/")
    pivot(_linux.new_mount(b"tmpfs", {b"mode": b"0", b"nr_inodes": b"1"}))


def pivot(tree: int) -> None:
    """pivot_root(2), ".", ".": the old root lies on top of the new one and is taken off."""
    try:
        _linux.restrict_mounts(tree, RESTRICTED)
        _linux.move_mount(tree, b".")
        os.fchdir(tree)
    finally:
        os.close(tree)
    _linux.pivot_here()
    _linux.detach_here()
    os.chdir("/")
