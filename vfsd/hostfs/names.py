"""Operations that make, remove and move names, and READLINK."""

import os
import stat
from errno import EINVAL

from vfsd.fuse import abi
from vfsd.fuse.dispatch import Request
from vfsd.hostfs._syscalls import renameat2
from vfsd.hostfs.fs import HostFs, proc_path

RENAME_FLAGS = abi.Rename.NOREPLACE | abi.Rename.EXCHANGE | abi.Rename.WHITEOUT


def readlink(fs: HostFs, request: Request) -> bytes:
    with fs.tables.pin(request.nodeid) as pin:
        return os.readlink(b"", dir_fd=pin.fd)


def symlink(fs: HostFs, request: Request) -> bytes:
    name = request.name()
    target = request.string()
    with fs.tables.pin(request.nodeid) as parent, fs.as_caller(request):
        os.symlink(target, name, dir_fd=parent.fd)
    return fs.tables.lookup(request.nodeid, name)


def mknod(fs: HostFs, request: Request) -> bytes:
    mode, rdev, _umask, _ = request.take(abi.MKNOD_IN)
    name = request.name()
    # new_decode_dev() of linux/kdev_t.h
    device = os.makedev((rdev >> 8) & 0xFFF, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00))
    with fs.tables.pin(request.nodeid) as parent, fs.as_caller(request):
        os.mknod(name, mode, device, dir_fd=parent.fd)
    return fs.tables.lookup(request.nodeid, name)


def mkdir(fs: HostFs, request: Request) -> bytes:
    mode, _umask = request.take(abi.MKDIR_IN)
    name = request.name()
    with fs.tables.pin(request.nodeid) as parent, fs.as_caller(request):
        os.mkdir(name, stat.S_IMODE(mode), dir_fd=parent.fd)
    return fs.tables.lookup(request.nodeid, name)


def unlink(fs: HostFs, request: Request) -> None:
    name = request.name()
    with fs.tables.pin(request.nodeid) as parent:
        os.unlink(name, dir_fd=parent.fd)


def rmdir(fs: HostFs, request: Request) -> None:
    name = request.name()
    with fs.tables.pin(request.nodeid) as parent:
        os.rmdir(name, dir_fd=parent.fd)


def rename(fs: HostFs, request: Request) -> None:
    (new_dir,) = request.take(abi.RENAME_IN)
    move(fs, request, new_dir, 0)


def rename2(fs: HostFs, request: Request) -> None:
    new_dir, flags, _ = request.take(abi.RENAME2_IN)
    if flags & ~RENAME_FLAGS:
        raise OSError(EINVAL, "unknown rename flags")
    move(fs, request, new_dir, flags)


def move(fs: HostFs, request: Request, new_dir: int, flags: int) -> None:
    old_name = request.name()
    new_name = request.name()
    with fs.tables.pin(request.nodeid) as old, fs.tables.pin(new_dir) as new:
        renameat2(old.fd, old_name, new.fd, new_name, flags)


def link(fs: HostFs, request: Request) -> bytes:
    (old_nodeid,) = request.take(abi.LINK_IN)
    name = request.name()
    with fs.tables.pin(old_nodeid) as old, fs.tables.pin(request.nodeid) as parent:
        os.link(proc_path(old.fd), name, dst_dir_fd=parent.fd, follow_symlinks=True)
    return fs.tables.lookup(request.nodeid, name)
