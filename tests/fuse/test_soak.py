"""Everything at once: 200 threads in several guests, and nothing is lost, mixed up or left over.

VFSD_SOAK: seconds, 6 if not given. Each thread has files of its own, of which it knows every byte; names
that all want at once, where only the errno must be one that Linux gives; and locks, which nobody else may
hold meanwhile. `Raw` threads have a queue each and count their lookups; the others share queues.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from guests import Daemon, StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Rename
from vfsd.guest import Filesystem, mount
from vfsd.guest.client import objects
from vfsd.guest.face.rawfile import RawFile

from .ops import Operations
from .rawguest import Guest
from .test_concurrency import FILES, Shared, Worker, content, name
from .wire import ROOT

SECONDS = float(os.environ.get("VFSD_SOAK", "6"))
KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2)
MOUNTS, THREADS_EACH, RAW = 4, 48, 8
SLOTS = 5  # places in the file of locks: 40 threads for each
FD_BUDGET = 1200  # 240 for each guest: less than its threads' files, so anchors come and go
# What names that others make, move and remove at the same time may answer.
ALLOWED = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL,
           errno.EPERM, errno.ELOOP, errno.EBUSY, errno.ESTALE, errno.EXDEV}  # fmt: skip


class Holders:
    """Who has a lock, by what it is on: two at once fail."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: set[object] = set()

    def hold(self, what: object) -> None:
        with self.lock:
            assert what not in self.held, f"{what} is locked by two"
            self.held.add(what)
        os.sched_yield()
        with self.lock:
            self.held.remove(what)


class Thread:
    """One thread of a mount: `files` is what each of its names holds; two names may be one file."""

    def __init__(self, fs: Filesystem, number: int, holders: Holders) -> None:
        self.fs = fs
        self.number = number
        self.holders = holders
        self.rng = random.Random(number)
        self.top = f"/own {number}"
        self.files: dict[str, bytearray] = {}
        self.done: Counter[str] = Counter()
        self.names = 0
        self.counted = 0

    def run(self, until: float) -> None:
        self.fs.mkdir(self.top)
        steps = [
            self.make, self.write, self.read, self.resize, self.punch, self.copy, self.move, self.exchange,
            self.link, self.remove, self.directory, self.symlink, self.temporary, self.special, self.list,
            self.attributes, self.xattrs, self.sync, self.flock, self.lockf,
        ] + 6 * [self.contend]  # fmt: skip
        while time.monotonic() < until:
            step = self.rng.choice(steps)
            step()
            self.done[step.__name__] += 1
        for path, data in self.files.items():
            assert self.fs.read_bytes(path) == data, path

    # ---- help

    def fresh(self) -> str:
        self.names += 1
        return f"{self.top}/{self.names}{'-' * self.rng.choice((0, 0, 60))}"

    def some(self) -> str:
        if not self.files:
            self.make()
        return self.rng.choice(list(self.files))

    def opened(self, flags: int = os.O_RDWR) -> tuple[RawFile, bytearray]:
        path = self.some()
        flags |= self.rng.choice((0, 0, 0, os.O_DIRECT, os.O_APPEND))
        return self.fs.open(path, flags), self.files[path]

    def content(self) -> bytes:
        return self.rng.randbytes(1) * self.rng.choice((1, 100, 4096, 5000, 70_000))

    # ---- files

    def make(self) -> None:
        if len(self.files) > 12:
            self.remove()
        path, data = self.fresh(), self.content()
        with self.fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            assert file.pwrite(data, 0) == len(data)
        self.files[path] = bytearray(data)

    def write(self) -> None:
        path, data = self.some(), self.content()
        model = self.files[path]
        at = self.rng.randrange(len(model) + 5000)
        with self.fs.open(path, os.O_RDWR | self.rng.choice((0, 0, os.O_DIRECT, os.O_SYNC))) as file:
            assert file.pwrite(data, at) == len(data)
        if len(model) < at:
            model.extend(bytes(at - len(model)))
        model[at : at + len(data)] = data
        if len(model) > 300_000:
            self.fs.truncate(path, 10_000)
            del model[10_000:]

    def read(self) -> None:
        file, model = self.opened(os.O_RDONLY)
        with file:
            at = self.rng.randrange(len(model) + 1)
            assert file.pread(20_000, at) == model[at : at + 20_000]
            assert self.fs.fstat(file).st_size == len(model)

    def resize(self) -> None:
        path = self.some()
        model, size = self.files[path], self.rng.randrange(30_000)
        if self.rng.random() < 0.5:
            self.fs.truncate(path, size)
        else:
            with self.fs.open(path, os.O_RDWR) as file:
                self.fs.ftruncate(file, size)
        del model[size:]
        model.extend(bytes(size - len(model)))
        assert self.fs.stat(path).st_size == size

    def punch(self) -> None:
        file, model = self.opened()
        with file:
            at, size = self.rng.randrange(20_000), self.rng.randrange(1, 9_000)
            end = min(at + size, len(model))
            self.fs.fallocate(file, KEEP_SIZE | PUNCH_HOLE, at, size)
            if at < end:
                model[at:end] = bytes(end - at)
            self.fs.fallocate(file, 0, 0, len(model) + 10)
            model.extend(bytes(10))
            hole = self.fs.lseek(file, 0, os.SEEK_HOLE)
            assert 0 <= hole <= len(model)
            assert file.pread(len(model), 0) == model

    def copy(self) -> None:
        path, target = self.some(), self.fresh()
        model = self.files[path]
        with self.fs.open(path, os.O_RDONLY) as source, self.fs.open(target, os.O_RDWR | os.O_CREAT) as to:
            n = self.fs.copy_file_range(source, to, len(model), 0, 0)
            assert n == len(model)
        self.files[target] = bytearray(model)

    # ---- names

    def move(self) -> None:
        path, target = self.some(), self.fresh()
        self.fs.rename(path, target, self.rng.choice((0, Rename.NOREPLACE)))
        self.files[target] = self.files.pop(path)

    def exchange(self) -> None:
        one, other = self.some(), self.some()
        if one != other:
            self.fs.rename(one, other, Rename.EXCHANGE)
            self.files[one], self.files[other] = self.files[other], self.files[one]

    def link(self) -> None:
        path, target = self.some(), self.fresh()
        self.fs.link(path, target)
        self.files[target] = self.files[path]

    def remove(self) -> None:
        path = self.some()
        with self.fs.open(path, os.O_RDONLY) as file:
            self.fs.unlink(path)
            assert file.pread(400_000, 0) == self.files.pop(path)
        assert not self.fs.exists(path)

    def directory(self) -> None:
        path, other = self.fresh(), self.fresh()
        self.fs.mkdir(path)
        self.fs.write_bytes(f"{path}/within", b"x")
        self.fs.rename(path, other)
        assert self.fs.listdir(other) == ["within"]
        self.fs.unlink(f"{other}/within")
        self.fs.rmdir(other)

    def symlink(self) -> None:
        path, target = self.fresh(), self.some()
        self.fs.symlink(os.path.basename(target), path)
        assert self.fs.readlink(path) == os.path.basename(target)
        assert self.fs.read_bytes(path) == self.files[target]
        self.fs.unlink(path)

    def temporary(self) -> None:
        path, data = self.fresh(), self.content()
        with self.fs.open(self.top, os.O_TMPFILE | os.O_RDWR, 0o600) as file:
            assert file.pwrite(data, 0) == len(data)
            self.fs.link_open(file, path)
        self.files[path] = bytearray(data)

    def special(self) -> None:
        path = self.fresh()
        self.fs.mknod(path, self.rng.choice((0o010644, 0o140600)))  # fifo, socket
        assert self.fs.stat(path).st_nlink == 1
        self.fs.unlink(path)

    def list(self) -> None:
        expected = {os.path.basename(path) for path in self.files}
        assert set(self.fs.listdir(self.top)) == expected
        with self.fs.scandir(self.top) as found:
            for entry in found:
                assert entry.stat().st_size == len(self.files[f"{self.top}/{entry.name}"])

    # ---- attributes

    def attributes(self) -> None:
        path = self.some()
        mode, when = self.rng.choice((0o600, 0o644, 0o755)), self.rng.randrange(10**18)
        self.fs.chmod(path, mode)
        self.fs.utime(path, ns=(when, when + 1))
        self.fs.chown(path, 1000, 1001)
        found = self.fs.stat(path)
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (mode, 1000, 1001)
        assert (found.st_atime_ns, found.st_mtime_ns) == (when, when + 1)
        assert found.st_nlink == sum(data is self.files[path] for data in self.files.values())
        assert (self.fs.birthtime_ns(path) or 1) > 0
        assert self.fs.statvfs(path).f_namemax == 255
        assert self.fs.access(path, os.R_OK)

    def xattrs(self) -> None:
        path, value = self.some(), self.rng.randbytes(self.rng.randrange(200))
        self.fs.setxattr(path, "user.soak", value)
        assert self.fs.getxattr(path, "user.soak") == value
        assert "user.soak" in self.fs.listxattr(path)
        self.fs.removexattr(path, "user.soak")

    def sync(self) -> None:
        file, _ = self.opened()
        with file:
            (self.fs.fsync if self.rng.random() < 0.5 else self.fs.fdatasync)(file)
            if self.rng.random() < 0.02:
                self.fs.syncfs(file)

    # ---- what all want

    def contend(self) -> None:
        def path() -> str:
            return "/common/" + "/".join(self.rng.choice("abc") for _ in range(self.rng.randint(1, 3)))

        fs, rng = self.fs, self.rng
        actions: list[Callable[[], object]] = [
            lambda: fs.mkdir(path()),
            lambda: fs.rmdir(path()),
            lambda: fs.write_bytes(path(), rng.randbytes(rng.randrange(3000))),
            lambda: fs.read_bytes(path()),
            lambda: fs.unlink(path()),
            lambda: fs.rename(path(), path(), rng.choice((0, Rename.NOREPLACE, Rename.EXCHANGE))),
            lambda: fs.link(path(), path()),
            lambda: fs.symlink(path(), path()),
            lambda: [entry.stat() for entry in fs.scandir(path())],
            lambda: fs.truncate(path(), rng.randrange(9000)),
            lambda: fs.chmod(path(), 0o755),
            lambda: fs.setxattr(path(), "user.common", b"x"),
            lambda: fs.stat(path()),
        ]
        try:
            rng.choice(actions)()
        except OSError as problem:
            if problem.errno not in ALLOWED:
                raise
            self.done[errno.errorcode[problem.errno]] += 1
        if rng.random() < 0.001:
            fs.drop_caches()

    # ---- locks

    def flock(self) -> None:
        """Under it a number is counted up, past the caches."""
        with self.fs.open("/locked", os.O_RDWR | os.O_DIRECT) as file:
            if self.rng.random() < 0.3:
                try:
                    self.fs.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
            else:
                self.fs.flock(file, fcntl.LOCK_EX)
            number = int.from_bytes(file.pread(8, 0), "little")
            self.holders.hold("flock")
            file.pwrite((number + 1).to_bytes(8, "little"), 0)
            self.counted += 1
            if self.rng.random() < 0.5:
                self.fs.flock(file, fcntl.LOCK_UN)  # else RELEASE lets it go

    def lockf(self) -> None:
        slot = self.rng.randrange(SLOTS)
        with self.fs.open("/ranges", os.O_RDWR) as file:
            self.fs.lockf(file, fcntl.LOCK_EX, 10, 10 * slot, owner=self.number)
            self.holders.hold(slot)
            self.fs.lockf(file, fcntl.LOCK_UN, 10, 10 * slot, owner=self.number)


class Raw(Worker):
    """One thread of the raw guest, with a queue of its own; waits for locks, and gives up waiting."""

    def __init__(self, ops: Operations, shared: Shared, index: int, holders: Holders) -> None:
        super().__init__(ops, shared, index)
        self.holders = holders
        self.ranges = ops.lookup(ROOT, b"ranges").nodeid
        self.fh = ops.open(self.ranges, os.O_RDWR)

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            super().run(time.monotonic() + 0.05)
            self.wait_for_lock()
        self.ops.release(self.ranges, self.fh)
        self.ops.forget(self.ranges)
        for nodeid, n in self.lookups.items():
            self.ops.forget(nodeid, n)

    def wait_for_lock(self) -> None:
        slot, queue = self.choose.randrange(SLOTS), self.ops.queue
        where = (10 * slot, 10 * slot + 9)
        token = queue.submit(
            "SETLKW", self.ranges, abi.LK_IN.pack(self.fh, self.index, *where, fcntl.F_WRLCK, 77, 0, 0)
        )
        if self.choose.random() < 0.5:
            unique = queue._pending[token].unique
            self.ops.body("INTERRUPT", 0, abi.INTERRUPT_IN.pack(unique))
        error = queue.wait(token, 60).error
        assert error in (0, errno.EINTR), os.strerror(error)
        self.done["lock" if error == 0 else "interrupted lock"] += 1
        if error == 0:
            self.holders.hold(slot)
            self.ops.body(
                "SETLK", self.ranges, abi.LK_IN.pack(self.fh, self.index, *where, fcntl.F_UNLCK, 77, 0, 0)
            )


def run_all(work: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as problem:
            failures.append(problem)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 120)
        assert not thread.is_alive(), f"a thread hangs; {failures[:3]}"
    if failures:
        for failure in failures[1:4]:
            failures[0].add_note(f"and {failure!r}")
        raise failures[0]


def session_ends(daemon: Daemon) -> Iterator[list[int]]:
    """What sessions held when they ended, and what that left: inodes, handles, anchors each."""
    counts = r"(\d+) inodes, (\d+) handles, (\d+) anchors"
    for found in re.finditer(f"the session held {counts}, which leaves {counts}", daemon.log):
        yield [int(n) for n in found.groups()]


def test_everything_at_once(daemon: StartDaemon, tmp_path: Path) -> None:
    share = tmp_path / "share"
    (share / "common").mkdir(parents=True)
    (share / "locked").write_bytes(bytes(8))
    (share / "ranges").write_bytes(bytes(100))
    for k in range(FILES):
        (share / os.fsdecode(name(k))).write_bytes(content(k))
    options = ["--xattr", "--flock", "--posix-lock", "--fd-budget", str(FD_BUDGET), "--log-level", "debug",
               "--num-request-queues", str(RAW)]  # fmt: skip
    served = daemon(share, options=options)
    before = len(served.descriptors())
    holders = Holders()
    with ExitStack() as stack:
        mounts = [stack.enter_context(mount(served.socket, queues=1 + n % 2)) for n in range(MOUNTS)]
        raw = Guest(served.socket, request_queues=RAW)
        stack.callback(raw.close)
        raw.init()
        inos = [(share / os.fsdecode(name(k))).stat().st_ino for k in range(FILES)]
        shared = Shared(raw.on(0), inos)
        workers = [Raw(raw.on(1 + n), shared, 1000 + n, holders) for n in range(RAW)]
        threads = [Thread(mounts[n % MOUNTS], n, holders) for n in range(MOUNTS * THREADS_EACH)]
        until = time.monotonic() + SECONDS
        everybody: list[Thread | Raw] = [*threads, *workers]
        run_all([partial(one.run, until) for one in everybody])
        done = sum((one.done for one in everybody), Counter[str]())
        print(", ".join(f"{what} {n}" for what, n in done.most_common()))
        check_host(share, threads)
        for _, nodeid, fh in shared.handles:
            raw.release(nodeid, fh)
        for fs in mounts:
            fs.drop_caches()
            fs.device.transport.drain()
        assert objects.alive()["inodes"] == MOUNTS  # the roots
        raw.destroy()
        for fs in mounts:
            fs.close()
    ends = list(session_ends(served))
    assert len(ends) > MOUNTS and all(end == [0] * 6 for end in ends), ends
    assert eventually(lambda: len(served.descriptors()) == before), served.descriptors()


def check_host(share: Path, threads: list[Thread]) -> None:
    counted = int.from_bytes((share / "locked").read_bytes(), "little")
    assert counted == sum(thread.counted for thread in threads)
    for thread in threads:
        found = {f"{thread.top}/{entry.name}" for entry in os.scandir(f"{share}{thread.top}")}
        assert found == thread.files.keys()
        for path, data in thread.files.items():
            assert Path(f"{share}{path}").read_bytes() == data, path
