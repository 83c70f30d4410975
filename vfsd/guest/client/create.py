"""open(2) by path, with creation: LOOKUP, CREATE or MKNOD and OPEN (fuse_atomic_open, do_open)."""

import os
import stat
from errno import EEXIST, EINVAL, EISDIR, ELOOP, ENOENT, ENOSYS, ENOTDIR, EOPNOTSUPP
from typing import Final

from vfsd.fuse import abi
from vfsd.fuse.abi import Fopen
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client import namei
from vfsd.guest.client.attributes import MAY_EXEC, MAY_WRITE, check_writable, daemon_kills, permission
from vfsd.guest.client.files import finish_open, open_dentry
from vfsd.guest.client.inodes import Dentry
from vfsd.guest.client.mountpoints import Mount
from vfsd.guest.client.namei import LOOKUP_EXCL, Place, cross, error
from vfsd.guest.client.openfile import OpenFile
from vfsd.guest.client.replies import NEVER, Entry

TMPFILE: Final = os.O_TMPFILE & ~os.O_DIRECTORY


def open_path(root: Mount, path: bytes, flags: int, mode: int, umask: int) -> OpenFile:
    if flags & TMPFILE:
        return open_tmpfile(root, path, flags, mode, umask)
    if flags & os.O_CREAT and flags & os.O_DIRECTORY:
        raise error(EINVAL)
    if not flags & os.O_CREAT:
        return open_existing(root, path, flags)
    for _ in range(namei.MAXSYMLINKS + 1):
        result = open_or_create(root, path, flags, mode, umask)
        if isinstance(result, OpenFile):
            return result
        path = result
    raise error(ELOOP)


def open_existing(root: Mount, path: bytes, flags: int) -> OpenFile:
    with namei.walk(root, path, follow=not flags & os.O_NOFOLLOW) as place:
        if flags & os.O_DIRECTORY and not place.inode.is_dir:
            raise error(ENOTDIR)
        return open_dentry(place.mount, place.dentry.sb.tree.get(place.dentry), flags)


def open_or_create(root: Mount, path: bytes, flags: int, mode: int, umask: int) -> OpenFile | bytes:
    """The open file, or the path to go on with when the name is a symlink."""
    if not path.strip(b"/"):
        raise error(ENOENT if not path else EEXIST if flags & os.O_EXCL else EISDIR)
    with namei.parent_of(root, path) as (at, name, slash):
        if name in (b".", b".."):
            raise error(EEXIST if flags & os.O_EXCL else EISDIR)
        if slash:
            raise error(EISDIR)
        tree = at.dentry.sb.tree
        dentry = namei.lookup_known(at.dentry, name, LOOKUP_EXCL if flags & os.O_EXCL else 0)
        if dentry is None or dentry.inode is None:
            if dentry is not None:
                tree.put(dentry)
            with at.inode.names.alone():
                dentry = namei.lookup_locked(at.dentry, name)
                if dentry.inode is None:
                    negative = dentry
                    try:
                        return create_file(at, name, flags, mode, umask)
                    finally:
                        tree.put(negative)
        return open_found(at, dentry, path, flags)


def open_found(at: Place, dentry: Dentry, path: bytes, flags: int) -> OpenFile | bytes:
    """The name was there already; takes over the dentry."""
    place = Place(at.mount, dentry)
    try:
        if flags & os.O_EXCL:
            raise error(EEXIST)
        if place.inode.is_link and not flags & os.O_NOFOLLOW:
            target = namei.readlink(place.inode)
            place.put()
            return target if target.startswith(b"/") else path[: path.rfind(b"/") + 1] + target
        place = cross(place, True)
        if flags & os.O_DIRECTORY and not place.inode.is_dir:
            raise error(ENOTDIR)
    except BaseException:
        place.put()
        raise
    return open_dentry(place.mount, place.dentry, flags)


def create_file(at: Place, name: bytes, flags: int, mode: int, umask: int) -> OpenFile:
    """fuse_create_open, with the directory's names alone."""
    conn = at.dentry.sb.conn
    check_writable(at.mount.readonly)
    permission(at.inode, MAY_WRITE | MAY_EXEC)
    wanted = stat.S_IFREG | namei.masked(conn, mode, umask)
    if not conn.lacks(Opcode.CREATE):
        try:
            return send_create(at, Opcode.CREATE, name, flags, wanted, umask)
        except OSError as problem:
            if problem.errno != ENOSYS:
                raise
            conn.remember_silent(Opcode.CREATE)
    args = abi.MKNOD_IN.pack(wanted, 0, umask, 0) + name + b"\0"
    namei.create_entry(at.dentry, name, Opcode.MKNOD, args, stat.S_IFREG)
    dentry = namei.lookup_locked(at.dentry, name)
    return open_dentry(at.mount, dentry, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))


def send_create(at: Place, opcode: Opcode, name: bytes, flags: int, mode: int, umask: int) -> OpenFile:
    conn = at.dentry.sb.conn
    asked = conn.attr_version
    open_flags = abi.OPEN_KILL_SUIDGID if flags & os.O_TRUNC and daemon_kills(conn) else 0
    args = abi.CREATE_IN.pack(flags & ~os.O_NOCTTY, mode, umask, open_flags) + name + b"\0"
    size = abi.ENTRY_OUT_SIZE + abi.OPEN_OUT.size
    out, _ = conn.call(opcode, at.inode.nodeid, args, out=size, ext=namei.creation_ext(conn, at.inode))
    entry = Entry.parse(conn, out, asked)
    fh, fopen, _ = abi.OPEN_OUT.unpack_from(out, abi.ENTRY_OUT_SIZE)
    if opcode == Opcode.TMPFILE:
        dentry = nameless(at, entry)
    else:
        dentry = namei.new_entry(at.dentry, name, entry, stat.S_IFREG)
    file = OpenFile(at.mount, dentry, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC), fh, Fopen(fopen))
    finish_open(file)
    return file


def nameless(at: Place, entry: Entry) -> Dentry:
    """d_tmpfile: it goes when it is closed."""
    tree = at.dentry.sb.tree
    inode = tree.iget(entry)
    dentry = Dentry(at.dentry.sb, b"", tree.get(at.dentry), inode)
    dentry.hashed = False
    dentry.deadline = NEVER
    inode.dentries.append(dentry)
    return dentry


def open_tmpfile(root: Mount, path: bytes, flags: int, mode: int, umask: int) -> OpenFile:
    """fuse_tmpfile"""
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise error(EINVAL)
    with namei.walk(root, path) as place:
        if not place.inode.is_dir:
            raise error(ENOTDIR)
        check_writable(place.mount.readonly)
        permission(place.inode, MAY_WRITE | MAY_EXEC)
        conn = place.dentry.sb.conn
        if conn.lacks(Opcode.TMPFILE):
            raise error(EOPNOTSUPP)
        try:
            wanted = stat.S_IFREG | namei.masked(conn, mode, umask)
            return send_create(place, Opcode.TMPFILE, b"/", flags, wanted, umask)
        except OSError as problem:
            if problem.errno != ENOSYS:
                raise
            conn.remember_silent(Opcode.TMPFILE)
            raise error(EOPNOTSUPP) from None
