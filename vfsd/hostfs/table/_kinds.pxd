"""What is known of a file system by its kind (f_type of statfs(2))."""

cdef extern from "<linux/magic.h>" nogil:
    long BTRFS_SUPER_MAGIC
    long EXT4_SUPER_MAGIC      # ext2 and ext3 too
    long F2FS_SUPER_MAGIC
    long FUSE_SUPER_MAGIC
    long ISOFS_SUPER_MAGIC
    long MSDOS_SUPER_MAGIC
    long RAMFS_MAGIC
    long SQUASHFS_MAGIC
    long TMPFS_MAGIC
    long XFS_SUPER_MAGIC
    long ZFS_SUPER_MAGIC "0x2fc12fc1"


cdef inline bint in_memory(long kind) noexcept nogil:
    """No disk below: nothing blocks."""
    return kind == TMPFS_MAGIC or kind == RAMFS_MAGIC


cdef inline bint never_revalidates(long kind) noexcept nogil:
    """A name that is in memory is believed: no d_revalidate(), which may ask a server."""
    return close_never_fails(kind)


cdef inline bint handles_only_cached(long kind) noexcept nogil:
    """File handles are found in memory alone, unless the server has ways of its own (fuse_get_dentry())."""
    return kind == FUSE_SUPER_MAGIC


cdef inline bint close_never_fails(long kind) noexcept nogil:
    """close(2) has no error to tell: every one came with write(2) or comes with fsync(2).

    Those without a flush operation of their own (or where it can't fail); network file systems,
    FUSE, and overlayfs, which passes it down, have one.
    """
    return (kind == EXT4_SUPER_MAGIC or kind == XFS_SUPER_MAGIC or kind == BTRFS_SUPER_MAGIC
            or in_memory(kind) or kind == F2FS_SUPER_MAGIC or kind == ZFS_SUPER_MAGIC
            or kind == SQUASHFS_MAGIC or kind == ISOFS_SUPER_MAGIC or kind == MSDOS_SUPER_MAGIC)
