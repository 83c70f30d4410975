"""Names: looking them up, walking paths, and changing directories (fs/fuse/dir.c, fs/namei.c)."""

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import (
    EACCES,
    EBUSY,
    EEXIST,
    EINTR,
    EINVAL,
    EIO,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTDIR,
    ENOTEMPTY,
    EPERM,
    EXDEV,
)  # fmt: skip
from os import strerror

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client.attributes import (
    MAY_EXEC,
    MAY_WRITE,
    check_writable,
    permission,
    update_attributes,
)  # fmt: skip
from vfsd.guest.client.connection import Connection, current, revalidates
from vfsd.guest.client.inodes import Dentry, Inode
from vfsd.guest.client.mountpoints import Mount
from vfsd.guest.client.replies import NEVER, STATX_CTIME, STATX_NLINK, Entry

MAXSYMLINKS = 40
READLINK_MAX = 4095  # PATH_MAX - 1
NO_SECCTX = (8).to_bytes(4, "little") + bytes(4)  # secctx_header of no security context

LOOKUP_EXCL, LOOKUP_RENAME_TARGET = 1, 2  # the daemon is asked even if the name is known


def error(number: int) -> OSError:
    return OSError(number, strerror(number))


class Place:
    """A dentry in a mount, held until `put`; a context manager."""

    def __init__(self, mount: Mount, dentry: Dentry) -> None:
        self.mount = mount
        self.dentry = dentry

    @property
    def inode(self) -> Inode:
        assert self.dentry.inode is not None
        return self.dentry.inode

    def put(self) -> None:
        self.dentry.sb.tree.put(self.dentry)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *exc: object) -> None:
        self.put()


# ---- one name


def lookup(parent: Dentry, name: bytes, flags: int = 0) -> Dentry:
    """The dentry of a name, perhaps negative, with a reference."""
    found = lookup_known(parent, name, flags)
    if found is not None:
        return found
    assert parent.inode is not None
    names = parent.inode.names
    parallel = parent.sb.conn.has(Init.PARALLEL_DIROPS)
    with names.shared() if parallel else names.alone():
        return lookup_new(parent, name)


def lookup_locked(parent: Dentry, name: bytes, flags: int = 0) -> Dentry:
    """The same by who has the directory's names alone."""
    return lookup_known(parent, name, flags) or lookup_new(parent, name)


def lookup_known(parent: Dentry, name: bytes, flags: int) -> Dentry | None:
    if len(name) > parent.sb.conn.name_max:
        raise error(ENAMETOOLONG)
    tree = parent.sb.tree
    dentry = tree.find(parent, name)
    if dentry is None:
        return None
    try:
        if revalidate(parent, dentry, flags):
            return dentry
        tree.invalidate(dentry)
    except BaseException:
        tree.put(dentry)
        raise
    tree.put(dentry)
    return None


def revalidate(parent: Dentry, dentry: Dentry, flags: int) -> bool:
    """fuse_dentry_revalidate"""
    conn, inode = dentry.sb.conn, dentry.inode
    assert parent.inode is not None
    if inode is not None and inode.bad:
        return False
    if dentry.deadline >= conn.clock() and not (flags or revalidates()):
        conn.hit("names" if inode is not None else "negative names")
        if inode is not None and inode.init_readdirplus:
            inode.init_readdirplus = False
            parent.inode.advise_readdirplus = True
        return True
    if inode is None:
        return False
    asked = conn.attr_version
    try:
        out, _ = conn.call(Opcode.LOOKUP, parent.inode.nodeid, dentry.name + b"\0", out=abi.ENTRY_OUT_SIZE)
    except OSError as problem:
        if problem.errno in (ENOMEM, EINTR):
            raise
        return False
    entry = Entry.parse(conn, out, asked)
    if entry.nodeid == 0:
        return False
    if entry.nodeid != inode.nodeid or inode.automount != entry.submount:
        conn.forget(entry.nodeid, 1)
        return False
    with dentry.sb.tree.lock:
        inode.nlookup += 1
    if not entry.attr.valid or inode.is_other(entry.generation, entry.attr.mode):
        return False
    inode.change_attributes(entry.attr, entry.attr_deadline, asked)
    dentry.deadline = entry.entry_deadline
    return True


def lookup_new(parent: Dentry, name: bytes) -> Dentry:
    """fuse_lookup"""
    conn, tree, directory = parent.sb.conn, parent.sb.tree, parent.inode
    assert directory is not None
    directory.check_good()
    asked = conn.attr_version
    try:
        out, _ = conn.call(Opcode.LOOKUP, directory.nodeid, name + b"\0", out=abi.ENTRY_OUT_SIZE)
    except OSError as problem:
        if problem.errno != ENOENT:
            raise
        return tree.splice(parent, name, None, NEVER)
    entry = Entry.parse(conn, out, asked)
    if entry.nodeid == 0:
        return tree.splice(parent, name, None, entry.entry_deadline)
    if not entry.attr.valid or entry.nodeid == abi.ROOT_ID:
        raise error(EIO)
    dentry = tree.splice(parent, name, tree.iget(entry), entry.entry_deadline)
    directory.advise_readdirplus = True
    return dentry


def readlink(inode: Inode) -> bytes:
    """fuse_get_link; kept with the inode if the daemon says that symlinks may be (CACHE_SYMLINKS)."""
    inode.check_good()
    if inode.symlink is not None:
        return inode.symlink
    buffer = bytearray(READLINK_MAX)
    _, length = inode.sb.conn.call(Opcode.READLINK, inode.nodeid, into=buffer, argvar=True)
    target = bytes(buffer[:length])
    if b"\0" in target:
        target = target[: target.index(b"\0")]
    if inode.sb.conn.has(Init.CACHE_SYMLINKS):
        inode.symlink = target
    return target


# ---- paths


def split(path: bytes) -> list[bytes]:
    """Its names, an empty one last if a slash at the end says that a directory is meant."""
    names = [name for name in path.split(b"/") if name]
    if path.endswith(b"/") and names:
        names.append(b"")
    return names


def walk(root: Mount, path: bytes, *, follow: bool = True, automount: bool = True) -> Place:
    """follow: a symlink at the end. automount: mount a submount at the end (not for stat(2))."""
    if not path:
        raise error(ENOENT)
    return walk_names(root, split(path), follow, automount)


def walk_names(root: Mount, names: list[bytes], follow: bool, automount: bool) -> Place:
    """path_lookupat"""
    todo = deque(names)
    links = 0
    at = Place(root, root.sb.tree.get(root.root))
    while todo:
        name = todo.popleft()
        try:
            target = step(at, name, bool(todo) or follow, bool(todo) or automount)
            if isinstance(target, bytes):
                links += 1
                if links > MAXSYMLINKS:
                    raise error(ELOOP)
                if not target:
                    raise error(ENOENT)
                todo.extendleft(reversed(split(target)))
                if not target.startswith(b"/"):
                    continue
                target = Place(root, root.sb.tree.get(root.root))
        except BaseException:
            at.put()
            raise
        at.put()
        at = target
    return at


def step(at: Place, name: bytes, follow: bool, automount: bool) -> Place | bytes:
    """One name further: a new place, or the target of a symlink to follow."""
    if not at.inode.is_dir:
        raise error(ENOTDIR)
    if name:
        permission(at.inode, MAY_EXEC)
    if name in (b"", b"."):
        return Place(at.mount, at.dentry.sb.tree.get(at.dentry))
    if name == b"..":
        return step_up(at)
    dentry = lookup(at.dentry, name)
    place = Place(at.mount, dentry)
    try:
        if dentry.inode is None:
            raise error(ENOENT)
        if follow and dentry.inode.is_link:
            target = readlink(dentry.inode)
            place.put()
            return target
        return cross(place, automount)
    except BaseException:
        place.put()
        raise


def step_up(at: Place) -> Place:
    mount = at.mount
    dentry: Dentry = at.dentry
    while dentry is mount.root and mount.parent is not None:
        assert mount.place is not None
        dentry = mount.place
        mount = mount.parent
    above = dentry if dentry.parent is None else dentry.parent
    return Place(mount, dentry.sb.tree.get(above))


def cross(place: Place, automount: bool) -> Place:
    """Onto what is mounted there; takes over the place."""
    mount = place.mount.covered(place.dentry)
    if mount is None and automount and place.inode.automount:
        mount = place.mount.automount(place.dentry)
    if mount is None:
        return place
    place.put()
    return Place(mount, mount.sb.tree.get(mount.root))


@contextmanager
def parent_of(root: Mount, path: bytes) -> Iterator[tuple[Place, bytes, bool]]:
    """The directory, the last name, and whether a slash follows it (filename_parentat)."""
    names = [name for name in path.split(b"/") if name]
    if not path:
        raise error(ENOENT)
    if not names:
        raise error(EBUSY if path.startswith(b"/") else ENOENT)
    with walk_names(root, names[:-1], True, True) as at:
        if not at.inode.is_dir:
            raise error(ENOTDIR)
        permission(at.inode, MAY_EXEC)
        yield at, names[-1], path.endswith(b"/")


# ---- changes of a directory


def creation_ext(conn: Connection, directory: Inode) -> bytes:
    """get_create_ext: no security context, and the caller's group that the directory has."""
    ext = NO_SECCTX if conn.has(Init.SECURITY_CTX) else b""
    caller, gid = current(), directory.attr.gid
    if conn.has(Init.CREATE_SUPP_GROUP) and gid != caller.gid and caller.in_group(gid):
        size = abi.EXT_HEADER.size + abi.SUPP_GROUPS_ONE.size
        ext += abi.EXT_HEADER.pack(size, abi.EXT_GROUPS) + abi.SUPP_GROUPS_ONE.pack(1, gid)
    return ext


def masked(conn: Connection, mode: int, umask: int) -> int:
    return mode if conn.has(Init.DONT_MASK) else mode & ~umask


def create(
    root: Mount, path: bytes, opcode: Opcode, head: bytes, kind: int, tail: bytes = b"",
) -> None:  # fmt: skip
    """MKNOD, MKDIR, SYMLINK: head, name and tail are the arguments."""
    with parent_of(root, path) as (at, name, slash):
        if name in (b".", b".."):
            raise error(EEXIST)
        with at.inode.names.alone():
            check_vacant(at, name, slash and kind != stat.S_IFDIR)
            args = head + name + b"\0" + tail
            create_entry(at.dentry, name, opcode, args, kind)


def check_vacant(at: Place, name: bytes, slash: bool = False) -> None:
    """filename_create: the daemon is always asked."""
    dentry = lookup_locked(at.dentry, name, LOOKUP_EXCL)
    exists = dentry.inode is not None
    dentry.sb.tree.put(dentry)
    if exists:
        raise error(EEXIST)
    if slash:
        raise error(ENOENT)
    check_writable(at.mount.readonly)
    permission(at.inode, MAY_WRITE | MAY_EXEC)


def create_entry(
    parent: Dentry, name: bytes, opcode: Opcode, args: bytes, kind: int, ext: bytes | None = None
) -> None:
    """create_new_entry"""
    conn, directory = parent.sb.conn, parent.inode
    assert directory is not None
    asked = conn.attr_version
    extension = creation_ext(conn, directory) if ext is None else ext
    out, _ = conn.call(opcode, directory.nodeid, args, out=abi.ENTRY_OUT_SIZE, ext=extension)
    dentry = new_entry(parent, name, Entry.parse(conn, out, asked), kind)
    parent.sb.tree.put(dentry)


def new_entry(parent: Dentry, name: bytes, entry: Entry, kind: int) -> Dentry:
    """What a creation made, as a dentry with a reference."""
    tree = parent.sb.tree
    assert parent.inode is not None
    if entry.nodeid in (0, abi.ROOT_ID) or not entry.attr.valid:
        raise error(EIO)
    if stat.S_IFMT(entry.attr.mode) != kind:
        parent.sb.conn.forget(entry.nodeid, 1)
        raise error(EIO)
    dentry = tree.splice(parent, name, tree.iget(entry), entry.entry_deadline)
    parent.inode.changed_dir()
    return dentry


def link(root: Mount, old: bytes, new: bytes) -> None:
    """fuse_link. A symlink is not followed, as with link(2)."""
    with walk(root, old, follow=False) as source:
        link_open(root, source, new)


def link_open(root: Mount, source: Place, new: bytes) -> None:
    """vfs_link; what was opened by O_TMPFILE has no name yet."""
    with parent_of(root, new) as (at, name, slash):
        if name in (b".", b".."):
            raise error(EEXIST)
        with at.inode.names.alone():
            check_vacant(at, name, slash)
            if source.mount is not at.mount:
                raise error(EXDEV)
            if source.inode.is_dir or at.dentry.sb.conn.lacks(Opcode.LINK):
                raise error(EPERM)
            args = abi.LINK_IN.pack(source.inode.nodeid) + name + b"\0"
            try:
                create_entry(at.dentry, name, Opcode.LINK, args, stat.S_IFMT(source.inode.mode), b"")
            except OSError as problem:
                if problem.errno != ENOSYS:
                    raise
                at.dentry.sb.conn.remember_silent(Opcode.LINK)
                raise error(EPERM) from problem
        source.inode.invalidate(STATX_NLINK | STATX_CTIME)


def check_sticky(directory: Inode, inode: Inode) -> None:
    """may_delete: in a sticky directory only owners remove."""
    uid = current().uid
    if directory.mode & stat.S_ISVTX and uid not in (0, inode.attr.uid, directory.attr.uid):
        raise error(EPERM)


def remove(root: Mount, path: bytes, *, directory: bool) -> None:
    """UNLINK, RMDIR"""
    with parent_of(root, path) as (at, name, slash):
        if name in (b".", b".."):
            raise error((EINVAL if name == b"." else ENOTEMPTY) if directory else EISDIR)
        check_writable(at.mount.readonly)
        with at.inode.names.alone():
            dentry = lookup_locked(at.dentry, name)
            try:
                inode = dentry.inode
                if inode is None:
                    raise error(ENOENT)
                if slash and not directory:
                    raise error(EISDIR if inode.is_dir else ENOTDIR)
                permission(at.inode, MAY_WRITE | MAY_EXEC)
                check_sticky(at.inode, inode)
                if directory != inode.is_dir:
                    raise error(ENOTDIR if directory else EISDIR)
                if at.mount.covered(dentry) is not None:
                    raise error(EBUSY)
                opcode = Opcode.RMDIR if directory else Opcode.UNLINK
                at.dentry.sb.conn.call(opcode, at.inode.nodeid, name + b"\0")
                at.inode.changed_dir()
                entry_unlinked(dentry)
            finally:
                dentry.sb.tree.put(dentry)


def entry_unlinked(dentry: Dentry) -> None:
    """fuse_entry_unlinked: the name is nobody's; the inode stays while it is open."""
    inode = dentry.inode
    if inode is not None:
        with inode.guard:
            inode.attr_version = inode.sb.conn.next_attr_version()
            nlink = 0 if inode.is_dir else max(inode.attr.nlink - 1, 0)
            inode.attr = inode.attr._replace(nlink=nlink)
            inode.inval_mask |= STATX_CTIME | STATX_NLINK
    dentry.deadline = NEVER
    dentry.sb.tree.invalidate(dentry)


def rename(root: Mount, old: bytes, new: bytes, flags: int = 0) -> None:
    """RENAME, and RENAME2 if there are flags (fuse_rename2)."""
    with ExitStack() as stack:
        at, name, old_slash = stack.enter_context(parent_of(root, old))
        to, new_name, new_slash = stack.enter_context(parent_of(root, new))
        if at.mount is not to.mount:
            raise error(EXDEV)
        if {name, new_name} & {b".", b".."}:
            raise error(EBUSY)
        check_writable(at.mount.readonly)
        for directory in sorted({at.inode, to.inode}, key=id):
            stack.enter_context(directory.names.alone())
        tree = at.dentry.sb.tree
        dentry = lookup_locked(at.dentry, name)
        stack.callback(tree.put, dentry)
        excl = LOOKUP_EXCL if flags & abi.Rename.NOREPLACE else 0
        target = lookup_locked(to.dentry, new_name, LOOKUP_RENAME_TARGET | excl)
        stack.callback(tree.put, target)
        if dentry.inode is None:
            raise error(ENOENT)
        if flags & abi.Rename.NOREPLACE and target.inode is not None:
            raise error(EEXIST)
        if flags & abi.Rename.EXCHANGE and target.inode is None:
            raise error(ENOENT)
        if not dentry.inode.is_dir and (old_slash or (new_slash and not flags & abi.Rename.EXCHANGE)):
            raise error(ENOTDIR)
        if is_below(to.dentry, dentry):
            raise error(EINVAL)
        if is_below(at.dentry, target):
            raise error(ENOTEMPTY if not flags & abi.Rename.EXCHANGE else EINVAL)
        if dentry.inode is target.inode:
            return
        check_rename(at, to, dentry, target, flags)
        send_rename(at, to, dentry, target, flags)


def check_rename(at: Place, to: Place, dentry: Dentry, target: Dentry, flags: int) -> None:
    """vfs_rename"""
    assert dentry.inode is not None
    permission(at.inode, MAY_WRITE | MAY_EXEC)
    check_sticky(at.inode, dentry.inode)
    permission(to.inode, MAY_WRITE | MAY_EXEC)
    if target.inode is not None:
        check_sticky(to.inode, target.inode)
        if not flags & abi.Rename.EXCHANGE and dentry.inode.is_dir != target.inode.is_dir:
            raise error(ENOTDIR if dentry.inode.is_dir else EISDIR)
    if at.inode is not to.inode:
        for moved in (dentry.inode, target.inode if flags & abi.Rename.EXCHANGE else None):
            if moved is not None and moved.is_dir:
                permission(moved, MAY_WRITE)  # for its ".."
    if at.mount.covered(dentry) is not None or at.mount.covered(target) is not None:
        raise error(EBUSY)


def is_below(dentry: Dentry, above: Dentry) -> bool:
    at: Dentry | None = dentry
    while at is not None:
        if at is above:
            return True
        at = at.parent
    return False


def send_rename(at: Place, to: Place, dentry: Dentry, target: Dentry, flags: int) -> None:
    """fuse_rename_common, and d_move"""
    conn = dentry.sb.conn
    names = dentry.name + b"\0" + target.name + b"\0"
    if flags:
        args = abi.RENAME2_IN.pack(to.inode.nodeid, flags, 0) + names
        conn.try_call(Opcode.RENAME2, at.inode.nodeid, args, instead=EINVAL)
    else:
        conn.call(Opcode.RENAME, at.inode.nodeid, abi.RENAME_IN.pack(to.inode.nodeid) + names)
    at.inode.changed_dir()
    to.inode.changed_dir()
    exchange = bool(flags & abi.Rename.EXCHANGE)
    for inode in (dentry.inode, target.inode if exchange else None):
        if inode is not None:
            inode.invalidate(STATX_CTIME)
    replaced = target.inode is not None and not exchange
    dentry.sb.tree.rename(dentry, target, exchange)
    if replaced:
        entry_unlinked(target)
    if flags & abi.Rename.WHITEOUT:
        dentry.sb.tree.drop(dentry)


def access(inode: Inode, mode: int, readonly: bool) -> bool:
    """faccessat(2); with default_permissions the daemon is not asked."""
    update_attributes(inode, abi.STATX_BASIC)
    if mode & os.W_OK and readonly and (inode.is_reg or inode.is_dir or inode.is_link):
        return False
    if not mode:
        return True
    try:
        permission(inode, mode & 7)
    except OSError as problem:
        if problem.errno != EACCES:
            raise
        return False
    return True


