"""The table of FUSE operations: number, name, where each one lives and whether it may block.

An operation has exactly one home. `HOT` ones are Cython functions that never take the GIL; the
others are the Python function of the operation's name, in lower case, in the module named.
An opcode that is not in the table is answered with ENOSYS.
"""

from enum import Enum
from typing import NamedTuple

OPCODES_MAX = 64  # dispatch tables have this many slots; larger opcodes are ENOSYS


class Home(Enum):
    HOT = "hot"
    PYTHON = "python"


class Op(NamedTuple):
    number: int
    name: str
    home: Home
    module: str  # below vfsd
    blocks: bool = False  # may wait for a disk: always handed to the pool


OPERATIONS = (
    Op(1, "LOOKUP", Home.HOT, "hostfs.names"),
    Op(2, "FORGET", Home.HOT, "hostfs.names"),
    Op(3, "GETATTR", Home.HOT, "hostfs.attributes"),
    Op(4, "SETATTR", Home.HOT, "hostfs.attributes"),
    Op(5, "READLINK", Home.HOT, "hostfs.names"),
    Op(6, "SYMLINK", Home.HOT, "hostfs.names"),
    Op(8, "MKNOD", Home.HOT, "hostfs.names"),
    Op(9, "MKDIR", Home.HOT, "hostfs.names"),
    Op(10, "UNLINK", Home.HOT, "hostfs.names"),
    Op(11, "RMDIR", Home.HOT, "hostfs.names"),
    Op(12, "RENAME", Home.HOT, "hostfs.names"),
    Op(13, "LINK", Home.HOT, "hostfs.names"),
    Op(14, "OPEN", Home.HOT, "hostfs.data"),
    Op(15, "READ", Home.HOT, "hostfs.data"),
    Op(16, "WRITE", Home.HOT, "hostfs.data"),
    Op(17, "STATFS", Home.HOT, "hostfs.attributes"),
    Op(18, "RELEASE", Home.HOT, "hostfs.data"),
    Op(20, "FSYNC", Home.HOT, "hostfs.data", blocks=True),
    Op(21, "SETXATTR", Home.HOT, "hostfs.xattrs"),
    Op(22, "GETXATTR", Home.HOT, "hostfs.xattrs"),
    Op(23, "LISTXATTR", Home.HOT, "hostfs.xattrs"),
    Op(24, "REMOVEXATTR", Home.HOT, "hostfs.xattrs"),
    Op(25, "FLUSH", Home.HOT, "hostfs.data"),
    Op(26, "INIT", Home.PYTHON, "fuse.init"),
    Op(27, "OPENDIR", Home.HOT, "hostfs.directories"),
    Op(28, "READDIR", Home.HOT, "hostfs.directories"),
    Op(29, "RELEASEDIR", Home.HOT, "hostfs.data"),
    Op(30, "FSYNCDIR", Home.HOT, "hostfs.data", blocks=True),
    Op(35, "CREATE", Home.HOT, "hostfs.data"),
    Op(38, "DESTROY", Home.PYTHON, "fuse.init"),
    Op(42, "BATCH_FORGET", Home.HOT, "hostfs.names"),
    Op(43, "FALLOCATE", Home.HOT, "hostfs.data", blocks=True),
    Op(44, "READDIRPLUS", Home.HOT, "hostfs.directories"),
    Op(45, "RENAME2", Home.HOT, "hostfs.names"),
    Op(46, "LSEEK", Home.HOT, "hostfs.data"),
)

NUMBER = {op.name: op.number for op in OPERATIONS}
NAME = {op.number: op.name for op in OPERATIONS}
