"""What a frame of each opcode holds beside its headers: for whoever drives a virtio-fs device.

The arguments' sizes are those of include/uapi/linux/fuse.h 7.46 without the forms of minor versions
below 9; which of them lie in data pages, and which may come back shorter (`out_argvar`), is what
fs/fuse of Linux 6.18 sets in `struct fuse_args` (file.c, dir.c, readdir.c, xattr.c, ioctl.c,
inode.c). FORGET, BATCH_FORGET and INTERRUPT have no reply and are not here.
"""

import struct
from typing import NamedTuple

_U32 = struct.Struct("=I")


class Shape(NamedTuple):
    """The frames of one opcode, in bytes; offsets count from the end of the in header."""

    name: str
    out_args: int = 0  # of the reply, beside data
    out_pages: int = 0  # at least this much room for data in pages
    size_at: int | None = None  # where the request says how much data it has room for
    in_pages: bool = False  # that data lies in pages; else in the arguments
    argvar: bool = False  # the last out argument may come back shorter
    data_from: int | None = None  # in arguments from here on lie in pages

    def room(self, arguments: bytes) -> tuple[int, int, bool]:
        """What a reply to a request with these in arguments needs: out arguments, pages, argvar."""
        if self.size_at is None:
            return self.out_args, self.out_pages, self.argvar
        (size,) = _U32.unpack_from(arguments, self.size_at)
        if self.in_pages:
            return self.out_args, max(self.out_pages, size), self.argvar
        # GETXATTR and LISTXATTR with size 0 ask how much there is: getxattr_out.
        return (size, 0, True) if size else (self.out_args, 0, False)


ENTRY = 128  # fuse_entry_out
ATTR = 104  # fuse_attr_out
CREATE = ENTRY + 16  # and fuse_open_out

SHAPES = {
    1: Shape("LOOKUP", ENTRY),
    3: Shape("GETATTR", ATTR),
    4: Shape("SETATTR", ATTR),
    5: Shape("READLINK", out_pages=4095, argvar=True),
    6: Shape("SYMLINK", ENTRY),
    8: Shape("MKNOD", ENTRY),
    9: Shape("MKDIR", ENTRY),
    10: Shape("UNLINK"),
    11: Shape("RMDIR"),
    12: Shape("RENAME"),
    13: Shape("LINK", ENTRY),
    14: Shape("OPEN", 16),
    15: Shape("READ", size_at=16, in_pages=True, argvar=True),
    16: Shape("WRITE", 8, data_from=40),
    17: Shape("STATFS", 80),
    18: Shape("RELEASE"),
    20: Shape("FSYNC"),
    21: Shape("SETXATTR"),
    22: Shape("GETXATTR", 8, size_at=0),
    23: Shape("LISTXATTR", 8, size_at=0),
    24: Shape("REMOVEXATTR"),
    25: Shape("FLUSH"),
    26: Shape("INIT", 64, argvar=True),
    27: Shape("OPENDIR", 16),
    28: Shape("READDIR", size_at=16, in_pages=True, argvar=True),
    29: Shape("RELEASEDIR"),
    30: Shape("FSYNCDIR"),
    31: Shape("GETLK", 24),
    32: Shape("SETLK"),
    33: Shape("SETLKW"),
    34: Shape("ACCESS"),
    35: Shape("CREATE", CREATE),
    37: Shape("BMAP", 8),
    38: Shape("DESTROY"),
    # fuse_do_ioctl: "make sure there always is at least one page".
    39: Shape("IOCTL", 16, out_pages=4096, size_at=28, in_pages=True, argvar=True, data_from=32),
    40: Shape("POLL", 8),
    43: Shape("FALLOCATE"),
    44: Shape("READDIRPLUS", size_at=16, in_pages=True, argvar=True),
    45: Shape("RENAME2"),
    46: Shape("LSEEK", 8),
    47: Shape("COPY_FILE_RANGE", 8),
    48: Shape("SETUPMAPPING"),
    49: Shape("REMOVEMAPPING"),
    50: Shape("SYNCFS"),
    51: Shape("TMPFILE", CREATE),
    52: Shape("STATX", 288),
    53: Shape("COPY_FILE_RANGE_64", 8),
}
