"""The FUSE connection: what was agreed in INIT, and the one way to send a request (struct fuse_conn)."""

import itertools
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import ECONNREFUSED, EINVAL, ENOSYS, ENOTCONN
from typing import NamedTuple

from vfsd.fuse import abi
from vfsd.fuse.abi import PAGE_SIZE, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest.buffer import Buffer
from vfsd.guest.client import objects
from vfsd.guest.client.dax import RANGE_SHIFT, Dax
from vfsd.guest.client.pages import PagePool
from vfsd.guest.driver.device import Device

log = logging.getLogger("vfsd.guest")

MAX_READAHEAD = 128 << 10  # VM_READAHEAD_PAGES
MAX_BACKGROUND = 12  # FUSE_DEFAULT_MAX_BACKGROUND
CONGESTION_THRESHOLD = 9
MAX_PAGES = 32  # FUSE_DEFAULT_MAX_PAGES_PER_REQ
HEADER_OVERHEAD = 4  # FUSE_HEADER_OVERHEAD
NAME_LOW_MAX = 1024  # FUSE_NAME_LOW_MAX
NAME_MAX = 4095  # FUSE_NAME_MAX
INIT_OUT_MIN = {4: 8, 22: 24}  # the size of init_out up to that minor

# What Linux offers without a DAX window; with one, MAP_ALIGNMENT too. The higher word came with INIT_EXT.
FLAGS_ALL = Init(0x7BFFFFFB)
FLAGS2 = {38: Init(0xD << 32), 41: Init(0x1FD << 32), 45: Init(0x5FD << 32)}
CREATING = frozenset({Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.CREATE, Opcode.TMPFILE})
NO_ID = 0xFFFFFFFF


class Caller(NamedTuple):
    """Who asks: fsuid, fsgid, pid and supplementary groups of a task."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] = ()

    def in_group(self, gid: int) -> bool:
        return gid == self.gid or gid in self.groups


def creates(opcode: Opcode, args: bytes) -> bool:
    """Whether a request makes a file, and so says whose it is also with FUSE_ALLOW_IDMAP."""
    if opcode == Opcode.RENAME2:
        return bool(abi.RENAME2_IN.unpack_from(args)[1] & abi.Rename.WHITEOUT)
    return opcode in CREATING


NOBODY = Caller(0, 0, 0)  # force requests carry no identity
_current = threading.local()


def current() -> Caller:
    caller: Caller | None = getattr(_current, "caller", None)
    if caller is None:
        return Caller(os.geteuid(), os.getegid(), os.getpid(), tuple(os.getgroups()))
    return caller


@contextmanager
def acting_as(uid: int, gid: int, groups: Sequence[int] = ()) -> Iterator[None]:
    """This thread's requests are that user's (setfsuid(2), setgroups(2))."""
    before: Caller | None = getattr(_current, "caller", None)
    _current.caller = Caller(uid, gid, os.getpid(), tuple(groups))
    try:
        yield
    finally:
        _current.caller = before


@contextmanager
def revalidating() -> Iterator[None]:
    """This thread's path walks believe no name without asking the daemon (LOOKUP_REVAL)."""
    _current.revalidates = True
    try:
        yield
    finally:
        _current.revalidates = False


def revalidates() -> bool:
    return getattr(_current, "revalidates", False)


Done = Callable[[int, bytes, bytes], None]


class Connection:
    """One FUSE session with a device: from INIT to DESTROY."""

    def __init__(
        self, device: Device, *, minor: int = abi.KERNEL_MINOR_VERSION, inode_dax: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if minor not in FLAGS2:
            raise OSError(EINVAL, f"minor {minor} is none of {', '.join(map(str, FLAGS2))}")
        self.offered = FLAGS_ALL | FLAGS2[minor] | (Init.HAS_INODE_DAX if inode_dax else Init(0))
        self.device = device
        self.clock = clock
        self.offered_minor = minor
        self.minor = minor
        self.flags = Init(0)
        self.max_pages_limit = device.max_pages
        self.max_pages = MAX_PAGES
        self.max_write = PAGE_SIZE
        self.max_readahead = MAX_READAHEAD
        self.name_max = NAME_LOW_MAX
        self.time_gran = 1
        self.max_background = MAX_BACKGROUND
        self.congestion_threshold = CONGESTION_THRESHOLD
        self.connected = True  # until unmounted or aborted
        self.initialized = threading.Event()
        self.init_sent = False
        self.conn_init = False  # INIT succeeded
        self.conn_error = False
        self.sync_fs = True  # virtiofs wants SYNCFS
        self.requests: Counter[Opcode] = Counter()
        self.hits: Counter[str] = Counter()  # names, negative names, attributes, pages, listings
        self.scramble_key = random.getrandbits(64)  # of lock owners
        self.pool = PagePool()
        self.dax: Dax | None = None
        self._silent: set[Opcode] = set()  # answered with ENOSYS
        self._versions = itertools.count(2)
        self._attr_version = 1
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # for background requests
        self._background = 0
        objects.born("connections")

    def destroy(self) -> None:
        """fuse_conn_put of the last reference. What still holds this must not hold the guest's memory."""
        del self.device
        self.dax = None
        objects.gone("connections")

    def use_dax(self, dax: Dax) -> None:
        """fuse_dax_conn_alloc, before INIT."""
        self.dax = dax
        self.offered |= Init.MAP_ALIGNMENT

    # ---- INIT and DESTROY

    def send_init(self) -> None:
        """Ask, and return at once: the first request waits for the answer (fuse_send_init)."""
        args = abi.INIT_IN.pack(
            abi.KERNEL_VERSION, self.offered_minor, MAX_READAHEAD,
            self.offered & 0xFFFFFFFF, self.offered >> 32,
        )  # fmt: skip
        self._count(Opcode.INIT)
        self.init_sent = True
        try:
            self.device.transport.submit(
                lambda error, out, _data: self._process_init(error, out),
                Opcode.INIT, 0, args, out=abi.INIT_OUT.size, argvar=True,
            )  # fmt: skip
        except OSError as problem:
            self._process_init(problem.errno or ENOTCONN, b"")

    def _process_init(self, error: int, out: bytes) -> None:
        """process_init_reply"""
        if error or len(out) < 8 or not self._take_init(out):
            self.conn_error = True
            log.error("INIT failed: %s", os.strerror(error) if error else f"bad reply {out.hex()}")
        else:
            self.conn_init = True
        self.initialized.set()

    def _take_init(self, out: bytes) -> bool:
        minor = int.from_bytes(out[4:8], "little")
        if len(out) < min((size for top, size in INIT_OUT_MIN.items() if minor <= top), default=64):
            return False
        (major, minor, readahead, low, max_background, congestion, max_write, time_gran, max_pages,
         alignment, high) = abi.INIT_OUT.unpack(out.ljust(abi.INIT_OUT.size, b"\0"))  # fmt: skip
        if major != abi.KERNEL_VERSION:
            return False
        flags = Init(low | (high << 32 if low & Init.INIT_EXT else 0)) if minor >= 6 else Init(0)
        if self.dax is not None and flags & Init.MAP_ALIGNMENT and alignment > RANGE_SHIFT:
            log.error("FUSE: map_alignment 2^%d is over the 2^%d of a DAX range", alignment, RANGE_SHIFT)
            return False
        self.minor, self.flags = minor, flags
        self.max_background = max_background or self.max_background
        self.congestion_threshold = congestion or self.congestion_threshold
        self.max_readahead = min(MAX_READAHEAD, readahead)
        if flags & Init.MAX_PAGES:
            self.max_pages = min(self.max_pages_limit, max(max_pages, 1))
            if self.max_pages > 1:
                self.name_max = NAME_MAX
        self.max_write = PAGE_SIZE if minor < 5 else max(PAGE_SIZE, max_write)
        if 1 <= time_gran <= 10**9:
            self.time_gran = time_gran
        return True

    def send_destroy(self) -> None:
        """fuse_send_destroy: the daemon forgets everything; nobody cares for its answer."""
        if self.conn_init:
            try:
                self.call(Opcode.DESTROY, 0, force=True, nocreds=True)
            except OSError as problem:
                log.info("DESTROY: %s", problem.strerror)

    def abort(self) -> None:
        """fuse_abort_conn: whoever waits or comes later gets ENOTCONN."""
        self.connected = False
        self.initialized.set()
        with self._room:
            self._room.notify_all()

    # ---- requests

    def call(
        self, opcode: Opcode, nodeid: int, args: bytes = b"", *, out: int = 0, argvar: bool = False,
        data: Buffer | None = None, into: Buffer | None = None, force: bool = False, nocreds: bool = False,
        ext: bytes = b"",
    ) -> tuple[bytes, int]:  # fmt: skip
        """Send and wait: out arguments, and how many bytes `into` got. OSError.

        force: not kept back before INIT's answer. nocreds: without an identity. ext: extensions,
        the last in argument.
        """
        caller = NOBODY if nocreds else current()
        if self.flags & Init.ALLOW_IDMAP and not nocreds and not creates(opcode, args):
            caller = Caller(NO_ID, NO_ID, caller.pid)
        if not force:
            self._may_send()
        self._count(opcode)
        return self.device.transport.call(
            opcode, nodeid, args + ext, out=out, argvar=argvar, data=data, into=into,
            uid=caller.uid, gid=caller.gid, pid=caller.pid, extlen=len(ext) // 8,
        )  # fmt: skip

    def background(
        self, done: Done, opcode: Opcode, nodeid: int, args: bytes = b"", *, out: int = 0,
        argvar: bool = False, data: Buffer | None = None, into: int = 0, nocreds: bool = False,
    ) -> None:  # fmt: skip
        """fuse_simple_background: at most max_background at a time, who has more waits here.

        done is called once, in a thread that must not wait for other requests; OSError if it
        never will be.
        """
        caller = NOBODY if nocreds else current()
        self._may_send()
        self._count(opcode)

        with self._room:
            while self._background >= self.max_background and self.connected:
                self._room.wait()
            if not self.connected:
                raise OSError(ENOTCONN, os.strerror(ENOTCONN))
            self._background += 1

        def ended(error: int, out: bytes, data: bytes) -> None:
            self._leave_background()
            done(error, out, data)

        try:
            self.device.transport.submit(
                ended, opcode, nodeid, args, out=out, argvar=argvar, data=data, into=into,
                uid=caller.uid, gid=caller.gid, pid=caller.pid,
            )  # fmt: skip
        except BaseException:
            self._leave_background()
            raise

    def _leave_background(self) -> None:
        with self._room:
            self._background -= 1
            self._room.notify_all()

    def _may_send(self) -> None:
        """fuse_get_req: not before INIT's answer, not after its failure."""
        waited = not self.initialized.is_set()
        if waited:
            self.initialized.wait()
        if not self.connected or (waited and self.conn_error):
            raise OSError(ENOTCONN, os.strerror(ENOTCONN))
        if self.conn_error:
            raise OSError(ECONNREFUSED, os.strerror(ECONNREFUSED))

    def forget(self, nodeid: int, nlookup: int) -> None:
        """fuse_queue_forget"""
        if not self.connected:
            return
        self._count(Opcode.FORGET)
        self.device.transport.forget(nodeid, nlookup)

    def _count(self, opcode: Opcode) -> None:
        with self._lock:
            self.requests[opcode] += 1

    def hit(self, what: str) -> None:
        with self._lock:
            self.hits[what] += 1

    # ---- what the daemon can't do is not asked twice

    def lacks(self, opcode: Opcode) -> bool:
        return opcode in self._silent

    def remember_silent(self, opcode: Opcode) -> None:
        self._silent.add(opcode)

    def try_call(
        self, opcode: Opcode, nodeid: int, args: bytes = b"", *, instead: int, out: int = 0,
        argvar: bool = False, data: Buffer | None = None, into: Buffer | None = None,
    ) -> tuple[bytes, int]:  # fmt: skip
        """`call`, and ENOSYS is remembered for ever; the error is then `instead`, 0 for success."""
        if opcode not in self._silent:
            try:
                return self.call(
                    opcode, nodeid, args, out=out, argvar=argvar, data=data, into=into
                )
            except OSError as problem:
                if problem.errno != ENOSYS:
                    raise
                self._silent.add(opcode)
        if instead:
            raise OSError(instead, os.strerror(instead))
        return b"", 0

    # ---- attribute versions

    @property
    def attr_version(self) -> int:
        """A reply to a request sent now is older than any change with a higher version."""
        return self._attr_version

    def next_attr_version(self) -> int:
        self._attr_version = version = next(self._versions)
        return version

    def deadline(self, seconds: int, nanoseconds: int) -> float:
        """When what is valid for so long expires; 0 has expired always (fuse_time_to_jiffies)."""
        if seconds == 0 and nanoseconds == 0:
            return float("-inf")
        return self.clock() + seconds + min(nanoseconds, 999_999_999) * 1e-9

    def has(self, flag: Init) -> bool:
        return bool(self.flags & flag)


class FuseMount:
    """What joins a superblock to its connection (struct fuse_mount)."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        objects.born("mounts")

    def destroy(self) -> None:
        """fuse_mount_destroy"""
        objects.gone("mounts")
