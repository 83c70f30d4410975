"""Attributes, permissions and extended attributes (fs/fuse/dir.c, xattr.c)."""

import os
import stat
from collections.abc import Callable
from errno import E2BIG, EACCES, EIO, ENODATA, ENOSYS, EOPNOTSUPP, EPERM, ERANGE, EROFS
from os import strerror
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client import acl
from vfsd.guest.client.connection import Connection, current
from vfsd.guest.client.dax import layout_alone
from vfsd.guest.client.inodes import Inode
from vfsd.guest.client.replies import STATX_GID, STATX_MODE, STATX_UID, Attr

MAY_EXEC, MAY_WRITE, MAY_READ = 1, 2, 4
XATTR_SIZE_MAX = 65536
XATTR_NAME_MAX = 255
ACLS = (acl.ACCESS, acl.DEFAULT)


class Times(NamedTuple):
    """utimensat(2): nanoseconds, or None for now."""

    atime_ns: int | None
    mtime_ns: int | None


def update_attributes(inode: Inode, mask: int, fh: int | None = None) -> None:
    """Ask if what the mask wants is not known or has expired (fuse_update_attributes)."""
    inode.check_good()
    if inode.expired(mask):
        getattr_now(inode, fh)
    else:
        inode.sb.conn.hit("attributes")


def getattr_now(inode: Inode, fh: int | None = None) -> None:
    """fuse_do_getattr. fh: of an open regular file."""
    conn = inode.sb.conn
    asked = conn.attr_version
    flags = 0 if fh is None or not inode.is_reg else abi.GETATTR_FH
    args = abi.GETATTR_IN.pack(flags, 0, fh if fh is not None and flags else 0)
    out, _ = conn.call(Opcode.GETATTR, inode.nodeid, args, out=abi.ATTR_OUT_SIZE)
    take_attr(inode, out, asked)


def take_attr(inode: Inode, out: bytes, asked: int) -> Attr:
    """attr_out; another type of file means that this inode is not what it was."""
    seconds, nanoseconds, _ = abi.ATTR_OUT.unpack_from(out)
    attr = Attr._make(abi.ATTR.unpack_from(out, abi.ATTR_OUT.size))
    if not attr.valid or (inode.mode and stat.S_IFMT(attr.mode) != stat.S_IFMT(inode.mode)):
        inode.make_bad()
        raise OSError(EIO, strerror(EIO))
    inode.change_attributes(attr, inode.sb.conn.deadline(seconds, nanoseconds), asked)
    return attr


def birthtime_ns(inode: Inode) -> int | None:
    """STATX is sent for this only (fuse_do_statx). None: the host's file system has none."""
    conn = inode.sb.conn
    args = abi.STATX_IN.pack(0, 0, 0, 0, abi.STATX_BASIC | abi.STATX_BTIME)
    try:
        out, _ = conn.try_call(Opcode.STATX, inode.nodeid, args, instead=ENOSYS, out=abi.STATX_OUT.size)
    except OSError as problem:
        if problem.errno != ENOSYS:
            raise
        update_attributes(inode, abi.STATX_BASIC)
        return None
    fields = abi.STATX_OUT.unpack(out)
    seconds, nanoseconds = fields[16], fields[17]
    return seconds * 10**9 + nanoseconds if fields[3] & abi.STATX_BTIME else None


def stat_result(inode: Inode) -> os.stat_result:
    """fuse_fillattr"""
    attr = inode.attr
    size = inode.size if inode.is_reg else attr.size
    times = [
        seconds * 10**9 + nsec
        for seconds, nsec in ((attr.atime, attr.atimensec), (attr.mtime, attr.mtimensec),
                              (attr.ctime, attr.ctimensec))
    ]  # fmt: skip
    rdev = os.makedev((attr.rdev >> 8) & 0xFFF, (attr.rdev & 0xFF) | ((attr.rdev >> 12) & 0xFFF00))
    return os.stat_result((
        attr.mode, attr.ino, inode.sb.dev, attr.nlink, attr.uid, attr.gid, size,
        attr.atime, attr.mtime, attr.ctime, *(ns / 1e9 for ns in times), *times,
        attr.blksize, attr.blocks, rdev,
    ))  # fmt: skip


# ---- permission: default_permissions is always on for virtiofs


def permission(inode: Inode, mask: int) -> None:
    """fuse_permission: the mode decides, asked for anew before it denies."""
    inode.check_good()
    refreshed = inode.expired(STATX_MODE | STATX_UID | STATX_GID)
    if refreshed:
        getattr_now(inode)
    if not allowed(inode, mask) and not refreshed:
        getattr_now(inode)
    if not allowed(inode, mask):
        raise PermissionError(EACCES, strerror(EACCES))


def allowed(inode: Inode, mask: int) -> bool:
    """generic_permission"""
    caller, attr = current(), inode.attr
    if caller.uid == 0:
        return not mask & MAY_EXEC or inode.is_dir or bool(attr.mode & 0o111)
    if caller.uid == attr.uid:
        bits = attr.mode >> 6
    elif attr.mode & stat.S_IRWXG and (entries := access_acl(inode)) is not None:
        return acl.allows(entries, attr.uid, attr.gid, (caller.uid, {caller.gid, *caller.groups}), mask)
    elif caller.in_group(attr.gid):
        bits = attr.mode >> 3
    else:
        bits = attr.mode
    return mask & ~bits & 7 == 0


def access_acl(inode: Inode) -> list[acl.Entry] | None:
    """get_inode_acl; None where modes decide alone."""
    if not inode.sb.conn.has(Init.POSIX_ACL) or inode.is_link:
        return None
    try:
        value = grown(lambda size: getxattr_sized(inode, acl.ACCESS, size))
        return acl.parse(value) if value else None
    except ValueError as problem:
        raise OSError(EIO, strerror(EIO)) from problem
    except OSError as problem:
        if problem.errno not in (ENODATA, EOPNOTSUPP):
            raise
        return None


def owner_or_capable(inode: Inode) -> bool:
    return current().uid in (0, inode.attr.uid)


def in_group_or_capable(inode: Inode) -> bool:
    caller = current()
    return caller.uid == 0 or caller.in_group(inode.attr.gid)


# ---- changes


def setattr_now(
    inode: Inode, valid: Fattr, *, mode: int = 0, uid: int = 0, gid: int = 0, size: int = 0,
    atime_ns: int = 0, mtime_ns: int = 0, ctime_ns: int = 0, fh: int | None = None, lock_owner: int = 0,
) -> None:  # fmt: skip
    """fuse_do_setattr"""
    conn = inode.sb.conn
    inode.check_good()
    if fh is not None:
        valid |= Fattr.FH
    if valid & Fattr.SIZE:
        valid |= Fattr.LOCKOWNER
        if daemon_kills(conn):
            valid |= Fattr.KILL_SUIDGID
    (atime, atimensec), (mtime, mtimensec), (ctime, ctimensec) = (
        divmod(ns, 10**9) for ns in (atime_ns, mtime_ns, ctime_ns)
    )
    args = abi.SETATTR_IN.pack(
        valid, 0, fh or 0, size, lock_owner, atime, mtime, ctime, atimensec, mtimensec, ctimensec,
        mode, 0, uid, gid, 0,
    )  # fmt: skip
    if not valid & Fattr.SIZE:
        asked = conn.attr_version
        out, _ = conn.call(Opcode.SETATTR, inode.nodeid, args, out=abi.ATTR_OUT_SIZE)
        take_attr(inode, out, asked)
        return
    old = inode.size
    with layout_alone(inode), size_changing(inode):
        out, _ = conn.call(Opcode.SETATTR, inode.nodeid, args, out=abi.ATTR_OUT_SIZE)
    inode.set_size(size)
    take_attr(inode, out, conn.attr_version)
    if old != size:
        inode.pages.clear()


class size_changing:
    """While it lasts no reply's size is believed (FUSE_I_SIZE_UNSTABLE)."""

    def __init__(self, inode: Inode, *, when: bool = True) -> None:
        self._inode = inode
        self._count = int(when)

    def __enter__(self) -> None:
        with self._inode.guard:
            self._inode.size_unstable += self._count

    def __exit__(self, *exc: object) -> None:
        with self._inode.guard:
            self._inode.size_unstable -= self._count


def chmod(inode: Inode, mode: int) -> None:
    update_attributes(inode, STATX_MODE | STATX_UID | STATX_GID)
    if not owner_or_capable(inode):
        raise PermissionError(EPERM, strerror(EPERM))
    if not in_group_or_capable(inode):
        mode &= ~stat.S_ISGID
    setattr_now(inode, Fattr.MODE, mode=stat.S_IFMT(inode.mode) | stat.S_IMODE(mode))


def chown(inode: Inode, uid: int, gid: int) -> None:
    """-1 leaves as it is. Set-id bits of files go along (ATTR_KILL_SUID in fuse_setattr)."""
    update_attributes(inode, STATX_MODE | STATX_UID | STATX_GID)
    caller, attr = current(), inode.attr
    if caller.uid != 0:
        owner = caller.uid == attr.uid
        if uid != -1 and not (owner and uid == attr.uid):
            raise PermissionError(EPERM, strerror(EPERM))
        if gid != -1 and not (owner and (gid == attr.gid or caller.in_group(gid))):
            raise PermissionError(EPERM, strerror(EPERM))
    valid = (Fattr.UID if uid != -1 else Fattr(0)) | (Fattr.GID if gid != -1 else Fattr(0))
    mode = 0
    if not inode.is_dir:
        mode = without_setid(inode)
        if inode.sb.conn.has(Init.HANDLE_KILLPRIV_V2) and valid:
            valid |= Fattr.KILL_SUIDGID
        elif mode != inode.mode and not kills_privileges(inode.sb.conn):
            valid |= Fattr.MODE
    if valid:
        setattr_now(inode, valid, mode=mode, uid=max(uid, 0), gid=max(gid, 0))


def kills_privileges(conn: Connection) -> bool:
    return conn.has(Init.HANDLE_KILLPRIV | Init.HANDLE_KILLPRIV_V2)


def daemon_kills(conn: Connection) -> bool:
    """Whether the daemon is to take set-id bits with this change (FUSE_HANDLE_KILLPRIV_V2)."""
    return conn.has(Init.HANDLE_KILLPRIV_V2) and current().uid != 0


def without_setid(inode: Inode) -> int:
    """setattr_should_drop_suidgid"""
    mode = inode.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP or not in_group_or_capable(inode):
        mode &= ~stat.S_ISGID
    return mode


def remove_privileges(inode: Inode) -> None:
    """Before a write: set-id bits if the writer is not root, and file capabilities (file_remove_privs)."""
    if inode.no_security:
        return
    conn = inode.sb.conn
    mode = without_setid(inode)
    if current().uid != 0 and mode != inode.mode and not kills_privileges(conn):
        setattr_now(inode, Fattr.MODE, mode=mode)
    try:
        getxattr_sized(inode, b"security.capability", 0)
    except OSError:
        # Only with HANDLE_KILLPRIV_V2 is the superblock SB_NOSEC: otherwise each write asks.
        inode.no_security = conn.has(Init.HANDLE_KILLPRIV_V2)
        return
    removexattr(inode, b"security.capability")


def truncate(inode: Inode, size: int, fh: int | None = None) -> None:
    with inode.lock:
        remove_privileges(inode)
        setattr_now(inode, Fattr.SIZE, size=size, fh=fh)


def utime(inode: Inode, times: Times) -> None:
    now = times == Times(None, None)
    update_attributes(inode, STATX_UID)
    if not owner_or_capable(inode):
        if not now:
            raise PermissionError(EPERM, strerror(EPERM))
        permission(inode, MAY_WRITE)
    valid = Fattr.ATIME | Fattr.MTIME
    if times.atime_ns is None:
        valid |= Fattr.ATIME_NOW
    if times.mtime_ns is None:
        valid |= Fattr.MTIME_NOW
    setattr_now(inode, valid, atime_ns=times.atime_ns or 0, mtime_ns=times.mtime_ns or 0)


# ---- extended attributes


def check_xattr(inode: Inode, name: bytes, write: bool) -> None:
    """xattr_permission, and what the VFS checks of a name."""
    if not 0 < len(name) <= XATTR_NAME_MAX:
        raise OSError(ERANGE, strerror(ERANGE))
    if name.startswith(b"user.") and not (inode.is_reg or inode.is_dir):
        error = EPERM if write else ENODATA
        raise OSError(error, strerror(error))
    if name.startswith(b"trusted.") and current().uid != 0:
        error = EPERM if write else ENODATA
        raise OSError(error, strerror(error))
    if name in ACLS and write:
        set_acl_allowed(inode, name)
    if name.startswith(b"user."):
        permission(inode, MAY_WRITE if write else MAY_READ)


def set_acl_allowed(inode: Inode, name: bytes) -> None:
    """vfs_set_acl"""
    if inode.is_link or not inode.sb.conn.has(Init.POSIX_ACL):
        raise OSError(EOPNOTSUPP, strerror(EOPNOTSUPP))
    if name == acl.DEFAULT and not inode.is_dir:
        raise PermissionError(EACCES, strerror(EACCES))
    if not owner_or_capable(inode):
        raise PermissionError(EPERM, strerror(EPERM))


def getxattr_sized(inode: Inode, name: bytes, size: int) -> bytes | int:
    """fuse_getxattr: the value, or its size if the size given is 0."""
    inode.check_good()
    args = abi.GETXATTR_IN.pack(size, 0) + name + b"\0"
    return _sized(inode, Opcode.GETXATTR, args, size)


def _sized(inode: Inode, opcode: Opcode, args: bytes, size: int) -> bytes | int:
    conn = inode.sb.conn
    room = size or abi.GETXATTR_OUT.size
    out, _ = conn.try_call(opcode, inode.nodeid, args, instead=EOPNOTSUPP, out=room, argvar=size > 0)
    if size:
        return out
    return min(int(abi.GETXATTR_OUT.unpack(out)[0]), XATTR_SIZE_MAX)


def grown(ask: Callable[[int], bytes | int]) -> bytes:
    """With a small buffer first and a full one then, as os.getxattr does."""
    for size in (128, XATTR_SIZE_MAX):
        try:
            value = ask(size)
        except OSError as problem:
            if problem.errno != ERANGE or size == XATTR_SIZE_MAX:
                raise
        else:
            assert isinstance(value, bytes)
            return value
    raise AssertionError


def getxattr(inode: Inode, name: bytes) -> bytes:
    check_xattr(inode, name, False)
    return grown(lambda size: getxattr_sized(inode, name, size))


def listxattr(inode: Inode) -> list[bytes]:
    """fuse_listxattr: each name ends with NUL and none is empty, else EIO."""
    inode.check_good()
    data = grown(lambda size: _sized(inode, Opcode.LISTXATTR, abi.GETXATTR_IN.pack(size, 0), size))
    names = data.split(b"\0")
    if names.pop() or b"" in names:
        raise OSError(EIO, strerror(EIO))
    return names


def setxattr(inode: Inode, name: bytes, value: bytes, flags: int) -> None:
    check_xattr(inode, name, True)
    conn = inode.sb.conn
    if len(value) > XATTR_SIZE_MAX:
        raise OSError(E2BIG, strerror(E2BIG))
    if conn.has(Init.SETXATTR_EXT):
        kill = name in ACLS and conn.has(Init.POSIX_ACL) and not in_group_or_capable(inode)
        head = abi.SETXATTR_IN_EXT.pack(len(value), flags, abi.SETXATTR_ACL_KILL_SGID if kill else 0, 0)
    else:
        head = abi.SETXATTR_IN.pack(len(value), flags)
    conn.try_call(Opcode.SETXATTR, inode.nodeid, head + name + b"\0" + value, instead=EOPNOTSUPP)
    inode.invalidate()


def removexattr(inode: Inode, name: bytes) -> None:
    check_xattr(inode, name, True)
    inode.sb.conn.try_call(Opcode.REMOVEXATTR, inode.nodeid, name + b"\0", instead=EOPNOTSUPP)
    inode.invalidate()


def check_writable(readonly: bool) -> None:
    if readonly:
        raise OSError(EROFS, strerror(EROFS))
