"""FUSE structures and constants used from Python (linux/fuse.h 7.45).

Layouts are native byte order: a virtio-fs guest and its host are one machine. What the data path
reads and writes without the GIL is declared in `vfsd/fuse/_wire.pxd`.
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
INIT_IN = Struct("=IIIII 44x")  # major, minor, max_readahead, flags, flags2 (as Linux sends it)
INIT_OUT = Struct("=IIII HHI IHHI 28x")
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2
ATTR = Struct("=QQQ qqq III III IIII")
# ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid,
# rdev, blksize, flags
ENTRY_OUT = Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid and their nsec; ATTR follows
ATTR_OUT = Struct("=QII")  # attr_valid, attr_valid_nsec, dummy; ATTR follows
GETATTR_IN = Struct("=IIQ")  # getattr_flags, dummy, fh
STATX_IN = Struct("=IIQII")  # getattr_flags, reserved, fh, sx_flags, sx_mask
STATX_OUT = Struct("=QII 16x I I Q IIIH2x QQQQ qI4x qI4x qI4x qI4x IIII 112x")
# attr_valid, attr_valid_nsec, flags; mask, blksize, attributes, nlink, uid, gid, mode, ino, size,
# blocks, attributes_mask, atime, btime, ctime, mtime (sec, nsec), rdev and dev (major, minor)
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
WRITE_IN = Struct("=QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding
WRITE_OUT = Struct("=II")  # size, padding
READ_IN = Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
SETXATTR_IN = Struct("=II")  # size, flags (the form without FUSE_SETXATTR_EXT)
SETXATTR_IN_EXT = Struct("=IIII")  # size, flags, setxattr_flags, padding
GETXATTR_IN = Struct("=II")  # size, padding
GETXATTR_OUT = Struct("=II")  # size, padding
FALLOCATE_IN = Struct("=QQQII")  # fh, offset, length, mode, padding
LSEEK_IN = Struct("=QQII")  # fh, offset, whence, padding
LSEEK_OUT = Struct("=Q")  # offset
KSTATFS = Struct("=QQQQQ IIII 24x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, -
COPY_FILE_RANGE_IN = Struct("=QQQQQQQ")  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
COPY_FILE_RANGE_64_OUT = Struct("=Q")  # bytes_copied
LK_IN = Struct("=QQ QQII II")  # fh, owner, start, end, type, pid, lk_flags, padding
INTERRUPT_IN = Struct("=Q")  # unique
LK_OUT = Struct("=QQII")  # start, end, type, pid
ACCESS_IN = Struct("=II")  # mask, padding
IOCTL_IN = Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT = Struct("=iIII")  # result, flags, in_iovs, out_iovs
SETUPMAPPING_IN = Struct("=QQQQQ")  # fh (always ~0), foffset, len, flags, moffset
REMOVEMAPPING_IN = Struct("=I")  # count; that many REMOVEMAPPING_ONE follow, without padding
REMOVEMAPPING_ONE = Struct("=QQ")  # moffset, len
SYNCFS_IN = Struct("=Q")  # padding
DIRENT = Struct("=QQII")  # ino, off, namelen, type; the name follows, padded to 8
ENTRY_OUT_SIZE = ENTRY_OUT.size + ATTR.size
ATTR_OUT_SIZE = ATTR_OUT.size + ATTR.size
FSYNC_FDATASYNC = 1
ATTR_SUBMOUNT = 1  # fuse_attr.flags
ATTR_DAX = 2
GETATTR_FH = 1
WRITE_CACHE = 1  # write_in.write_flags: from the page cache, fh guessed
WRITE_KILL_SUIDGID = 4
SETXATTR_ACL_KILL_SGID = 1  # setxattr_in.setxattr_flags
EXT_GROUPS = 32  # fuse_ext_header.type
EXT_HEADER = Struct("=II")  # size, type
SUPP_GROUPS_ONE = Struct("=II")  # nr_groups, groups[0]
OPEN_KILL_SUIDGID = 1  # open_in.open_flags, create_in.open_flags
READ_LOCKOWNER = 2  # read_in.read_flags
WRITE_LOCKOWNER = 2  # write_in.write_flags
RELEASE_FLOCK_UNLOCK = 2  # release_in.release_flags
LK_FLOCK = 1  # lk_in.lk_flags
SETUPMAPPING_WRITE = 1  # setupmapping_in.flags; Linux sets READ always
SETUPMAPPING_READ = 2
SETUPMAPPING_FH = 0xFFFFFFFFFFFFFFFF  # setupmapping_in.fh of Linux: maps go by nodeid
REMOVEMAPPING_MAX = PAGE_SIZE // REMOVEMAPPING_ONE.size  # FUSE_REMOVEMAPPING_MAX_ENTRY
TAG_BYTES = 36
CONFIG = Struct(f"<{TAG_BYTES}sI")  # struct virtio_fs_config: tag, num_request_queues
DAX_SHMID = 0  # VIRTIO_FS_SHMCAP_ID_CACHE: the shared memory region that is the DAX window
DAX_RANGE = 1 << 21  # FUSE_DAX_SZ: what Linux maps at a time
IOCTL_UNRESTRICTED = 2
IOCTL_RETRY = 4  # ioctl_out.flags
IOCTL_DIR = 16
STATX_BASIC = 0x7FF  # statx_in.sx_mask
STATX_BTIME = 0x800


class Init(IntFlag):
    """INIT flags, both words in one 64-bit value (flags2 shifted by 32)."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


class Fopen(IntFlag):
    """open_out.open_flags"""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6


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
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class Rename(IntFlag):
    """rename2_in.flags: renameat2(2)'s own."""

    NOREPLACE = 1 << 0
    EXCHANGE = 1 << 1
    WHITEOUT = 1 << 2


class SeekWhence(IntEnum):
    """lseek_in.whence; Linux sends only these two."""

    DATA = 3
    HOLE = 4
