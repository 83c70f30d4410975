"""FUSE structures read or written without the GIL: linux/fuse.h 7.45, little ends as the guest's.

The others are packed and unpacked by `vfsd.fuse.abi`. Sizes are asserted by `vfsd.fuse.dispatch`
at import.
"""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

cdef enum:
    FUSE_ROOT_ID = 1
    FUSE_IN_HEADER = 40   # bytes
    FUSE_OUT_HEADER = 16  # bytes

    FUSE_ATTR_DAX = 2
    FUSE_DAX_SZ = 1 << 21  # bytes, what Linux maps at a time
    FOPEN_KEEP_CACHE = 2
    FUSE_GETATTR_FH = 1
    FUSE_WRITE_CACHE = 1
    FUSE_WRITE_KILL_SUIDGID = 4
    FUSE_OPEN_KILL_SUIDGID = 1
    FUSE_SETXATTR_ACL_KILL_SGID = 1
    FUSE_FSYNC_FDATASYNC = 1
    FUSE_LK_FLOCK = 1
    FUSE_ATTR_SUBMOUNT = 1

    FUSE_SETUPMAPPING_FLAG_WRITE = 1
    FUSE_SETUPMAPPING_FLAG_READ = 2

    FATTR_MODE = 1
    FATTR_UID = 2
    FATTR_GID = 4
    FATTR_SIZE = 8
    FATTR_ATIME = 16
    FATTR_MTIME = 32
    FATTR_FH = 64
    FATTR_ATIME_NOW = 128
    FATTR_MTIME_NOW = 256
    FATTR_KILL_SUIDGID = 2048

    FUSE_MAX_NR_SECCTX = 31  # extensions up to this type are so many security contexts
    FUSE_EXT_GROUPS = 32

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

cdef packed struct fuse_statx_in:
    uint32_t getattr_flags
    uint32_t reserved
    uint64_t fh
    uint32_t sx_flags
    uint32_t sx_mask

cdef packed struct fuse_sx_time:
    int64_t tv_sec
    uint32_t tv_nsec
    int32_t reserved

cdef packed struct fuse_statx:
    uint32_t mask
    uint32_t blksize
    uint64_t attributes
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint16_t mode
    uint16_t spare0
    uint64_t ino
    uint64_t size
    uint64_t blocks
    uint64_t attributes_mask
    fuse_sx_time atime
    fuse_sx_time btime
    fuse_sx_time ctime
    fuse_sx_time mtime
    uint32_t rdev_major
    uint32_t rdev_minor
    uint32_t dev_major
    uint32_t dev_minor
    uint64_t spare2[14]

cdef packed struct fuse_statx_out:
    uint64_t attr_valid
    uint32_t attr_valid_nsec
    uint32_t flags
    uint64_t spare[2]
    fuse_statx stat

cdef packed struct fuse_access_in:
    uint32_t mask
    uint32_t padding

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

cdef packed struct fuse_mknod_in:
    uint32_t mode
    uint32_t rdev
    uint32_t umask
    uint32_t padding

cdef packed struct fuse_mkdir_in:
    uint32_t mode
    uint32_t umask

cdef packed struct fuse_rename_in:
    uint64_t newdir

cdef packed struct fuse_rename2_in:
    uint64_t newdir
    uint32_t flags
    uint32_t padding

cdef packed struct fuse_link_in:
    uint64_t oldnodeid

cdef packed struct fuse_setattr_in:
    uint32_t valid
    uint32_t padding
    uint64_t fh
    uint64_t size
    uint64_t lock_owner
    int64_t atime
    int64_t mtime
    int64_t ctime
    uint32_t atimensec
    uint32_t mtimensec
    uint32_t ctimensec
    uint32_t mode
    uint32_t unused4
    uint32_t uid
    uint32_t gid
    uint32_t unused5

cdef packed struct fuse_kstatfs:
    uint64_t blocks
    uint64_t bfree
    uint64_t bavail
    uint64_t files
    uint64_t ffree
    uint32_t bsize
    uint32_t namelen
    uint32_t frsize
    uint32_t padding
    uint32_t spare[6]

cdef packed struct fuse_open_in:
    uint32_t flags
    uint32_t open_flags

cdef packed struct fuse_create_in:
    uint32_t flags
    uint32_t mode
    uint32_t umask
    uint32_t open_flags

cdef packed struct fuse_open_out:
    uint64_t fh
    uint32_t open_flags
    int32_t backing_id

cdef packed struct fuse_release_in:
    uint64_t fh
    uint32_t flags
    uint32_t release_flags
    uint64_t lock_owner

cdef packed struct fuse_flush_in:
    uint64_t fh
    uint32_t unused
    uint32_t padding
    uint64_t lock_owner

cdef packed struct fuse_file_lock:  # both ends included
    uint64_t start
    uint64_t end
    uint32_t type
    uint32_t pid

cdef packed struct fuse_interrupt_in:
    uint64_t unique

cdef packed struct fuse_lk_in:
    uint64_t fh
    uint64_t owner
    fuse_file_lock lk
    uint32_t lk_flags
    uint32_t padding

cdef packed struct fuse_fsync_in:
    uint64_t fh
    uint32_t fsync_flags
    uint32_t padding

cdef packed struct fuse_fallocate_in:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t padding

cdef packed struct fuse_lseek_in:
    uint64_t fh
    uint64_t offset
    uint32_t whence
    uint32_t padding

cdef packed struct fuse_lseek_out:
    uint64_t offset

cdef packed struct fuse_setupmapping_in:
    uint64_t fh
    uint64_t foffset
    uint64_t len
    uint64_t flags
    uint64_t moffset

cdef packed struct fuse_removemapping_in:  # count of these follow without padding:
    uint32_t count

cdef packed struct fuse_removemapping_one:
    uint64_t moffset
    uint64_t len

cdef packed struct fuse_copy_file_range_in:
    uint64_t fh_in
    uint64_t off_in
    uint64_t nodeid_out
    uint64_t fh_out
    uint64_t off_out
    uint64_t len
    uint64_t flags

cdef packed struct fuse_copy_file_range_out:
    uint64_t bytes_copied

cdef packed struct fuse_syncfs_in:
    uint64_t padding

cdef packed struct fuse_ioctl_in:
    uint64_t fh
    uint32_t flags
    uint32_t cmd
    uint64_t arg
    uint32_t in_size
    uint32_t out_size

cdef packed struct fuse_ioctl_out:
    int32_t result
    uint32_t flags
    uint32_t in_iovs
    uint32_t out_iovs

cdef packed struct fuse_setxattr_in:  # the form without FUSE_SETXATTR_EXT
    uint32_t size
    uint32_t flags

cdef packed struct fuse_setxattr_ext:  # what follows with it
    uint32_t setxattr_flags
    uint32_t padding

cdef packed struct fuse_getxattr_in:
    uint32_t size
    uint32_t padding

cdef packed struct fuse_getxattr_out:
    uint32_t size
    uint32_t padding

cdef packed struct fuse_ext_header:  # of fuse_secctx_header too, whose nr_secctx stands for the type
    uint32_t size
    uint32_t type

cdef packed struct fuse_secctx:  # the name, its NUL and the context follow, padded to 8 bytes
    uint32_t size
    uint32_t padding

cdef packed struct fuse_dirent:  # the name follows, padded to 8 bytes
    uint64_t ino
    uint64_t off
    uint32_t namelen
    uint32_t type
