"""System calls of a FUSE mount made without fusermount: mount(2) of type fuse, umount2(2), abort.

Sources: fs/fuse/inode.c (fuse_parse_param: the options), fs/fuse/control.c (the abort file),
fs/namespace.c.
"""

import contextlib
import fcntl
import os
import re
import stat
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from typing import NamedTuple

from vfsd.errors import ConfigError
from vfsd.guest.bridge import _mount

DEVICE = "/dev/fuse"
FUSE_DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)
FSTYPE = "fuse.virtiofs"  # what follows the dot is shown as the type, nothing more

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 16, 128, 1024, 2048
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

# Of mount(8)'s options, those the kernel keeps to itself: (flag, whether the option sets it).
OPTIONS = {
    "defaults": (0, True),
    "allow_other": (0, True),  # these two are so anyway
    "default_permissions": (0, True),
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "sync": (MS_SYNCHRONOUS, True),
    "async": (MS_SYNCHRONOUS, False),
    "dirsync": (MS_DIRSYNC, True),
    "noatime": (MS_NOATIME, True),
    "atime": (MS_NOATIME, False),
    "nodiratime": (MS_NODIRATIME, True),
    "diratime": (MS_NODIRATIME, False),
    "relatime": (MS_RELATIME, True),
    "strictatime": (MS_STRICTATIME, True),
    "lazytime": (MS_LAZYTIME, True),
}


def mount_flags(options: str) -> int:
    """Flags of mount(2) for options of mount(8), separated by commas. ConfigError names a stranger."""
    flags = 0
    for option in filter(None, options.split(",")):
        if option not in OPTIONS:
            known = ", ".join(sorted(OPTIONS))
            raise ConfigError("-o", f"option {option} is not known; there are {known}")
        flag, sets = OPTIONS[option]
        flags = flags | flag if sets else flags & ~flag
    return flags


def open_device() -> int:
    """/dev/fuse. ConfigError: there is none, or none for us."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as problem:
        raise ConfigError(
            DEVICE, f"can't be opened ({problem.strerror}); load the module fuse, and be root"
        ) from problem


def clone_device(fd: int) -> int:
    """Another descriptor of the same connection, with a list of requests of its own."""
    clone = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(clone, FUSE_DEV_IOC_CLONE, fd.to_bytes(4, "little"))
    except BaseException:
        os.close(clone)
        raise
    return clone


@dataclass(frozen=True)
class Mounted:
    """A mounted FUSE file system.

    number: its st_dev in the kernel's form (the major is 0), as /proc/self/mountinfo and the control
    directory name it. Free for another one as soon as this one is unmounted everywhere.
    ident: of the mount that was made.
    """

    number: int
    ident: int

    def points(self, alive: bool) -> list[str]:
        """Where it is mounted now, the newest first: an operator may move, bind and unmount it.

        alive: that it still exists is certain; if not, the mount that was made must be found."""
        found = [entry.point for entry in mount_table() if entry.number == self.number]
        if alive or any(self._is_on_top(point) for point in found):
            return found
        return []

    def _is_on_top(self, point: str) -> bool:
        try:
            return _mount.mount_id(os.fsencode(point)) == self.ident
        except OSError:
            return False


class Entry(NamedTuple):
    """A line of the mount table; number as in Mounted."""

    number: int
    point: str
    fstype: str


def mount_table() -> list[Entry]:
    """Every mount that has no block device, the newest first."""
    table = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        device, _, point = left.split(b" ")[2:5]
        major, minor = device.split(b":")
        if major == b"0":
            plain = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), point)
            table.append(Entry(int(minor), os.fsdecode(plain), right.split(b" ")[0].decode()))
    return table[::-1]


def mount(fd: int, directory: str, source: str, flags: int) -> Mounted:
    """mount(2), with what virtio_fs_fill_super sets: everybody may use it, by the mode bits. OSError.

    The root is taken for what it covers, a directory or a regular file; the kernel answers EIO when
    the share is the other.
    """
    place = os.path.realpath(directory)  # once it is mounted, to look there takes an answer
    try:
        root = stat.S_IFMT(os.stat(place).st_mode)
        data = f"fd={fd},rootmode={root:o},user_id=0,group_id=0,allow_other,default_permissions"
        _mount.mount(os.fsencode(source), os.fsencode(place), FSTYPE.encode(), flags, data.encode())
    except OSError as problem:
        raise named(problem, directory) from None
    for entry in mount_table():
        if entry.point == place and entry.fstype == FSTYPE:
            return Mounted(entry.number, _mount.mount_id(os.fsencode(place)))
    unmount(place, MNT_DETACH)
    raise OSError(ENOENT, "is mounted but not to be found in the mount table", directory)


def unmount(directory: str, flags: int = 0) -> None:
    """umount2(2). OSError."""
    try:
        _mount.umount2(os.fsencode(directory), flags | UMOUNT_NOFOLLOW)
    except OSError as problem:
        raise named(problem, directory) from None


def sync(directory: str) -> None:
    """syncfs(2): write back what is only in the page cache. OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _mount.syncfs(fd)
    finally:
        os.close(fd)


def named(problem: OSError, path: str) -> OSError:
    """The same error, of this path."""
    return OSError(problem.errno, problem.strerror, path)


def abort(mounted: Mounted) -> None:
    """End the connection (fuse_abort_conn): everything that waits for it fails with ECONNABORTED,
    what comes later with ENOTCONN. Waits for nothing. OSError.

    By the control file system, mounted nowhere for the purpose, which also finds what has been
    unmounted lazily.
    """
    control = _mount.open_control()
    try:
        with contextlib.suppress(FileNotFoundError):  # the connection has ended
            handle = os.open(f"{mounted.number}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
            try:
                os.write(handle, b"1")
            finally:
                os.close(handle)
    finally:
        os.close(control)

