"""The ranges of the DAX window: which file has which, and how one gets another (fs/fuse/dax.c).

Locks, in order: `Inode.lock` (with `InodeDax.readers`, the i_rwsem), `InodeDax.invalidate` (the
invalidate_lock), `InodeDax.sem`. The table is Linux's interval tree, busy list and free list in one;
a look into it and the reference taken there are one step, so that only its changes need `sem`.

Unlike page tables of a kernel a view (`daxfile.mmap`) can't be taken away from who has it: its ranges
stay busy. When views hold every range there is nothing to wait for, and reads and writes go by request.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import ENOMEM, ENOTCONN
from os import strerror
from queue import SimpleQueue
from typing import Any, Protocol

from vfsd._dax import Window
from vfsd.fuse import abi
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.client.options import Dax as Mode
from vfsd.guest.client.sync import SharedLock
from vfsd.guest.driver._window import WindowMemory

log = logging.getLogger("vfsd.guest")

RANGE = abi.DAX_RANGE
RANGE_SHIFT = RANGE.bit_length() - 1
RECLAIM_CHUNK = 10  # FUSE_DAX_RECLAIM_CHUNK
RECLAIM_PERCENT = 20  # FUSE_DAX_RECLAIM_THRESHOLD
WAIT_WARN_S = 10.0


class InodeDax:
    """What a file with DAX has (struct fuse_inode_dax). key: of it in the table, never used again."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.readers = SharedLock()
        self.invalidate = SharedLock()
        self.sem = threading.Lock()


class DaxFile(Protocol):
    """What the window must know of an inode."""

    dax: InodeDax | None

    @property
    def nodeid(self) -> int: ...
    @property
    def is_reg(self) -> bool: ...
    def grab(self) -> bool:
        """One more reference; False if the inode is on its way out."""

    def put(self) -> None:
        """Give that reference back."""


class Requests(Protocol):
    """What the window must know of a connection."""

    @property
    def connected(self) -> bool: ...
    def has(self, flag: abi.Init) -> bool: ...
    def call(self, opcode: Opcode, nodeid: int, args: bytes) -> tuple[bytes, int]: ...


@contextmanager
def layout_alone(inode: DaxFile) -> Iterator[None]:
    """Nobody copies from or to the file, maps it or takes its ranges (fuse_dax_break_layouts).

    By who has `inode.lock`. Views stay: a page of theirs that is cut off reads as zeroes."""
    if inode.dax is None:
        yield
    else:
        with inode.dax.readers.alone(), inode.dax.invalidate.alone():
            yield


class Dax:
    """The window of one connection (struct fuse_conn_dax)."""

    def __init__(self, conn: Requests, memory: WindowMemory, mode: Mode | None) -> None:
        self.conn = conn
        self.memory = memory
        self.mode = mode
        self.table = Window(memory.size & -RANGE, RANGE)
        # free, stolen, waited: how ranges were got (A, B, C); reclaimed, upgraded, faults, direct
        self.counts: Counter[str] = Counter()
        self.background = True  # reclaim before the last range is gone
        self.threshold = max(self.table.n_ranges * RECLAIM_PERCENT // 100, 1)
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._waiting: dict[int, float] = {}  # since when, by thread
        self._held: Counter[tuple[int, int]] = Counter()  # key and start of ranges that views have
        self._inodes: dict[int, DaxFile] = {}
        self._keys = 0
        self._asked = False
        self._closed = False
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._worker_lock = threading.Lock()

    # ---- which files

    def enable(self, inode: DaxFile, attr_flags: int) -> None:
        """fuse_dax_inode_init: once, when the inode is made."""
        if inode.is_reg and self._should(attr_flags):
            with self._lock:
                self._keys += 1
                inode.dax = InodeDax(self._keys)
                self._inodes[self._keys] = inode

    def _should(self, attr_flags: int) -> bool:
        """fuse_should_enable_dax"""
        if self.mode == "always":
            return True
        return self.conn.has(abi.Init.HAS_INODE_DAX) and bool(attr_flags & abi.ATTR_DAX)

    def differs(self, inode: DaxFile, attr_flags: int) -> bool:
        """Whether the daemon wants it otherwise by now: not before it is looked up anew
        (fuse_dax_dontcache)."""
        return (
            inode.is_reg and self.mode != "always"
            and (inode.dax is not None) != bool(attr_flags & abi.ATTR_DAX)
        )  # fmt: skip

    # ---- a range of a file, busy until unpin

    def pin(self, inode: DaxFile, position: int, write: bool, *, fault: bool = False) -> int | None:
        """The moffset of the range that has that place of the file; mapped, and writable, if it was not.

        None: no range can be had. For a fault that is when none is free: it has locks that reclaim
        needs, and waits without them (`wait_free`). fuse_iomap_begin; OSError from the daemon.
        """
        dax = inode.dax
        assert dax is not None
        start = position & -RANGE
        with dax.sem:
            moffset = self._pin_mapped(inode, dax, start, write)
        if moffset is not None:
            return moffset
        moffset = self._take_free(False) if fault else self._claim(inode, dax)
        if moffset is None:
            return None
        with dax.sem:
            other = None
            try:
                other = self._pin_mapped(inode, dax, start, write)
                if other is None:
                    self._setup(inode, start, moffset, write)
                    self.table.map(moffset, RANGE, dax.key, start, write)
                    self.table.get(moffset)
                    return moffset
            except BaseException:
                self._give_back(moffset)
                raise
            self._give_back(moffset)  # somebody was faster
            return other

    def _pin_mapped(self, inode: DaxFile, dax: InodeDax, start: int, write: bool) -> int | None:
        moffset = self.table.find(dax.key, start)
        if moffset is None:
            return None
        mapping = self.table.at(moffset)
        if write and mapping is not None and not mapping.writable:
            self._setup(inode, start, moffset, True)  # fuse_upgrade_dax_mapping
            self.table.set_writable(moffset)
            self.count("upgraded")
        self.table.get(moffset)
        return moffset

    def unpin(self, moffset: int) -> None:
        self.table.put(moffset)
        self.used()

    def used(self) -> None:
        """A range has just become idle: who waits for one may have it."""
        if self._waiting:
            self._ask_worker()

    def _setup(self, inode: DaxFile, start: int, moffset: int, write: bool) -> None:
        flags = abi.SETUPMAPPING_READ | (abi.SETUPMAPPING_WRITE if write else 0)
        args = abi.SETUPMAPPING_IN.pack(abi.SETUPMAPPING_FH, start, RANGE, flags, moffset)
        self.conn.call(Opcode.SETUPMAPPING, inode.nodeid, args)

    def _remove(self, inode: DaxFile, moffsets: Sequence[int]) -> None:
        """Errors are only told, as Linux does."""
        for at in range(0, len(moffsets), abi.REMOVEMAPPING_MAX):
            part = moffsets[at : at + abi.REMOVEMAPPING_MAX]
            ones = b"".join(abi.REMOVEMAPPING_ONE.pack(moffset, RANGE) for moffset in part)
            try:
                args = abi.REMOVEMAPPING_IN.pack(len(part)) + ones
                self.conn.call(Opcode.REMOVEMAPPING, inode.nodeid, args)
            except OSError as problem:
                log.info("REMOVEMAPPING: %s", problem.strerror)

    # ---- getting one

    def _claim(self, inode: DaxFile, dax: InodeDax) -> int | None:
        """alloc_dax_mapping_reclaim: A a free one, B one of the same inode's, C wait for one."""
        waited = False
        while True:
            moffset = self._take_free(waited)
            if moffset is None:
                moffset = self._steal(inode, dax)
            if moffset is not None:
                return moffset
            if not self.wait_free():
                return None
            waited = True

    def _take_free(self, waited: bool) -> int | None:
        moffset = self.table.alloc()
        if self.background and self.table.n_free < self.threshold:
            self._ask_worker()
        if moffset is not None:
            self.count("waited" if waited else "free")
        return moffset

    def _steal(self, inode: DaxFile, dax: InodeDax) -> int | None:
        """inode_inline_reclaim_one_dmap"""
        if self.table.of(dax.key) == []:
            return None
        with dax.invalidate.alone(), dax.sem:
            try:
                was = self.table.steal(dax.key)
            except OSError:
                return None  # the last one has gone meanwhile
            if was is None:
                return None
            self._remove(inode, [was.moffset])
        self.count("stolen")
        return was.moffset

    def wait_free(self, *, holds: bool = False) -> bool:
        """Wait until a range is free. False: views hold all of them. OSError ENOTCONN.

        holds: for one that `hold` has promised, so that it will be."""
        me, since = threading.get_ident(), time.monotonic()
        with self._freed:
            self._waiting[me] = since
            try:
                while self.table.n_free == 0:
                    if self._closed or not self.conn.connected:
                        raise OSError(ENOTCONN, strerror(ENOTCONN))
                    if not holds and len(self._held) >= self.table.n_ranges:
                        return False
                    self._ask_worker()
                    if not self._freed.wait(WAIT_WARN_S):
                        log.warning("waiting for a DAX range for %.0f s", time.monotonic() - since)
            finally:
                del self._waiting[me]
        return True

    def _give_back(self, moffset: int) -> None:
        with self._freed:
            self.table.release(moffset)
            self._freed.notify()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def waiting(self) -> list[float]:
        """For how many seconds each of those waits that wait for a range."""
        with self._lock:
            now = time.monotonic()
            return [now - since for since in self._waiting.values()]

    # ---- reclaim in the background

    def _ask_worker(self) -> None:
        if not self._asked:
            self._asked = True
            self._need_worker()
            self.post(self._reclaim)

    def _need_worker(self) -> None:
        with self._worker_lock:
            if self._worker is None and not self._closed:
                self._worker = threading.Thread(target=self._work, name="dax-reclaim", daemon=True)
                self._worker.start()

    def post(self, task: Callable[[], None]) -> None:
        """Have the worker do that. Safe wherever a garbage collection may happen."""
        self._todo.put(task)

    def _work(self) -> None:
        while (task := self._todo.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("the DAX worker failed")
            del task

    def _reclaim(self) -> None:
        """fuse_dax_free_memory_work: the ranges used longest ago, if nobody uses them now."""
        self._asked = False
        for _ in range(RECLAIM_CHUNK):
            if not self._reclaim_oldest():
                return  # unpin() asks again
        if self.table.n_free < self.threshold:
            self._ask_worker()

    def _reclaim_oldest(self) -> bool:
        found = self.table.oldest_idle()
        inode = None if found is None else self._grab(found.inode)
        if found is None or inode is None:
            return False  # all are busy, or it is being evicted, which frees it
        dax = inode.dax
        assert dax is not None
        try:
            with dax.invalidate.alone(), dax.sem:
                now = self.table.at(found.moffset)
                if now is None or now.inode != dax.key:
                    return True
                try:
                    self.table.unmap(found.moffset, keep=True)
                except OSError:
                    self.table.touch(found.moffset)  # busy by now; not the oldest any more
                    return True
                self._remove(inode, [found.moffset])
            self._give_back(found.moffset)
            self.count("reclaimed")
            return True
        finally:
            inode.put()

    def _grab(self, key: int) -> DaxFile | None:
        """igrab"""
        inode = self._inodes.get(key)
        return inode if inode is not None and inode.grab() else None

    # ---- views

    def hold(self, inode: DaxFile, starts: Sequence[int]) -> None:
        """A view is going to have those ranges. OSError ENOMEM: the window has no room for one more."""
        assert inode.dax is not None
        keys = [(inode.dax.key, start) for start in starts]
        self._need_worker()  # for the end of the view
        with self._freed:
            if len(self._held) + sum(key not in self._held for key in keys) > self.table.n_ranges:
                raise OSError(ENOMEM, "views hold the DAX window")
            self._held.update(keys)
            self._freed.notify_all()

    def unhold(self, inode: DaxFile, starts: Sequence[int]) -> None:
        assert inode.dax is not None
        with self._lock:
            for start in starts:
                key = (inode.dax.key, start)
                self._held[key] -= 1
                if self._held[key] == 0:
                    del self._held[key]

    # ---- the end

    def evict(self, inode: DaxFile) -> None:
        """fuse_dax_inode_cleanup: before FORGET. After an unmount DESTROY has done it."""
        dax = inode.dax
        assert dax is not None
        with dax.sem:
            moffsets = [mapping.moffset for mapping in self.table.of(dax.key)]
            for moffset in moffsets:
                self.table.unmap(moffset, keep=True)
            if moffsets and self.conn.connected:
                self._remove(inode, moffsets)
        for moffset in moffsets:
            self._give_back(moffset)
        with self._lock:
            del self._inodes[dax.key]

    def settle(self) -> None:
        """Wait until views that were released before are so."""
        if self._worker is not None and self._worker is not threading.current_thread():
            done = threading.Event()
            self.post(done.set)
            done.wait()

    def close(self) -> None:
        """fuse_dax_cancel_work: nothing is reclaimed any more, who waits gets ENOTCONN. Idempotent."""
        with self._freed:
            self._closed = True
            self._freed.notify_all()
        if self._worker is not None:
            self._todo.put(None)
            if self._worker is not threading.current_thread():
                self._worker.join()
            self._worker = None

    def stats(self) -> dict[str, Any]:
        """Ranges now, and what has happened."""
        table = self.table
        now = {"ranges": table.n_ranges, "free ranges": table.n_free, "busy": table.n_busy}
        return now | {"held": len(self._held), "waiting": len(self._waiting)} | dict(self.counts)

