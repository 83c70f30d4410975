"""Several queues on the same inodes and handles: each reply is true, and nothing is left over."""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from errno import EBADF, EIO, ESTALE
from pathlib import Path

import pytest
from guests import Daemon, eventually

from . import wire
from .fixtures import StartGuest, held
from .ops import Operations
from .rawguest import Guest
from .requests import Held, hold, request_for
from .wire import ROOT

SECONDS = 5.0
QUEUES = (1, 2, 3, 4)
FILES = 6
SIZE = 3 * 4096 + 17


def name(k: int) -> bytes:
    return b"file %d" % k


def content(k: int) -> bytes:
    return bytes([65 + k]) * SIZE


def in_threads(work: Callable[[int], None], indexes: tuple[int, ...] = QUEUES) -> None:
    """work(queue index) in a thread each; their first exception."""
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=run, args=(index,)) for index in indexes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Shared:
    """What the threads have in common: handles anybody may release, and the hiprio queue."""

    def __init__(self, hiprio: Operations, inos: list[int]) -> None:
        self.lock = threading.Lock()
        self.handles: list[tuple[int, int, int]] = []  # k, nodeid, fh
        self.hiprio = hiprio
        self.hiprio_lock = threading.Lock()
        self.inos = inos


class Worker:
    """One thread's part. What it has looked up it may rely on, until it forgets it."""

    def __init__(self, ops: Operations, shared: Shared, index: int) -> None:
        self.ops = ops
        self.shared = shared
        self.index = index
        self.choose = random.Random(index)
        self.lookups: Counter[int] = Counter()  # of nodeid
        self.files: dict[int, int] = {}  # nodeid to k
        self.done: Counter[str] = Counter()

    def run(self, until: float) -> None:
        steps = (
            self.look, self.look, self.forget, self.forget, self.attributes, self.open, self.read, self.read,
            self.write, self.release, self.make_and_remove, self.list,
        )  # fmt: skip
        while time.monotonic() < until:
            step = self.choose.choice(steps)
            step()
            self.done[step.__name__] += 1

    def look(self) -> int:
        k = self.choose.randrange(FILES)
        entry = self.ops.lookup(ROOT, name(k))
        assert entry.attr.ino == self.shared.inos[k]
        assert self.files.setdefault(entry.nodeid, k) == k, "a nodeid of another file, while it is known"
        self.lookups[entry.nodeid] += 1
        return entry.nodeid

    def forget(self) -> None:
        if not self.lookups:
            return
        nodeid = self.choose.choice(list(self.lookups))
        n = self.choose.randint(1, self.lookups[nodeid])
        self.lookups[nodeid] -= n
        if not self.lookups[nodeid]:
            del self.lookups[nodeid], self.files[nodeid]
        if self.choose.random() < 0.5:
            self.ops.batch_forget((nodeid, n))
        else:
            with self.shared.hiprio_lock:
                self.shared.hiprio.forget(nodeid, n)

    def some_nodeid(self) -> int:
        return self.choose.choice(list(self.lookups)) if self.lookups else self.look()

    def attributes(self) -> None:
        nodeid = self.some_nodeid()
        attr = self.ops.getattr(nodeid)
        assert attr.ino == self.shared.inos[self.files[nodeid]]
        assert attr.size == SIZE

    def open(self) -> None:
        nodeid = self.some_nodeid()
        fh = self.ops.open(nodeid, os.O_RDWR)
        with self.shared.lock:
            self.shared.handles.append((self.files[nodeid], nodeid, fh))

    def some_handle(self) -> tuple[int, int, int]:
        with self.shared.lock:
            if self.shared.handles:
                return self.choose.choice(self.shared.handles)
        self.open()
        return self.some_handle()

    def read(self) -> None:
        k, nodeid, fh = self.some_handle()
        offset, size = self.choose.randrange(SIZE), self.choose.randrange(1, SIZE)
        try:
            data = self.ops.read(nodeid, fh, offset, size)
        except OSError as problem:
            assert problem.errno == EBADF
            self.done["read of a released handle"] += 1
        else:
            assert data == content(k)[offset : offset + size], "another file's data"

    def write(self) -> None:
        k, nodeid, fh = self.some_handle()
        offset = self.choose.randrange(SIZE)
        data = content(k)[offset : offset + self.choose.randrange(1, 9000)]
        try:
            assert self.ops.write(nodeid, fh, offset, data) == len(data)
        except OSError as problem:
            assert problem.errno == EBADF

    def release(self) -> None:
        with self.shared.lock:
            if len(self.shared.handles) < 3:
                return
            i = self.choose.randrange(len(self.shared.handles))
            _, nodeid, fh = self.shared.handles.pop(i)
        self.ops.release(nodeid, fh)

    def make_and_remove(self) -> None:
        own, other = b"own %d" % self.index, b"renamed %d" % self.index
        entry, fh = self.ops.create(ROOT, own)
        assert self.ops.write(entry.nodeid, fh, 0, own) == len(own)
        self.ops.rename(ROOT, own, ROOT, other)
        again = self.ops.lookup(ROOT, other)
        assert (again.nodeid, again.attr.size) == (entry.nodeid, len(own))
        self.ops.unlink(ROOT, other)
        assert self.ops.getattr(entry.nodeid).nlink == 0
        assert self.ops.read(entry.nodeid, fh, 0, 100) == own
        self.ops.release(entry.nodeid, fh)
        self.ops.forget(entry.nodeid, 2)

    def list(self) -> None:
        names = Counter[bytes]()
        for dirent in self.ops.listing(ROOT, plus=True):
            names[dirent.name] += 1
            if dirent.entry is not None and dirent.entry.nodeid:
                self.ops.forget(dirent.entry.nodeid, 1)
        for k in range(FILES):
            assert names[name(k)] == 1


def test_mixed_operations(start_guest: StartGuest, share: Path, served: Daemon) -> None:
    for k in range(FILES):
        (share / os.fsdecode(name(k))).write_bytes(content(k))
    guest = start_guest(request_queues=4)
    guest.frontend.get_features()  # all before it has been handled
    before = len(served.descriptors())
    guest.init()
    inos = [os.stat(share / os.fsdecode(name(k))).st_ino for k in range(FILES)]
    shared = Shared(guest.on(0), inos)
    workers = {index: Worker(guest.on(index), shared, index) for index in QUEUES}
    until = time.monotonic() + SECONDS
    in_threads(lambda index: workers[index].run(until))
    done = sum((worker.done for worker in workers.values()), Counter[str]())
    assert min(done[step] for step in ("look", "forget", "read", "release", "make_and_remove", "list")) > 10
    for k in range(FILES):
        assert (share / os.fsdecode(name(k))).read_bytes() == content(k)
    guest.destroy()
    assert held(served) == []
    assert len(served.descriptors()) == before


def test_lookups_balance_across_queues(start_guest: StartGuest, share: Path, served: Daemon) -> None:
    """One inode, forgotten to nothing and found again all the time; at the end it is gone."""
    (share / "one").touch()
    guest = start_guest(request_queues=4)
    guest.init()

    def work(index: int) -> None:
        ops = guest.on(index)
        for _ in range(2000):
            nodeid = ops.lookup(ROOT, b"one").nodeid
            ops.getattr(nodeid)
            ops.forget(nodeid, 1)

    in_threads(work)
    assert held(served) == []


def test_release_while_others_read(start_guest: StartGuest, share: Path, served: Daemon) -> None:
    """A handle's number never leads to another file, however often its place is given away."""
    for k in range(3):
        (share / f"{k}").write_bytes(content(k))
    guest = start_guest(request_queues=4)
    guest.init()
    nodeids = [guest.lookup(ROOT, b"%d" % k).nodeid for k in range(3)]
    current = (0, guest.open(nodeids[0]))
    stop = threading.Event()
    seen = Counter[str]()

    def read(index: int) -> None:
        ops = guest.on(index)
        while not stop.is_set():
            k, fh = current
            try:
                assert ops.read(nodeids[k], fh, 5, 20_000) == content(k)[5:]
                seen["read"] += 1
            except OSError as problem:
                assert problem.errno == EBADF
                seen["released"] += 1

    def swap(index: int) -> None:
        nonlocal current
        ops = guest.on(index)
        try:
            for i in range(3000):
                _, old = current
                ops.release(nodeids[0], old)
                current = (i % 3, ops.open(nodeids[i % 3]))
        finally:
            stop.set()

    in_threads(lambda index: swap(index) if index == 1 else read(index))
    assert seen["read"] and seen["released"]
    guest.destroy()
    assert held(served) == []


def test_destroy_and_init_while_others_work(start_guest: StartGuest, share: Path, served: Daemon) -> None:
    (share / "file").write_bytes(b"content")
    guest = start_guest(request_queues=4)
    guest.init()
    stop = threading.Event()
    seen = Counter[int]()

    def work(index: int) -> None:
        ops = guest.on(index)
        while not stop.is_set():
            try:
                nodeid = ops.lookup(ROOT, b"file").nodeid
                fh = ops.open(nodeid)
                assert ops.read(nodeid, fh, 0, 10) == b"content"
                ops.listing(ROOT, plus=True)
                ops.release(nodeid, fh)
                ops.forget(nodeid, 1)
                seen[0] += 1
            except OSError as problem:
                assert problem.errno in (EIO, ESTALE, EBADF)
                seen[problem.errno or 0] += 1

    def end_and_begin(index: int) -> None:
        try:
            for i in range(2000):
                if i % 2:
                    guest.on(index).destroy()
                guest.on(index).init()
        finally:
            stop.set()

    in_threads(lambda index: end_and_begin(index) if index == 1 else work(index))
    assert seen.keys() == {0, EIO, ESTALE, EBADF}
    guest.destroy()
    assert held(served) == []
    guest.init()
    assert guest.getattr(guest.walk("file")).size == 7


def test_queues_stopped_and_started_in_the_middle(start_guest: StartGuest, share: Path) -> None:
    """What is under way when a queue stops is finished first; what is not, later."""
    guest = start_guest(request_queues=2, num=64)
    guest.init()
    things = hold(guest, share)
    queue = guest.queue
    for i in range(150):
        tokens = [submit(guest, things, i + n) for n in range(20)]
        base = guest.frontend.get_vring_base(queue.index)
        assert base == queue.used_idx, "a request is still under way"
        assert (queue.avail_idx - base) & 0xFFFF <= 20
        queue.start(base)
        for token in tokens:
            assert queue.wait(token).error == 0
        guest.on(2).statfs()


def submit(guest: Guest, things: Held, n: int) -> int:
    op = ("GETATTR", "FSYNC", "STATFS", "READ", "WRITE", "READDIRPLUS", "FALLOCATE", "FLUSH")[n % 8]
    whole = request_for(op, things)
    return guest.queue.submit(op, whole.nodeid, whole.body, out=whole.out)


@pytest.mark.parametrize("end", ["destroy", "reset", "leave"])
def test_an_end_in_the_middle(start_guest: StartGuest, share: Path, served: Daemon, end: str) -> None:
    """A session, a device and a connection end while slow requests are under way."""
    for i in range(20):
        guest = start_guest(request_queues=2, num=64)
        guest.init()
        entry, fh = guest.create(ROOT, b"file %d" % i)
        queue = guest.queue
        write = wire.WRITE_IN.pack(fh, 0, 4096, 0, 0, 0, 0)
        for _ in range(8):
            queue.submit("WRITE", entry.nodeid, write, data=bytes(4096))
            queue.submit("FSYNC", entry.nodeid, fh.to_bytes(8, "little") + bytes(8))
        if end == "destroy":
            guest.on(2).destroy()
            guest.frontend.get_vring_base(queue.index)
            assert held(served) == []
        elif end == "reset":
            guest.frontend.stop(guest.order, guest.setup)
            guest.frontend.get_features()
            assert eventually(lambda: held(served) == [])
        guest.close()
    assert eventually(lambda: held(served) == [])


@pytest.mark.parametrize("index", [1, 0])
def test_hiprio_does_not_wait(start_guest: StartGuest, share: Path, index: int) -> None:
    """While a request queue is full of long work, hiprio and the other queue answer."""
    guest = start_guest(request_queues=2, num=128)
    out = guest.init()
    entry, fh = guest.create(ROOT, b"large")
    guest.truncate(entry.nodeid, 64 << 20)
    other = guest.on(0 if index else 2)
    queue = guest.queues[1]
    size = out.max_write
    tokens = [
        queue.submit("READ", entry.nodeid, wire.read_in(fh, n * size, size), pages=size) for n in range(7)
    ]
    for _ in range(50):
        other.statfs()
    for token in tokens:
        reply = queue.wait(token)
        assert (reply.error, len(reply.body)) == (0, size)
