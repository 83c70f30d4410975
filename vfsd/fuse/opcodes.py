"""The table of FUSE operations: number, name, where each one lives and whether it may block.

An operation has exactly one home. `HOT` ones are Cython functions that never take the GIL; the
others are the Python function of the operation's name, in lower case, in the module named.
An opcode that is not in the table is answered with ENOSYS.
"""

from enum import Enum, IntEnum
from typing import NamedTuple

OPCODES_MAX = 64  # dispatch tables have this many slots; larger opcodes are ENOSYS


class Opcode(IntEnum):
    """Every opcode a virtio-fs guest can send, served here or not."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Home(Enum):
    HOT = "hot"
    PYTHON = "python"


class Op(NamedTuple):
    opcode: Opcode
    home: Home
    module: str  # below vfsd
    blocks: bool = False  # waits for a disk, or for other requests: never tried
    modifies: bool = False  # changes the share whatever its arguments: EROFS with --readonly
    streams: bool = False  # one caller may have several under way: asynchronous I/O, read ahead, write back

    @property
    def name(self) -> str:
        return self.opcode.name


# Not here on purpose, because Linux then does by itself what a local file system would:
# BMAP: never sent on virtio-fs, which has no block device; after one ENOSYS bmap(2) is without effect.
# POLL: after one ENOSYS every file is always ready (fc->no_poll), and no further message is sent.
# Where such a request has no room for a reply, its chain is given back without one.
# NOTIFY_REPLY: answers a FUSE_NOTIFY_RETRIEVE, and this daemon notifies of nothing.
OPERATIONS = (
    Op(Opcode.LOOKUP, Home.HOT, "hostfs.ops.names"),
    Op(Opcode.FORGET, Home.HOT, "hostfs.ops.names"),
    Op(Opcode.GETATTR, Home.HOT, "hostfs.ops.attributes"),
    Op(Opcode.SETATTR, Home.HOT, "hostfs.ops.attributes", modifies=True),
    Op(Opcode.READLINK, Home.HOT, "hostfs.ops.names"),
    Op(Opcode.SYMLINK, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.MKNOD, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.MKDIR, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.UNLINK, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.RMDIR, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.RENAME, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.LINK, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.OPEN, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.READ, Home.HOT, "hostfs.ops.data", streams=True),
    Op(Opcode.WRITE, Home.HOT, "hostfs.ops.data", modifies=True, streams=True),
    Op(Opcode.STATFS, Home.HOT, "hostfs.ops.attributes"),
    Op(Opcode.RELEASE, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.FSYNC, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.SETXATTR, Home.HOT, "hostfs.ops.xattrs", modifies=True),
    Op(Opcode.GETXATTR, Home.HOT, "hostfs.ops.xattrs"),
    Op(Opcode.LISTXATTR, Home.HOT, "hostfs.ops.xattrs"),
    Op(Opcode.REMOVEXATTR, Home.HOT, "hostfs.ops.xattrs", modifies=True),
    Op(Opcode.FLUSH, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.INIT, Home.PYTHON, "fuse.init", blocks=True),
    Op(Opcode.OPENDIR, Home.HOT, "hostfs.ops.directories"),
    Op(Opcode.READDIR, Home.HOT, "hostfs.ops.directories"),
    Op(Opcode.RELEASEDIR, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.FSYNCDIR, Home.HOT, "hostfs.ops.data"),
    Op(Opcode.GETLK, Home.HOT, "hostfs.ops.locks"),
    Op(Opcode.SETLK, Home.HOT, "hostfs.ops.locks"),
    Op(Opcode.SETLKW, Home.HOT, "hostfs.ops.locks"),
    Op(Opcode.INTERRUPT, Home.HOT, "hostfs.ops.locks"),
    Op(Opcode.ACCESS, Home.HOT, "hostfs.ops.attributes"),
    Op(Opcode.CREATE, Home.HOT, "hostfs.ops.data", modifies=True),
    Op(Opcode.DESTROY, Home.PYTHON, "fuse.init", blocks=True),
    Op(Opcode.IOCTL, Home.HOT, "hostfs.ops.ioctls"),
    Op(Opcode.BATCH_FORGET, Home.HOT, "hostfs.ops.names"),
    Op(Opcode.FALLOCATE, Home.HOT, "hostfs.ops.data", blocks=True, modifies=True),
    Op(Opcode.READDIRPLUS, Home.HOT, "hostfs.ops.directories"),
    Op(Opcode.RENAME2, Home.HOT, "hostfs.ops.names", modifies=True),
    Op(Opcode.SETUPMAPPING, Home.PYTHON, "hostfs.ops.mappings", blocks=True),
    Op(Opcode.REMOVEMAPPING, Home.PYTHON, "hostfs.ops.mappings", blocks=True),
    Op(Opcode.LSEEK, Home.HOT, "hostfs.ops.holes"),
    Op(Opcode.COPY_FILE_RANGE, Home.HOT, "hostfs.ops.data", blocks=True, modifies=True),
    Op(Opcode.SYNCFS, Home.HOT, "hostfs.ops.data", blocks=True),
    Op(Opcode.TMPFILE, Home.HOT, "hostfs.ops.data", modifies=True),
    Op(Opcode.STATX, Home.HOT, "hostfs.ops.attributes"),
    Op(Opcode.COPY_FILE_RANGE_64, Home.HOT, "hostfs.ops.data", blocks=True, modifies=True),
)

NUMBER = {opcode.name: opcode.value for opcode in Opcode}
NAME = {opcode.value: opcode.name for opcode in Opcode}
