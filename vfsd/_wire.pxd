"""FUSE structures read or written without the GIL: linux/fuse.h 7.45, little ends as the guest's.

The others are packed and unpacked by `vfsd.fuse.abi`. Sizes are asserted by `vfsd.fuse.dispatch`
at import.
"""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FUSE_ROOT_ID = 1
    FUSE_IN_HEADER = 40   # bytes
    FUSE_OUT_HEADER = 16  # bytes

    FUSE_GETATTR_FH = 1
    FUSE_WRITE_CACHE = 1

cdef packed struct fuse_in_header:
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

cdef packed struct fuse_out_header:
    uint32_t len
    int32_t error
    uint64_t unique

cdef packed struct fuse_attr:
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t atime
    uint64_t mtime
    uint64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev
    uint32_t blksize
    uint32_t flags

cdef packed struct fuse_entry_out:
    uint64_t nodeid
    uint64_t generation
    uint64_t entry_valid
    uint64_t attr_valid
    uint32_t entry_valid_nsec
    uint32_t attr_valid_nsec
    fuse_attr attr

cdef packed struct fuse_attr_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t dummy
    fuse_attr attr

cdef packed struct fuse_forget_in:
    uint64_t nlookup

cdef packed struct fuse_forget_one:
    uint64_t nodeid
    uint64_t nlookup

cdef packed struct fuse_batch_forget_in:
    uint32_t count
    uint32_t dummy

cdef packed struct fuse_getattr_in:
    uint32_t getattr_flags
    uint32_t dummy
    uint64_t fh

cdef packed struct fuse_read_in:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef packed struct fuse_write_in:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t write_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef packed struct fuse_write_out:
    uint32_t size
    uint32_t padding
