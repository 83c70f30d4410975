"""Head-of-line blocking: getattr on a queue while something slow is under way on the same queue."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER

from .._load import Load
from ..client import POSIX_LOCKS
from ..histogram import Histogram, bounds
from ..model import Blocking, Failed, NotOffered
from ..slowmount import SlowMount
from .driving import abandon, expect_device, expect_right, wait
from .session import WireSession

SLOW_S = 0.5  # how long a slow read takes, and a lock is held
PATIENCE_S = 120.0  # an fsync may take long, and getattr with it
ALONE_S = 0.2
ARRIVAL_NS = 1_000_000  # getattrs are taken to come this often: those that could not even be sent count
CHUNK = 1 << 20
SLOW_SOURCE, SLOW_FILE = "slow-source", 1 << 20
SETLK, SETLKW = 32, 33
LOCK_IN = struct.Struct("=QQQQIIII")  # fh, owner, start, end, type, pid, lk_flags, padding

Slow = Callable[[WireSession], contextlib.AbstractContextManager[Callable[[Callable[[int], None]], None]]]
"""Prepares something slow and gives what starts it; that calls back with the errno when it has ended."""


def corrected(found: Histogram) -> Histogram:
    """As if requests had come every ARRIVAL_NS, and not each after the one before it."""
    values: list[int] = []
    for index, n in enumerate(found.counts):
        if n:
            low, high = bounds(index)
            middle = min((low + high) // 2, found.largest)
            values += [late for late in range(middle - ARRIVAL_NS, 0, -ARRIVAL_NS) for _ in range(n)]
    more = Histogram.from_values(values)
    more.add(found)
    return more


def submit(
    session: WireSession, done: Callable[[int], None], opcode: int, node: int, args: bytes, into: int = 0
) -> None:
    session.device.transport.submit(
        lambda error, _out, _data: done(error), opcode, node, args, into=into, argvar=into > 0, queue=1
    )


@contextmanager
def fsync(session: WireSession) -> Iterator[Callable[[Callable[[int], None]], None]]:
    """A file with much that is only in the page cache."""
    path = session.client.path("dirty")
    path.touch()
    node = session.client.node(f"{session.target.name}/dirty")
    fh, _ = session.client.open(node, os.O_RDWR)
    # Not truncated: when that file is closed ext4 begins to write it back.
    with open(path, "r+b", buffering=0) as stream:
        for _ in range(session.place.profile.dirty // CHUNK):
            stream.write(os.urandom(4096) * (CHUNK // 4096))
    try:
        yield lambda done: submit(session, done, NUMBER["FSYNC"], node, abi.FSYNC_IN.pack(fh, 0, 0))
    finally:
        path.unlink()


def prepare_slow_file(mount: SlowMount) -> None:
    """A file each read of which takes SLOW_S."""
    (mount.source / "file").write_bytes(bytes(SLOW_FILE))
    mount.set_delay("READ", int(SLOW_S * 1e6))


@contextmanager
def slow_read(session: WireSession) -> Iterator[Callable[[Callable[[int], None]], None]]:
    """A read of a file on a slow file system, whose pages are in no cache."""
    name = f"slow-{session.target.name}"
    node = session.client.node(f"{name}/file")
    fh, _ = session.client.open(node, os.O_RDONLY)
    args = abi.READ_IN.pack(fh, 0, 4096, 0, 0, 0, 0)
    yield lambda done: submit(session, done, NUMBER["READ"], node, args, 4096)


def lock(fh: int, owner: int, kind: int) -> bytes:
    """kind: F_WRLCK or F_UNLCK, 1 or 2."""
    return LOCK_IN.pack(fh, owner, 0, (1 << 63) - 1, kind, owner, 0, 0)


@contextmanager
def held_lock(session: WireSession) -> Iterator[Callable[[Callable[[int], None]], None]]:
    """A lock that another owner holds for SLOW_S."""
    client, transport = session.client, session.device.transport
    if not client.flags & POSIX_LOCKS:
        raise NotOffered("does not agree to POSIX locks: the guest keeps them")
    node = client.file
    first, second = client.open(node, os.O_RDWR)[0], client.open(node, os.O_RDWR)[0]
    try:
        transport.call(SETLK, node, lock(first, 1, 1))
    except OSError as problem:
        raise NotOffered(f"locks: {problem.strerror}") from problem

    unlock = threading.Timer(SLOW_S, lambda: submit(session, lambda _: None, SETLK, node, lock(first, 1, 2)))
    unlock.daemon = True

    def start(done: Callable[[int], None]) -> None:
        submit(session, done, SETLKW, node, lock(second, 2, 1))
        unlock.start()

    try:
        yield start
    finally:
        unlock.cancel()


SLOW: dict[str, Slow] = {"fsync": fsync, "read": slow_read, "lock": held_lock}
TITLES = {
    "fsync": "fsync of dirty data",
    "read": "read from a slow file system",
    "lock": "blocked lock",
}


def measure(session: WireSession, what: str) -> Blocking:
    """Failed, NotOffered."""
    found = Blocking(session.setting.id, what, session.target.name)
    load = session.load("getattr", 1)
    session.drive(load, "getattr", ALONE_S)
    found.alone_p99 = Histogram.of(load.histogram(0, 0)).percentile(99)
    with session.asking(f"while a slow {what} was prepared"), SLOW[what](session) as start:
        error = beside(session, load, what, start, found)
    if error in (errno.ENOSYS, errno.EOPNOTSUPP):
        raise NotOffered(f"{what}: {os.strerror(error)}")
    if error:
        raise Failed(f"the slow {what} was answered {os.strerror(error)}")
    latencies = corrected(Histogram.of(load.histogram(0, 0)))
    found.p50, found.p99 = latencies.percentile(50), latencies.percentile(99)
    found.max, found.ops = float(latencies.largest), load.totals()[0]
    return found


def beside(
    session: WireSession,
    load: Load,
    what: str,
    start: Callable[[Callable[[int], None]], None],
    found: Blocking,
) -> int:
    """Run getattr until the slow request has ended: its errno."""
    errors: list[int] = []
    began = time.perf_counter()

    def done(error: int) -> None:
        found.slow = time.perf_counter() - began
        errors.append(error)
        load.stop()

    load.start(PATIENCE_S)
    try:
        start(done)
    except BaseException:
        abandon(session.device, load)
        raise
    wait(session.device, load, PATIENCE_S)
    expect_device(session.device, session.running, f"during a slow {what}")
    expect_right(load)
    if not errors:
        raise Failed(f"the slow {what} was not answered for {PATIENCE_S:g} s")
    return errors[0]
