"""ioctl(2): a file's flags and attributes, which the VFS asks for, and all others (fs/fuse/ioctl.c)."""

import os
from errno import EFAULT, EINVAL, EIO, ENOMEM, ENOSYS, ENOTTY, EPERM
from os import strerror

from vfsd.fuse import abi
from vfsd.fuse.abi import PAGE_SIZE, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client.attributes import check_writable, owner_or_capable
from vfsd.guest.client.connection import current
from vfsd.guest.client.files import send_open, send_release
from vfsd.guest.client.inodes import Inode
from vfsd.guest.client.openfile import OpenFile

IOC_WRITE, IOC_READ = 1, 2
# linux/fs.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
# Setting: the command that reads what is to change, and the bits of its first word only root may change.
SETTERS = {
    FS_IOC_SETFLAGS: (FS_IOC_GETFLAGS, 0x30),  # FS_IMMUTABLE_FL, FS_APPEND_FL
    FS_IOC_FSSETXATTR: (FS_IOC_FSGETXATTR, 0x18),  # FS_XFLAG_IMMUTABLE, FS_XFLAG_APPEND
}
# Bytes of their data: an int where the number says long.
SIZES = {FS_IOC_GETFLAGS: 4, FS_IOC_SETFLAGS: 4, FS_IOC_FSGETXATTR: 28, FS_IOC_FSSETXATTR: 28}


def error(number: int) -> OSError:
    return OSError(number, strerror(number))


def ioctl(file: OpenFile, command: int, data: bytes) -> tuple[int, bytes]:
    """Result and data out (do_vfs_ioctl, fuse_file_ioctl)."""
    file.inode.check_good()
    if command in SETTERS:
        return 0, set_attributes(file, command, data)
    if command in SIZES:
        return 0, private(file.inode, command)
    return passed_on(file, command, data)


# ---- flags and attributes


def set_attributes(file: OpenFile, command: int, data: bytes) -> bytes:
    """vfs_fileattr_set, fuse_fileattr_set"""
    getter, roots = SETTERS[command]
    data = data[: SIZES[command]]
    if len(data) < SIZES[command]:
        raise error(EFAULT)
    check_writable(file.mount.readonly)
    if not owner_or_capable(file.inode):
        raise error(EPERM)
    now = private(file.inode, getter)
    changed = int.from_bytes(now[:4], "little") ^ int.from_bytes(data[:4], "little")
    if changed & roots and current().uid != 0:
        raise error(EPERM)
    return private(file.inode, command, data)


def private(inode: Inode, command: int, data: bytes = b"") -> bytes:
    """Through a handle of its own, with exactly the command's data (fuse_priv_ioctl)."""
    if not inode.is_reg and not inode.is_dir:
        raise error(ENOTTY)
    conn = inode.sb.conn
    out_size = 0 if data else SIZES[command]
    fh, _ = send_open(inode, os.O_RDONLY)
    try:
        flags = abi.IOCTL_DIR if inode.is_dir else 0
        args = abi.IOCTL_IN.pack(fh, flags, command, 0, len(data), out_size) + data
        out, _ = conn.try_call(
            Opcode.IOCTL, inode.nodeid, args, instead=ENOTTY, out=abi.IOCTL_OUT.size + out_size
        )
    finally:
        send_release(inode, fh, os.O_RDONLY)
    check_result(out)
    return out[abi.IOCTL_OUT.size :]


# ---- all others


def passed_on(file: OpenFile, command: int, data: bytes) -> tuple[int, bytes]:
    """Sizes and direction are those of the command (fuse_do_ioctl, restricted)."""
    inode, conn = file.inode, file.conn
    size, direction = command >> 16 & 0x3FFF, command >> 30 & 3
    in_size = size if direction & IOC_WRITE else 0
    out_size = size if direction & IOC_READ else 0
    if -(-max(in_size, out_size) // PAGE_SIZE) > conn.max_pages:
        raise error(ENOMEM)
    if in_size > len(data):
        raise error(EINVAL)
    flags = abi.IOCTL_DIR if inode.is_dir and conn.has(Init.HAS_IOCTL_DIR) else 0
    if inode.is_dir and not flags:
        raise error(ENOTTY)
    args = abi.IOCTL_IN.pack(file.fh, flags, command, 0, in_size, out_size)
    into = bytearray(max(out_size, PAGE_SIZE))
    out, length = conn.try_call(
        Opcode.IOCTL, inode.nodeid, args, instead=ENOTTY, out=abi.IOCTL_OUT.size, argvar=True,
        data=data[:in_size] if in_size else None, into=into,
    )  # fmt: skip
    if length > out_size:
        raise error(EIO)
    result = check_result(out)
    if inode.is_reg:
        inode.invalidate()
    return result, bytes(into[:length])


def check_result(out: bytes) -> int:
    """ioctl_out.result, unless it is an error."""
    result, flags, _, _ = abi.IOCTL_OUT.unpack_from(out)
    if flags & abi.IOCTL_RETRY:
        raise error(EIO)
    if result < 0:
        raise error(ENOTTY if result == -ENOSYS else -result)
    return int(result)
