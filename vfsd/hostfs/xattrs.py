"""Extended attributes, off unless the operator turned them on (--xattr)."""

import os
from errno import E2BIG, EINVAL, ENOSYS, EOPNOTSUPP, ERANGE

from vfsd.fuse import abi
from vfsd.fuse.dispatch import Request
from vfsd.hostfs.fs import HostFs, proc_path

VALUE_MAX = 65536  # XATTR_SIZE_MAX of linux/limits.h
NAME_MAX = 255  # XATTR_NAME_MAX


def check_on(fs: HostFs) -> None:
    if not fs.policy.xattr:
        raise OSError(ENOSYS, "extended attributes are off")  # the guest never asks again


def read_name(request: Request) -> bytes:
    name = request.string()
    if not 0 < len(name) <= NAME_MAX:
        raise OSError(ERANGE, "bad attribute name")
    if name.startswith(b"system.posix_acl_"):
        # Without FUSE_POSIX_ACL the guest would not enforce what it stores.
        raise OSError(EOPNOTSUPP, "ACLs are not negotiated")
    return name


def setxattr(fs: HostFs, request: Request) -> None:
    check_on(fs)
    size, flags = request.take(abi.SETXATTR_IN)
    name = read_name(request)
    value = request.rest()
    if size > VALUE_MAX:
        raise OSError(E2BIG, "value too large")
    if size > len(value):
        raise OSError(EINVAL, "value shorter than its size")
    if flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
        raise OSError(EINVAL, "unknown flags")
    with fs.tables.pin(request.nodeid) as pin:
        os.setxattr(proc_path(pin.fd), name, value[:size], flags)


def getxattr(fs: HostFs, request: Request) -> bytes:
    check_on(fs)
    size, _ = request.take(abi.GETXATTR_IN)
    name = read_name(request)
    with fs.tables.pin(request.nodeid) as pin:
        return sized(os.getxattr(proc_path(pin.fd), name), size)


def listxattr(fs: HostFs, request: Request) -> bytes:
    check_on(fs)
    size, _ = request.take(abi.GETXATTR_IN)
    with fs.tables.pin(request.nodeid) as pin:
        names = os.listxattr(proc_path(pin.fd))
    return sized(b"".join(os.fsencode(name) + b"\0" for name in names), size)


def removexattr(fs: HostFs, request: Request) -> None:
    check_on(fs)
    name = read_name(request)
    with fs.tables.pin(request.nodeid) as pin:
        os.removexattr(proc_path(pin.fd), name)


def sized(data: bytes, size: int) -> bytes:
    """The data if it fits, its length if the guest asked only for that."""
    if size == 0:
        return abi.GETXATTR_OUT.pack(len(data), 0)
    if len(data) > size:
        raise OSError(ERANGE, "buffer too small")
    return data
