"""Superblocks, their inodes by nodeid and their trees of names (fs/fuse/inode.c, fs/dcache.c).

The sum of an inode's lookups and of the forgets sent for it is always what the daemon counts: each
accepted reply with an entry adds one, and all go back in one FORGET when the last name and the last
open file of the inode have gone (fuse_evict_inode).
"""

import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from errno import EIO, ELOOP
from os import strerror
from typing import NamedTuple

from vfsd.fuse.abi import Init
from vfsd.guest.client import objects
from vfsd.guest.client.connection import FuseMount
from vfsd.guest.client.dax import InodeDax
from vfsd.guest.client.locks import LocalLocks
from vfsd.guest.client.options import MountSettings, Steps
from vfsd.guest.client.pages import Pages
from vfsd.guest.client.replies import NEVER, STATX_CTIME, STATX_MODSIZE, STATX_MTIME, STATX_SIZE, Attr, Entry
from vfsd.guest.client.sync import SharedLock

UNUSED_DENTRIES_MAX = 1 << 17

_anonymous_devs = itertools.count(1)  # get_anon_bdev


class SubmountLookup:
    """The one lookup of a submount's root, shared by both sides of the mount (submount_lookup)."""

    def __init__(self, nodeid: int) -> None:
        self.nodeid = nodeid
        self.count = 1


class Inode:
    """One file of the host, as far as the guest knows it (struct fuse_inode)."""

    def __init__(self, sb: "Superblock", nodeid: int, generation: int, attr: Attr) -> None:
        self.sb = sb
        self.nodeid = nodeid
        self.generation = generation
        self.attr = attr
        self.size = attr.size
        self.deadline = NEVER  # i_time
        self.attr_version = 0
        self.inval_mask = 0
        self.nlookup = 0
        self.count = 1  # names, open files, and whoever works with it
        self.bad = False
        self.automount = False
        self.submount_lookup: SubmountLookup | None = None
        self.size_unstable = 0  # operations under way that change the size
        self.advise_readdirplus = False
        self.init_readdirplus = False
        self.iversion = 0
        self.dentries: list[Dentry] = []
        self.symlink: bytes | None = None
        self.dirty_times = False
        self.write_errors = 0  # of writing dirty pages, how many so far
        self.write_error = 0  # the last one's errno
        self.writable: list[int] = []  # fh of open files that can write
        self.no_security = False  # S_NOSEC: nothing to remove before a write
        self.names = SharedLock()  # of a directory: lookups share it, changes have it alone
        self.lock = threading.RLock()  # of a file: one write at a time
        self.guard = threading.Lock()  # fi->lock: sizes, versions, masks
        self.pages = Pages()
        self.listing: Listing | None = None
        self.locks = LocalLocks()
        self.dax: InodeDax | None = None  # its contents are reached through the window (S_DAX)
        self.dontcache = False  # it goes with its last user, because it should change that
        objects.born("inodes")

    @property
    def mode(self) -> int:
        return self.attr.mode

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attr.mode)

    @property
    def is_reg(self) -> bool:
        return stat.S_ISREG(self.attr.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.attr.mode)

    def check_good(self) -> None:
        if self.bad:
            raise OSError(EIO, strerror(EIO))

    def make_bad(self) -> None:
        """fuse_make_bad: nodeid now names another file on the host."""
        self.bad = True
        self.pages.clear()

    def is_other(self, generation: int, mode: int) -> bool:
        """fuse_stale_inode"""
        return self.generation != generation or stat.S_IFMT(self.mode) != stat.S_IFMT(mode)

    def expired(self, mask: int) -> bool:
        """Whether what the mask wants must be asked for again (fuse_update_get_attr)."""
        conn = self.sb.conn
        owned = STATX_MTIME | STATX_CTIME | STATX_SIZE if self.keeps_times else 0
        return bool(mask & self.inval_mask & ~owned) or self.deadline < conn.clock()

    @property
    def keeps_times(self) -> bool:
        """Size, mtime and ctime are the guest's own (fuse_get_cache_mask)."""
        return self.sb.conn.has(Init.WRITEBACK_CACHE) and self.is_reg

    def invalidate(self, mask: int = 0x7FF) -> None:
        """fuse_invalidate_attr_mask"""
        with self.guard:
            self.inval_mask |= mask

    def changed_dir(self) -> None:
        """fuse_dir_changed"""
        self.invalidate()
        self.iversion += 1

    def change_attributes(self, attr: Attr, deadline: float, asked: int) -> None:
        """Take a reply's attributes unless something newer is known (fuse_change_attributes)."""
        conn = self.sb.conn
        with self.guard:
            if self.size_unstable or (asked and self.attr_version > asked):
                return
            old_size, old_mtime = self.size, self.attr.mtime_ns
            self.attr_version = conn.next_attr_version()
            if self.keeps_times:
                attr = attr._replace(mtime=self.attr.mtime, mtimensec=self.attr.mtimensec,
                                     ctime=self.attr.ctime, ctimensec=self.attr.ctimensec)  # fmt: skip
            else:
                self.size = attr.size
            if self.mode & ~stat.S_IFMT(self.mode) != attr.mode & ~stat.S_IFMT(attr.mode):
                self.no_security = False
            mode = stat.S_IFMT(self.mode) | stat.S_IMODE(attr.mode)
            self.attr = attr._replace(mode=mode)
            self.deadline = deadline
            self.inval_mask = 0
            self.dontcache = conn.dax is not None and conn.dax.differs(self, attr.flags)
        if self.keeps_times or not self.is_reg:
            return
        if old_size != attr.size:
            self.pages.truncate(attr.size)
            if not conn.has(Init.EXPLICIT_INVAL_DATA) or conn.has(Init.AUTO_INVAL_DATA):
                self.pages.clear()
        elif conn.has(Init.AUTO_INVAL_DATA) and old_mtime != attr.mtime_ns:
            self.pages.clear()

    def grab(self) -> bool:
        """igrab: one more reference, unless the last one has gone."""
        with self.sb.tree.lock:
            if self.count == 0:
                return False
            self.count += 1
            return True

    def put(self) -> None:
        """iput"""
        self.sb.tree.iput(self)

    def grow(self, end: int) -> None:
        """A write has ended there (fuse_write_update_attr)."""
        with self.guard:
            self.attr_version = self.sb.conn.next_attr_version()
            self.size = max(self.size, end)
            self.inval_mask |= STATX_MODSIZE

    def set_size(self, size: int) -> None:
        with self.guard:
            self.attr_version = self.sb.conn.next_attr_version()
            self.size = size
            self.inval_mask |= STATX_MODSIZE
        self.pages.truncate(size)


class Listing(NamedTuple):
    """What FOPEN_CACHE_DIR lets the guest keep of a directory (fi->rdc)."""

    entries: list[tuple[bytes, int, int, int]]  # name, ino, offset, type
    mtime_ns: int
    iversion: int


class Dentry:
    """A name: of an inode, or of nothing (negative)."""

    def __init__(self, sb: "Superblock", name: bytes, parent: "Dentry | None", inode: Inode | None) -> None:
        self.sb = sb
        self.name = name
        self.parent = parent
        self.inode = inode
        self.deadline = NEVER
        self.children: dict[bytes, Dentry] = {}
        self.count = 1
        self.hashed = True
        objects.born("dentries")

    @property
    def delete_stale(self) -> bool:
        """Not kept once nobody uses it: never valid (fuse_dentry_delete), or not to be (d_mark_dontcache)."""
        stale = self.deadline == NEVER or (self.inode is not None and self.inode.dontcache)
        return stale and self.parent is not None

    def path(self) -> bytes:
        names: list[bytes] = []
        at: Dentry | None = self
        while at is not None and at.parent is not None:
            names.append(at.name)
            at = at.parent
        return b"/" + b"/".join(reversed(names))


class Tree:
    """The inodes and names of one superblock.

    `lock` is held for moments only, never over a request; forgets go out after it is released.
    """

    def __init__(self, sb: "Superblock") -> None:
        self.sb = sb
        self.lock = threading.RLock()
        self.by_nodeid: dict[int, Inode] = {}
        self.active = True  # SB_ACTIVE: inodes that go are forgotten
        self._unused: OrderedDict[Dentry, None] = OrderedDict()
        self._forgets: list[tuple[Inode, int, int]] = []

    # ---- inodes

    def iget(self, entry: Entry) -> Inode:
        """The inode of a reply that counts one lookup, with a reference (fuse_iget)."""
        with self.lock:
            if entry.submount:
                return self._automount(entry)
            inode = self.by_nodeid.get(entry.nodeid)
            if inode is not None and inode.is_other(entry.generation, entry.attr.mode):
                inode.make_bad()
                del self.by_nodeid[entry.nodeid]
                inode = None
            if inode is None:
                inode = Inode(self.sb, entry.nodeid, entry.generation, entry.attr)
                if self.sb.conn.dax is not None:
                    self.sb.conn.dax.enable(inode, entry.attr.flags)
                self.by_nodeid[entry.nodeid] = inode
            else:
                inode.count += 1
            inode.nlookup += 1
        inode.change_attributes(entry.attr, entry.attr_deadline, entry.asked)
        return inode

    def _automount(self, entry: Entry) -> Inode:
        """Its nodeid is that of another file system's root: not found by nodeid here."""
        inode = Inode(self.sb, entry.nodeid, entry.generation, entry.attr)
        inode.automount = True
        inode.submount_lookup = SubmountLookup(entry.nodeid)
        inode.change_attributes(entry.attr, entry.attr_deadline, entry.asked)
        return inode

    def iput(self, inode: Inode) -> None:
        with self.lock:
            inode.count -= 1
            if inode.count == 0:
                self._evict(inode)
        self.send_forgets()

    def _evict(self, inode: Inode) -> None:
        """fuse_evict_inode"""
        if self.by_nodeid.get(inode.nodeid) is inode:
            del self.by_nodeid[inode.nodeid]
        self.sb.conn.pool.gone(inode.pages)
        lookup, inode.submount_lookup = inode.submount_lookup, None
        if self.active:
            if inode.nlookup or inode.dax is not None:
                self._forgets.append((inode, inode.nodeid, inode.nlookup))
            if lookup is not None:
                lookup.count -= 1
                if lookup.count == 0:
                    self._forgets.append((inode, lookup.nodeid, 1))
        objects.gone("inodes")

    def send_forgets(self) -> None:
        while self._forgets:
            with self.lock:
                forgets, self._forgets = self._forgets, []
            for inode, nodeid, nlookup in forgets:
                if inode.dax is not None and self.sb.conn.dax is not None:
                    self.sb.conn.dax.evict(inode)
                if nlookup:
                    self.sb.conn.forget(nodeid, nlookup)

    # ---- names

    def make_root(self, inode: Inode) -> Dentry:
        """d_make_root; takes over the caller's reference to the inode."""
        root = Dentry(self.sb, b"", None, inode)
        root.deadline = float("inf")
        inode.dentries.append(root)
        return root

    def find(self, parent: Dentry, name: bytes) -> Dentry | None:
        """d_lookup: with a reference."""
        with self.lock:
            dentry = parent.children.get(name)
            return None if dentry is None else self._get(dentry)

    def get(self, dentry: Dentry) -> Dentry:
        with self.lock:
            return self._get(dentry)

    def _get(self, dentry: Dentry) -> Dentry:
        if dentry.count == 0:
            self._unused.pop(dentry, None)
        dentry.count += 1
        return dentry

    def put(self, dentry: Dentry) -> None:
        """dput"""
        with self.lock:
            self._put(dentry)
            while len(self._unused) > UNUSED_DENTRIES_MAX:
                self._kill(self._unused.popitem(last=False)[0])
        self.send_forgets()

    def _put(self, dentry: Dentry) -> None:
        dentry.count -= 1
        if dentry.count == 0:
            if not dentry.hashed or dentry.delete_stale:
                self._kill(dentry)
            else:
                self._unused[dentry] = None

    def _kill(self, dentry: Dentry) -> None:
        """An unused name goes, with its hold on its inode and on its parent."""
        self._unhash(dentry)
        inode, parent = dentry.inode, dentry.parent
        dentry.inode = None
        objects.gone("dentries")
        if inode is not None:
            inode.dentries.remove(dentry)
            inode.count -= 1
            if inode.count == 0:
                self._evict(inode)
        if parent is not None:
            self._put(parent)

    def _unhash(self, dentry: Dentry) -> None:
        if dentry.hashed and dentry.parent is not None:
            if dentry.parent.children.get(dentry.name) is dentry:
                del dentry.parent.children[dentry.name]
            dentry.hashed = False

    def splice(self, parent: Dentry, name: bytes, inode: Inode | None, deadline: float) -> Dentry:
        """Give the inode that name, or say that it names nothing; takes over the caller's reference to it.

        Of a name that another thread gave meanwhile, that one's dentry is returned. A directory
        that is known by another name was renamed on the host: its dentry moves (d_splice_alias).
        """
        with self.lock:
            dentry = parent.children.get(name)
            if dentry is not None and dentry.inode is inode:
                if inode is not None:
                    inode.count -= 1  # the dentry has its own
                dentry.deadline = deadline
                return self._get(dentry)
            if dentry is not None:
                self._unhash(dentry)
                if dentry.count == 0:
                    self._unused.pop(dentry, None)
                    self._kill(dentry)
            alias = self._alias(inode)
            if alias is not None and inode is not None:
                self._check_no_loop(alias, parent, inode)
                inode.count -= 1
                self._move(alias, parent, name)
                alias.deadline = deadline
                return self._get(alias)
            dentry = Dentry(self.sb, name, self._get(parent), inode)
            dentry.deadline = deadline
            parent.children[name] = dentry
            if inode is not None:
                inode.dentries.append(dentry)
            return dentry

    @staticmethod
    def _alias(inode: Inode | None) -> Dentry | None:
        if inode is None or not inode.is_dir or not inode.dentries:
            return None
        return inode.dentries[0]

    def _check_no_loop(self, alias: Dentry, parent: Dentry, inode: Inode) -> None:
        at: Dentry | None = parent
        while at is not None:
            if at is alias:
                self.iput(inode)
                raise OSError(ELOOP, strerror(ELOOP))
            at = at.parent

    def _move(self, dentry: Dentry, parent: Dentry, name: bytes) -> None:
        self._unhash(dentry)
        old = dentry.parent
        dentry.parent, dentry.name, dentry.hashed = self._get(parent), name, True
        parent.children[name] = dentry
        if old is not None:
            self._put(old)

    def rename(self, dentry: Dentry, target: Dentry, exchange: bool) -> None:
        """d_move, d_exchange: dentry takes target's place."""
        with self.lock:
            old_parent, old_name = dentry.parent, dentry.name
            parent, name = target.parent, target.name
            assert old_parent is not None and parent is not None
            self._unhash(target)
            if exchange:
                self._unhash(dentry)
                self._get(old_parent)
            self._move(dentry, parent, name)
            if exchange:
                self._move(target, old_parent, old_name)
                self._put(old_parent)
        self.send_forgets()

    def drop(self, dentry: Dentry) -> None:
        """d_drop: the name is looked up anew by the next who asks; who holds it keeps it."""
        with self.lock:
            self._unhash(dentry)

    def invalidate(self, dentry: Dentry) -> None:
        """d_invalidate: the name and all unused names below are dropped."""
        with self.lock:
            self._unhash(dentry)
            self._prune(dentry.children.values())
        self.send_forgets()

    def _prune(self, dentries: Iterable[Dentry]) -> None:
        for dentry in list(dentries):
            self._prune(dentry.children.values())
            if dentry.count == 0:
                self._unused.pop(dentry, None)
                self._kill(dentry)

    def shrink(self) -> int:
        """Drop every name that nobody uses, as memory pressure would; how many."""
        dropped = 0
        with self.lock:
            while self._unused:
                self._kill(self._unused.popitem(last=False)[0])
                dropped += 1
        self.send_forgets()
        return dropped

    def evict_all(self, root: Dentry) -> list[Dentry]:
        """The tree of a superblock that goes (shrink_dcache_for_umount); dentries that were still held."""
        self.shrink()
        with self.lock:
            self._put(root)
            self._unused.pop(root, None)
            held = [root] if root.count else []
            if not held:
                self._kill(root)
        self.send_forgets()
        return held


class Superblock:
    """A mounted file system: the root of a share, or a submount of it."""

    def __init__(self, fm: FuseMount, settings: MountSettings, parent: "Superblock | None" = None) -> None:
        self.conn = fm.conn
        self.mount = fm
        self.settings = settings
        self.parent = parent
        self.options = settings.options
        self.dev = os.makedev(0, next(_anonymous_devs))
        self.tree = Tree(self)
        self.root: Dentry | None = None  # s_root
        self.active = 1  # s_active: mount points
        self.mounts: list[FuseMount] = []  # of the connection; the root superblock's list is the one
        if parent is not None:
            self.mounts = parent.mounts
        objects.born("superblocks")

    def set_root(self, attr: Attr, nodeid: int, steps: Steps) -> Inode:
        steps("root_inode")
        inode = Inode(self, nodeid, 0, attr)
        self.tree.by_nodeid[nodeid] = inode
        try:
            steps("root_dentry")
            self.root = self.tree.make_root(inode)
        except BaseException:
            self.tree.iput(inode)
            raise
        self.mounts.append(self.mount)
        return inode
