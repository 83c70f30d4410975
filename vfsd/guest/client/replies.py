"""What replies say of a file, and until when it may be believed (struct fuse_attr, struct fuse_entry_out)."""

import stat
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.guest.client.connection import Connection

SIZE_MAX = 2**63 - 1
NEVER = float("-inf")  # a deadline that has passed

STATX_ATIME, STATX_MTIME, STATX_CTIME, STATX_SIZE, STATX_BLOCKS = 0x20, 0x40, 0x80, 0x200, 0x400
STATX_MODE, STATX_NLINK, STATX_UID, STATX_GID = 0x2, 0x4, 0x8, 0x10
STATX_MODIFY = STATX_MTIME | STATX_CTIME | STATX_BLOCKS
STATX_MODSIZE = STATX_MODIFY | STATX_SIZE


class Attr(NamedTuple):
    """struct fuse_attr"""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def mtime_ns(self) -> int:
        return self.mtime * 10**9 + self.mtimensec

    @property
    def valid(self) -> bool:
        """fuse_invalid_attr"""
        return stat.S_IFMT(self.mode) in FILE_TYPES and self.size <= SIZE_MAX


FILE_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO,
              stat.S_IFSOCK}  # fmt: skip


class Entry(NamedTuple):
    """struct fuse_entry_out, with deadlines for its timeouts. asked: the attribute version before."""

    nodeid: int
    generation: int
    entry_deadline: float
    attr_deadline: float
    attr: Attr
    asked: int

    @classmethod
    def parse(cls, conn: Connection, out: bytes, asked: int, at: int = 0) -> "Entry":
        nodeid, generation, entry_s, attr_s, entry_ns, attr_ns = abi.ENTRY_OUT.unpack_from(out, at)
        attr = Attr._make(abi.ATTR.unpack_from(out, at + abi.ENTRY_OUT.size))
        if nodeid == abi.ROOT_ID and generation != 0:
            generation = 0
        return cls(nodeid, generation, conn.deadline(entry_s, entry_ns), conn.deadline(attr_s, attr_ns),
                   attr, asked)  # fmt: skip

    @property
    def submount(self) -> bool:
        return bool(self.attr.flags & abi.ATTR_SUBMOUNT) and stat.S_ISDIR(self.attr.mode)
