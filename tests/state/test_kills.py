"""Servers are killed one after the other while a guest works: it notices nothing."""

import contextlib
import fcntl
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon
from guests.daemon import eventually

from vfsd.guest import Filesystem, mount

KILLS = int(os.environ.get("VFSD_KILLS", "30"))
WORKERS = 4


def kill_server(daemon: Daemon) -> None:
    """And return when another one is there."""
    (pid,) = daemon.servers()
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: daemon.servers() not in ([], [pid])), daemon.log


def is_waiting(fs: Filesystem) -> bool:
    """Whether a request of the guest's has not been answered."""
    return any(queue.get("in_flight", 0) for queue in fs.stats()["queues"].values())


@pytest.fixture
def kept(daemon: StartDaemon, tmp_path: Path) -> Daemon:
    (tmp_path / "share").mkdir()
    return daemon(tmp_path / "share", options=["--keeper", "--flock", "--posix-lock", "--xattr"])


def test_a_file_that_was_removed_is_still_open(kept: Daemon) -> None:
    with mount(kept.socket) as fs, fs.open("/file", os.O_RDWR | os.O_CREAT) as file:
        file.write(b"content")
        fs.unlink("/file")
        kill_server(kept)
        assert file.pread(100, 0) == b"content"
        assert file.pwrite(b"CON", 0) == 3
        kill_server(kept)
        assert file.pread(100, 0) == b"CONtent"
        assert fs.listdir("/") == []


def test_a_file_whose_mode_has_changed_is_still_open(kept: Daemon) -> None:
    with mount(kept.socket) as fs, fs.open("/file", os.O_RDWR | os.O_CREAT) as file:
        fs.chmod("/file", 0)
        kill_server(kept)
        file.write(b"content")
    assert (kept.shared / "file").read_bytes() == b"content"


def test_locks_are_still_held_and_can_be_given_up(kept: Daemon) -> None:
    """Against the host, and against another guest of another server."""
    path = kept.shared / "file"
    path.write_bytes(b"content")
    with mount(kept.socket) as fs, fs.open("/file", os.O_RDWR) as ours, path.open("r+b") as host:
        fs.lockf(ours, fcntl.LOCK_EX, 10, 5)
        fs.lockf(ours, fcntl.LOCK_SH, 10, 100)
        fs.flock(ours, fcntl.LOCK_EX)
        for _ in range(2):
            kill_server(kept)
            with pytest.raises(BlockingIOError):
                fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
            fcntl.lockf(host, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 100)
            with pytest.raises(BlockingIOError):
                fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
            with pytest.raises(BlockingIOError):
                fcntl.flock(host, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fs.lockf(ours, fcntl.LOCK_UN, 10, 5)
        fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
        fs.flock(ours, fcntl.LOCK_UN)
        fcntl.flock(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_waits_for_a_lock_gets_it_from_the_next_server(kept: Daemon) -> None:
    path = kept.shared / "file"
    path.write_bytes(b"content")
    with mount(kept.socket) as fs, fs.open("/file", os.O_RDWR) as ours, path.open("r+b") as host:
        fcntl.lockf(host, fcntl.LOCK_EX)
        waiter = threading.Thread(target=lambda: fs.lockf(ours, fcntl.LOCK_EX))
        waiter.start()
        assert eventually(lambda: is_waiting(fs))
        for _ in range(3):
            kill_server(kept)
            assert waiter.is_alive()
        fcntl.lockf(host, fcntl.LOCK_UN)
        waiter.join(10)
        assert not waiter.is_alive()
        with pytest.raises(BlockingIOError):
            fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nothing_is_left_over_after_many_deaths(kept: Daemon) -> None:
    for n in range(50):
        (kept.shared / f"file{n}").write_bytes(b"%d" % n)
    with mount(kept.socket) as fs:
        for n in range(50):
            fs.read_bytes(f"/file{n}")
        kill_server(kept)
        fs.read_bytes("/file0")
        before = Counter(kept.descriptors())
        for n in range(KILLS):
            kill_server(kept)
            assert fs.read_bytes(f"/file{n % 50}") == b"%d" % (n % 50)
        assert eventually(lambda: Counter(kept.descriptors()) == before)


class Worker(threading.Thread):
    """Makes, renames, extends and removes files in a directory of its own, and knows what has to be there."""

    def __init__(self, fs: Filesystem, number: int) -> None:
        super().__init__()
        self.fs = fs
        self.where = f"/worker{number}"
        self.random = random.Random(number)
        self.known: dict[str, bytes] = {}
        self.steps = 0
        self.longest = 0.0
        self.over = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self.fs.mkdir(self.where)
            while not self.over.is_set():
                began = time.monotonic()
                self.step()
                self.longest = max(self.longest, time.monotonic() - began)
                self.steps += 1
        except BaseException as problem:
            self.problem = problem

    def step(self) -> None:
        act = self.random.choice([self.make, self.make, self.rename, self.append, self.remove, self.look])
        act()

    def make(self) -> None:
        name = f"file{self.random.randrange(20)}"
        flags = os.O_WRONLY | os.O_CREAT | (0 if name in self.known else os.O_EXCL) | os.O_TRUNC
        content = self.random.randbytes(self.random.randrange(5000))
        with self.fs.open(f"{self.where}/{name}", flags) as file:
            file.write(content)
        self.known[name] = content

    def rename(self) -> None:
        if self.known:
            old = self.random.choice(sorted(self.known))
            new = f"file{self.random.randrange(20)}"
            self.fs.rename(f"{self.where}/{old}", f"{self.where}/{new}")
            self.known[new] = self.known.pop(old)

    def append(self) -> None:
        if self.known:
            name = self.random.choice(sorted(self.known))
            more = self.random.randbytes(100)
            with self.fs.open(f"{self.where}/{name}", os.O_WRONLY | os.O_APPEND) as file:
                assert file.write(more) == len(more)
            self.known[name] += more

    def remove(self) -> None:
        if self.known:
            name = self.random.choice(sorted(self.known))
            self.fs.unlink(f"{self.where}/{name}")
            del self.known[name]

    def look(self) -> None:
        assert sorted(self.fs.listdir(self.where)) == sorted(self.known)
        for name, content in self.known.items():
            assert self.fs.read_bytes(f"{self.where}/{name}") == content


@contextlib.contextmanager
def working(fs: Filesystem) -> Iterator[list[Worker]]:
    workers = [Worker(fs, number) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.over.set()
        for worker in workers:
            worker.join()


def have_gone_on(workers: list[Worker], before: list[int]) -> bool:
    return all(w.problem or w.steps > steps for w, steps in zip(workers, before, strict=True))


def test_a_busy_guest_notices_no_kill(kept: Daemon) -> None:
    with mount(kept.socket, queues=2) as fs:
        with working(fs) as workers:
            for _ in range(KILLS):
                before = [worker.steps for worker in workers]
                kill_server(kept)
                assert eventually(lambda: have_gone_on(workers, before))  # noqa: B023
        for worker in workers:
            if worker.problem is not None:
                raise worker.problem
    for worker in workers:
        found = {p.name: p.read_bytes() for p in (kept.shared / worker.where[1:]).iterdir()}
        assert found == worker.known
