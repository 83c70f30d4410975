"""SETATTR and STATFS. GETATTR is in `hot_names`."""

import os
from contextlib import ExitStack

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr
from vfsd.fuse.dispatch import Request
from vfsd.hostfs._syscalls import NOW, OMIT, utimens
from vfsd.hostfs._tables import Pin
from vfsd.hostfs.fs import HostFs, proc_path


def setattr(fs: HostFs, request: Request) -> bytes:
    (valid, _, fh, size, _owner, atime, mtime, _ctime, atime_ns, mtime_ns, _ctime_ns,
     mode, _, uid, gid, _) = request.take(abi.SETATTR_IN)  # fmt: skip
    with ExitStack() as stack:
        pin = stack.enter_context(fs.tables.pin(request.nodeid))
        if valid & Fattr.MODE:
            os.chmod(proc_path(pin.fd), mode & 0o7777)
        if valid & (Fattr.UID | Fattr.GID):
            os.chown(
                proc_path(pin.fd),
                uid if valid & Fattr.UID else -1,
                gid if valid & Fattr.GID else -1,
            )
        if valid & Fattr.SIZE:
            handle = stack.enter_context(fs.tables.handle(fh)) if valid & Fattr.FH else None
            truncate(fs, pin, handle, size)
        if valid & (Fattr.ATIME | Fattr.MTIME):
            if not valid & Fattr.ATIME:
                atime_ns = OMIT
            elif valid & Fattr.ATIME_NOW:
                atime_ns = NOW
            if not valid & Fattr.MTIME:
                mtime_ns = OMIT
            elif valid & Fattr.MTIME_NOW:
                mtime_ns = NOW
            utimens(proc_path(pin.fd), atime, atime_ns, mtime, mtime_ns)
        return fs.tables.attr(pin.fd)


def truncate(fs: HostFs, pin: Pin, handle: Pin | None, size: int) -> None:
    """Through the guest's own handle if it named one: it may be the only one allowed to write."""
    if handle is not None:
        os.ftruncate(handle.fd, size)
        return
    fd = fs.reopen(pin, os.O_WRONLY)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def statfs(fs: HostFs, request: Request) -> bytes:
    with fs.tables.pin(request.nodeid) as pin:
        st = os.fstatvfs(pin.fd)
    return abi.KSTATFS.pack(
        st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree,
        st.f_bsize, st.f_namemax, st.f_frsize, 0,
    )  # fmt: skip
