"""Open files, but for READ and WRITE (`hot_data`)."""

import os
from errno import EEXIST, EINVAL, EOVERFLOW

from vfsd.fuse import abi
from vfsd.fuse.dispatch import Request
from vfsd.hostfs._syscalls import fallocate as host_fallocate
from vfsd.hostfs.fs import OPEN_ALWAYS, OPEN_FLAGS, HostFs

OFFSET_MAX = 2**63 - 1


def opened(fs: HostFs, fd: int) -> bytes:
    """open_out of a new handle that owns fd."""
    return abi.OPEN_OUT.pack(fs.tables.open(fd), fs.policy.cache.open_flags, 0)


def open(fs: HostFs, request: Request) -> bytes:
    flags, _ = request.take(abi.OPEN_IN)
    with fs.tables.pin(request.nodeid) as pin:
        fd = fs.reopen(pin, flags & OPEN_FLAGS)
    return opened(fs, fd)


def create(fs: HostFs, request: Request) -> bytes:
    flags, mode, _umask, _ = request.take(abi.CREATE_IN)
    name = request.name()
    wanted = flags & OPEN_FLAGS
    with fs.tables.pin(request.nodeid) as parent:

        def make() -> int:
            with fs.as_caller(request):
                return os.open(
                    name, wanted | OPEN_ALWAYS | os.O_CREAT | os.O_EXCL, mode & 0o7777, dir_fd=parent.fd
                )

        try:
            fd = fs.retry(make)
        except OSError as problem:
            if problem.errno != EEXIST or flags & os.O_EXCL:
                raise
            return open_existing(fs, request, name, wanted)
    try:
        entry = fs.tables.lookup(request.nodeid, name)
    except OSError:
        os.close(fd)
        raise
    return entry + opened(fs, fd)


def open_existing(fs: HostFs, request: Request, name: bytes, flags: int) -> bytes:
    """The host made the name after the guest had looked: open it as OPEN would, following nothing."""
    entry = fs.tables.lookup(request.nodeid, name)
    nodeid = int.from_bytes(entry[:8], "little")
    try:
        with fs.tables.pin(nodeid) as pin:
            return entry + opened(fs, fs.reopen(pin, flags))
    except OSError:
        fs.tables.forget(nodeid, 1)  # the guest never sees this entry
        raise


def release(fs: HostFs, request: Request) -> None:
    fh, _flags, _release_flags, _owner = request.take(abi.RELEASE_IN)
    fs.tables.release(fh)


def flush(fs: HostFs, request: Request) -> None:
    """Each close(2) in the guest; closing a duplicate reports what a network file system held back."""
    fh, _, _, _owner = request.take(abi.FLUSH_IN)
    with fs.tables.handle(fh) as handle:
        os.close(fs.retry(lambda: os.dup(handle.fd)))


def fsync(fs: HostFs, request: Request) -> None:
    fh, flags, _ = request.take(abi.FSYNC_IN)
    with fs.tables.handle(fh) as handle:
        if flags & abi.FSYNC_FDATASYNC:
            os.fdatasync(handle.fd)
        else:
            os.fsync(handle.fd)


def fallocate(fs: HostFs, request: Request) -> None:
    fh, offset, length, mode, _ = request.take(abi.FALLOCATE_IN)
    if offset > OFFSET_MAX or length > OFFSET_MAX:
        raise OSError(EINVAL, "offset or length past 2^63 - 1")
    with fs.tables.handle(fh) as handle:
        host_fallocate(handle.fd, mode, offset, length)


def lseek(fs: HostFs, request: Request) -> bytes:
    fh, offset, whence, _ = request.take(abi.LSEEK_IN)
    if whence not in (abi.SeekWhence.DATA, abi.SeekWhence.HOLE):
        raise OSError(EINVAL, "only SEEK_DATA and SEEK_HOLE reach the host")
    if offset > OFFSET_MAX:
        raise OSError(EOVERFLOW, "offset past 2^63 - 1")
    with fs.tables.handle(fh) as handle:
        return abi.LSEEK_OUT.pack(os.lseek(handle.fd, offset, whence))
