"""The shared directory as one guest sees it: tables, and the policy compiled into them."""

from __future__ import annotations

import importlib
import logging
from errno import EROFS
from typing import TYPE_CHECKING, NamedTuple

from vfsd.fuse.abi import Fopen, Init
from vfsd.fuse.dispatch import Dispatch
from vfsd.fuse.opcodes import OPERATIONS, Home, Opcode
from vfsd.hostfs.cache import CachePolicy, Dirty
from vfsd.hostfs.dax import ALWAYS, FILES, NEVER, DaxPolicy, find_mappable
from vfsd.hostfs.identity import IdentityPolicy
from vfsd.hostfs.lock._locks import Locks
from vfsd.hostfs.lock.fdinfo import locks_of
from vfsd.hostfs.ops.mappings import FrontEnd, Mappings, removemapping, setupmapping
from vfsd.hostfs.table._tables import Tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsd.hostfs.choices import DirectWrites

log = logging.getLogger("vfsd.fuse")

# Of a guest's descriptors, what open files may take; without some for inodes nothing can be opened.
HANDLES_SHARE = 0.875


class Policy(NamedTuple):
    """What the operator chose for a share, as far as its operations care.

    file_capabilities: the guest may store some that count on the host too. noflush: no FLUSH where
    closing a file reports nothing. parallel_writes: which open files the guest may write to past its
    cache from several threads at once. writeback: the guest keeps what is written. direct_io, noatime: its
    O_DIRECT and O_NOATIME are the host's too. mmap: shared mappings also of files that it does not cache.
    readonly: it changes nothing. zero_open: it opens and closes files without asking. dax: None without a
    window. submounts: announced to a guest that knows them. file_handles: evicted inodes come back by
    them where they work.
    """

    cache: CachePolicy
    xattr: bool
    file_capabilities: bool
    noflush: bool
    parallel_writes: DirectWrites
    writeback: bool
    direct_io: bool
    noatime: bool
    mmap: bool
    readonly: bool
    zero_open: bool
    identity: IdentityPolicy
    flock: bool
    posix_lock: bool
    submounts: bool
    file_handles: bool
    dax: DaxPolicy | None = None

    def init_flags(self) -> Init:
        """What is to be agreed in INIT because of it."""
        flags = self.identity.offered()
        if self.cache.readdirplus:
            flags |= Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO
        if self.cache.symlinks:
            flags |= Init.CACHE_SYMLINKS
        if self.writeback:
            flags |= Init.WRITEBACK_CACHE
        # A guest that does not tell us of opens must tell us of O_TRUNC.
        flags |= Init.NO_OPEN_SUPPORT if self.zero_open else Init.ATOMIC_O_TRUNC
        if self.submounts:
            flags |= Init.SUBMOUNTS
        if self.mmap:
            flags |= Init.DIRECT_IO_ALLOW_MMAP
        if self.dax is not None:
            # Also where no file is marked: a guest that does not ask for it maps them all.
            flags |= Init.HAS_INODE_DAX
        if self.flock:
            flags |= Init.FLOCK_LOCKS
        if self.posix_lock:
            flags |= Init.POSIX_LOCKS
        return flags

    def parallel_flags(self, direct: bool) -> Fopen:
        """For a file that is opened with O_DIRECT, or any file."""
        wanted = self.parallel_writes == "always" or (direct and self.parallel_writes == "direct")
        return Fopen.PARALLEL_DIRECT_WRITES if wanted else Fopen(0)


class HostFs:
    """One guest's view of a share.

    root_fd: readable descriptor of the directory, or of the one file; stays the caller's.
    locks: of all guests of the share. window: for DAX, None without.
    proc_fd: of this process's /proc/self/fd, labels_fd: of /proc, where the kernel is to give files their
    security labels; both become this object's. -1: the first is opened, the second done without.
    """

    def __init__(
        self,
        root_fd: int,
        policy: Policy,
        locks: Locks,
        window: FrontEnd | None = None,
        *,
        proc_fd: int = -1,
        labels_fd: int = -1,
    ) -> None:
        self.policy = policy
        self.tables = Tables(root_fd, policy.file_handles, proc_fd)
        cache = policy.cache
        self.tables.set_timeouts(cache.entry_s, cache.attr_s, cache.negative_s)
        open_flags = cache.open_flags | policy.parallel_flags(False)
        self.tables.set_policy(open_flags, cache.opendir_flags, policy.xattr, policy.file_capabilities)
        self.tables.set_opening(policy.parallel_flags(True), policy.direct_io, policy.noatime)
        policy.identity.compile(self.tables)
        if labels_fd >= 0:
            self.tables.set_selinux(labels_fd)
        self.mappings: Mappings | None = None
        if window is not None:
            self.mappings = Mappings(self.tables, window)
        self._dax = NEVER  # what is in force in this session
        if policy.flock or policy.posix_lock:
            self.tables.set_locks(locks, policy.flock, policy.posix_lock)
        self._locks = locks

    def start(self) -> None:
        """The threads that it needs. RuntimeError: none can be had."""
        if self.policy.flock or self.policy.posix_lock:
            self._locks.start()

    def regain_locks(self, fdinfo: Callable[[int], str]) -> None:
        """In a server whose tables are another one's that has died. OSError.

        fdinfo: of a descriptor, what /proc/self/fdinfo says.
        """
        self._locks.recover()
        for fd in self.tables.holding():
            self.tables.regain(fd, locks_of(fdinfo(fd)))

    def settle(self, flags: Init, asked: Init) -> Init:
        """What INIT agrees on, of what both sides can do and what the guest can do. With a window it may
        wait for the front end."""
        self._dax = self._choose_dax(flags)
        if not self._maps_all(flags):
            return flags
        return flags & ~Init.AUTO_INVAL_DATA | asked & Init.EXPLICIT_INVAL_DATA

    def _maps_all(self, flags: Init) -> bool:
        """Whether a guest that has agreed to these flags maps every regular file: with dax=always, or
        because all are marked for it.

        Such a guest has no cache that could be stale. Linux would drop what is mapped instead, in use or
        not (dax_disassociate_entry), on each change of the time of modification, as by its own stores.
        """
        if Init.MAP_ALIGNMENT not in flags:  # no window, or dax=never
            return False
        return Init.HAS_INODE_DAX not in flags or self._dax == ALWAYS

    def _choose_dax(self, flags: Init) -> DaxPolicy:
        """Which files are marked for this guest; what it will miss is told."""
        policy = self.policy.dax
        if policy is None or self.mappings is None or Init.MAP_ALIGNMENT not in flags:
            return NEVER
        by_guest = Init.HAS_INODE_DAX not in flags
        if not (policy.mappable or by_guest or policy == ALWAYS):
            return policy
        try:
            mappable = find_mappable(self.mappings, self.tables.proc_fd)
        except OSError as problem:
            log.warning("what the front end can map is not known: %s", problem.strerror)
            return NEVER if policy.mappable else policy
        if mappable != ALWAYS and (by_guest or not policy.mappable):
            log.warning(
                "the front end maps %s, and this guest all (%s): the others are EIO; %s, or preload the"
                " library of docs/dax.md into QEMU", FILES[mappable],
                *(("dax=always", "mount with -o dax=inode") if by_guest
                  else ("--dax-policy always", "use --dax-policy auto")),
            )  # fmt: skip
        elif mappable != ALWAYS:
            log.info("the front end maps %s; the others go by request", FILES[mappable])
        return mappable if policy.mappable else policy

    def agree(self, flags: Init) -> None:
        """What INIT has settled; no other request is under way."""
        # A close releases POSIX locks by its FLUSH alone (fuse_setlk), and locks belong to open files.
        posix_locks = Init.POSIX_LOCKS in flags
        locks = posix_locks or Init.FLOCK_LOCKS in flags
        maps_all = self._maps_all(flags)
        self.tables.agree(
            writeback=Init.WRITEBACK_CACHE in flags,
            # What is mapped in a DAX window is the host's own pages.
            dirty=Dirty.NOTHING if maps_all else self.policy.cache.dirty(flags),
            zero_open=self.policy.zero_open and Init.NO_OPEN_SUPPORT in flags and not locks,
            noflush_flags=Fopen.NOFLUSH if self.policy.noflush and not posix_locks else Fopen(0),
            submounts=Init.SUBMOUNTS in flags,
            maps_all=maps_all,
        )
        dax = self._dax
        self.tables.set_dax(dax.size_min, dax.whole, dax.writable, dax.marked)
        self.policy.identity.agree(self.tables, flags)

    def set_budget(self, descriptors: int) -> None:
        """How many descriptors this guest's inodes and open files may have. At any time."""
        self.tables.set_budget(descriptors, int(descriptors * HANDLES_SHARE))

    def install(self, dispatch: Dispatch) -> None:
        """Give every operation of the table that lives in this package to the dispatch."""
        ours = [op for op in OPERATIONS if op.module.startswith("hostfs.")]
        for module in sorted({op.module for op in ours if op.home is Home.HOT}):
            importlib.import_module(f"vfsd.{module}").install(dispatch, self.tables)
        dispatch.set_python(Opcode.SETUPMAPPING, setupmapping)
        dispatch.set_python(Opcode.REMOVEMAPPING, removemapping)
        if self.policy.readonly:
            self.tables.set_readonly()
            for op in OPERATIONS:
                if op.modifies:
                    dispatch.refuse(op.opcode, EROFS)

    def clear(self) -> None:
        """Forget all that the guest held: its session has ended."""
        if self.mappings is not None:
            self.mappings.clear()
        self.tables.clear()
