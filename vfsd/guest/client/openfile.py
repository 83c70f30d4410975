"""What an open file is; what is done with one is in files.py."""

import os
import threading
from errno import EBADF, EISDIR
from os import strerror

from vfsd.fuse.abi import Fopen
from vfsd.guest.client import objects
from vfsd.guest.client.connection import Connection
from vfsd.guest.client.inodes import Dentry, Inode
from vfsd.guest.client.mountpoints import Mount


class OpenFile:
    """An open file or directory (struct file with its struct fuse_file). Holds its dentry and its mount."""

    def __init__(self, mount: Mount, dentry: Dentry, flags: int, fh: int, open_flags: Fopen) -> None:
        """Takes over the caller's reference to the dentry."""
        assert dentry.inode is not None
        self.mount = mount
        self.dentry = dentry
        self.inode: Inode = dentry.inode
        self.conn: Connection = dentry.sb.conn
        self.flags = flags
        self.fh = fh
        self.open_flags = open_flags
        self.position = 0
        self.position_lock = threading.RLock()
        self.next_read = 0  # where a sequential reader goes on
        self.flocked = False
        self.closed = False
        self.write_errors_told = self.inode.write_errors
        with mount.lock:
            mount.busy += 1
        if self.writable and self.inode.is_reg:
            with self.inode.guard:
                self.inode.writable.append(fh)
        objects.born("open files")

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def direct(self) -> bool:
        return bool(self.open_flags & Fopen.DIRECT_IO or self.flags & os.O_DIRECT)

    def check(self, *, write: bool) -> None:
        self.inode.check_good()
        if self.inode.is_dir:
            raise OSError(EBADF if write else EISDIR, strerror(EBADF if write else EISDIR))
        if not (self.writable if write else self.readable):
            raise OSError(EBADF, strerror(EBADF))
