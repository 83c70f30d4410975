"""FUSE structures and constants used from Python (linux/fuse.h 7.45).

Layouts are native byte order: a virtio-fs guest and its host are one machine. What the data path
reads and writes without the GIL is declared in `vfsd/_wire.pxd`.
"""

from enum import IntEnum, IntFlag
from struct import Struct

ROOT_ID = 1
KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45
KERNEL_MINOR_VERSION_MIN = 27  # the oldest minor a virtio-fs guest has spoken (Linux 5.4: 7.31)
PAGE_SIZE = 4096

INIT_IN_MIN = Struct("=IIII")  # major, minor, max_readahead, flags
INIT_FLAGS2 = Struct("=I")  # follows if FUSE_INIT_EXT is set (7.36)
INIT_OUT = Struct("=IIII HHI IHHI 28x")
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2
MKNOD_IN = Struct("=IIII")  # mode, rdev, umask, padding
MKDIR_IN = Struct("=II")  # mode, umask
RENAME_IN = Struct("=Q")  # newdir
RENAME2_IN = Struct("=QII")  # newdir, flags, padding
LINK_IN = Struct("=Q")  # oldnodeid
SETATTR_IN = Struct("=IIQQQ qqq III IIIII")
# valid, padding, fh, size, lock_owner, atime, mtime, ctime, atimensec, mtimensec, ctimensec,
# mode, unused, uid, gid, unused
OPEN_IN = Struct("=II")  # flags, open_flags
CREATE_IN = Struct("=IIII")  # flags, mode, umask, open_flags
OPEN_OUT = Struct("=QIi")  # fh, open_flags, backing_id
RELEASE_IN = Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
FLUSH_IN = Struct("=QIIQ")  # fh, unused, padding, lock_owner
FSYNC_IN = Struct("=QII")  # fh, fsync_flags, padding
READ_IN = Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = READ_IN  # the same, with write_flags; the data follows
SETXATTR_IN = Struct("=II")  # size, flags (the form without FUSE_SETXATTR_EXT)
GETXATTR_IN = Struct("=II")  # size, padding
GETXATTR_OUT = Struct("=II")  # size, padding
FALLOCATE_IN = Struct("=QQQII")  # fh, offset, length, mode, padding
LSEEK_IN = Struct("=QQII")  # fh, offset, whence, padding
LSEEK_OUT = Struct("=Q")  # offset
KSTATFS = Struct("=QQQQQ IIII 24x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, -
DIRENT = Struct("=QQII")  # ino, off, namelen, type; the name follows, padded to 8
ENTRY_OUT_SIZE = 128
FSYNC_FDATASYNC = 1


class Init(IntFlag):
    """INIT flags, both words in one 64-bit value (flags2 shifted by 32)."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30


class Fopen(IntFlag):
    """open_out.open_flags"""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


class Fattr(IntFlag):
    """setattr_in.valid"""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


class Rename(IntFlag):
    """rename2_in.flags: renameat2(2)'s own."""

    NOREPLACE = 1 << 0
    EXCHANGE = 1 << 1
    WHITEOUT = 1 << 2


class SeekWhence(IntEnum):
    """lseek_in.whence; Linux sends only these two."""

    DATA = 3
    HOLE = 4
