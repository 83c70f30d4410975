"""The table of FUSE operations: number, name and where each one lives.

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


OPERATIONS = (
    Op(1, "LOOKUP", Home.HOT, "hostfs.hot_names"),
    Op(2, "FORGET", Home.HOT, "hostfs.hot_names"),
    Op(3, "GETATTR", Home.HOT, "hostfs.hot_names"),
    Op(4, "SETATTR", Home.PYTHON, "hostfs.attributes"),
    Op(5, "READLINK", Home.PYTHON, "hostfs.names"),
    Op(6, "SYMLINK", Home.PYTHON, "hostfs.names"),
    Op(8, "MKNOD", Home.PYTHON, "hostfs.names"),
    Op(9, "MKDIR", Home.PYTHON, "hostfs.names"),
    Op(10, "UNLINK", Home.PYTHON, "hostfs.names"),
    Op(11, "RMDIR", Home.PYTHON, "hostfs.names"),
    Op(12, "RENAME", Home.PYTHON, "hostfs.names"),
    Op(13, "LINK", Home.PYTHON, "hostfs.names"),
    Op(14, "OPEN", Home.PYTHON, "hostfs.files"),
    Op(15, "READ", Home.HOT, "hostfs.hot_data"),
    Op(16, "WRITE", Home.HOT, "hostfs.hot_data"),
    Op(17, "STATFS", Home.PYTHON, "hostfs.attributes"),
    Op(18, "RELEASE", Home.PYTHON, "hostfs.files"),
    Op(20, "FSYNC", Home.PYTHON, "hostfs.files"),
    Op(21, "SETXATTR", Home.PYTHON, "hostfs.xattrs"),
    Op(22, "GETXATTR", Home.PYTHON, "hostfs.xattrs"),
    Op(23, "LISTXATTR", Home.PYTHON, "hostfs.xattrs"),
    Op(24, "REMOVEXATTR", Home.PYTHON, "hostfs.xattrs"),
    Op(25, "FLUSH", Home.PYTHON, "hostfs.files"),
    Op(26, "INIT", Home.PYTHON, "fuse.init"),
    Op(27, "OPENDIR", Home.PYTHON, "hostfs.directories"),
    Op(28, "READDIR", Home.PYTHON, "hostfs.directories"),
    Op(29, "RELEASEDIR", Home.PYTHON, "hostfs.directories"),
    Op(30, "FSYNCDIR", Home.PYTHON, "hostfs.directories"),
    Op(35, "CREATE", Home.PYTHON, "hostfs.files"),
    Op(38, "DESTROY", Home.PYTHON, "fuse.init"),
    Op(42, "BATCH_FORGET", Home.HOT, "hostfs.hot_names"),
    Op(43, "FALLOCATE", Home.PYTHON, "hostfs.files"),
    Op(44, "READDIRPLUS", Home.PYTHON, "hostfs.directories"),
    Op(45, "RENAME2", Home.PYTHON, "hostfs.names"),
    Op(46, "LSEEK", Home.PYTHON, "hostfs.files"),
)

NUMBER = {op.name: op.number for op in OPERATIONS}
NAME = {op.number: op.name for op in OPERATIONS}
