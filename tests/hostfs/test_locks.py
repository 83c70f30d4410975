"""Locks of raw guests: between owners, guests and the host, now and after a wait."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import F_RDLCK, F_UNLCK, F_WRLCK
from pathlib import Path

import pytest
from fuse.fixtures import LEFT, StartGuest
from fuse.ops import Operations, refused
from fuse.rawguest import Guest, GuestQueue
from fuse.wire import ROOT
from guests import Daemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Init

END = 2**63 - 1
WHOLE = (0, END)
# Commands of a host process: take the lock, say so, hold it until told.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
{take}
print("held", flush=True)
sys.stdin.readline()
"""
FLOCK = "fcntl.flock(file, fcntl.LOCK_EX)"
POSIX = "fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)"


@dataclass
class File:
    """An open file of a guest."""

    queue: GuestQueue
    nodeid: int
    fh: int

    def args(self, owner: int, kind: int, where: tuple[int, int], flags: int, pid: int = 77) -> bytes:
        return abi.LK_IN.pack(self.fh, owner, *where, kind, pid, flags, 0)

    def lock(self, owner: int, kind: int, where: tuple[int, int] = WHOLE, flags: int = 0) -> None:
        Operations(self.queue).body("SETLK", self.nodeid, self.args(owner, kind, where, flags))

    def unlock(self, owner: int, where: tuple[int, int] = WHOLE) -> None:
        self.lock(owner, F_UNLCK, where)

    def flock(self, kind: int) -> None:
        self.lock(1, kind, WHOLE, abi.LK_FLOCK)

    def wait(self, owner: int, kind: int, where: tuple[int, int] = WHOLE, flags: int = 0) -> int:
        return self.queue.submit("SETLKW", self.nodeid, self.args(owner, kind, where, flags))

    def ended(self, token: int) -> int:
        """The errno a wait ended with, 0 for none."""
        return self.queue.wait(token).error

    def test(self, owner: int, kind: int, where: tuple[int, int] = WHOLE) -> tuple[int, int, int, int]:
        """start, end, type, pid"""
        body = Operations(self.queue).body("GETLK", self.nodeid, self.args(owner, kind, where, 0))
        start, end, found, pid = abi.LK_OUT.unpack(body)
        return start, end, found, pid

    def flush(self, owner: int) -> None:
        Operations(self.queue).body("FLUSH", self.nodeid, abi.FLUSH_IN.pack(self.fh, 0, 0, owner))

    def release(self) -> None:
        Operations(self.queue).release(self.nodeid, self.fh)

    def still_waits(self, *tokens: int) -> bool:
        """Whether none of them has been answered, though a request that came later has."""
        Operations(self.queue).getattr(self.nodeid)
        return not any(token in self.queue._done for token in tokens)


def opened(guest: Guest, name: str = "file", flags: int = os.O_RDWR, queue: int = 1) -> File:
    ops = guest.on(queue)
    nodeid = ops.walk(name)
    return File(guest.queues[queue], nodeid, ops.open(nodeid, flags))


@pytest.fixture
def path(share: Path) -> Path:
    (share / "file").write_bytes(bytes(100))
    return share / "file"


@pytest.fixture
def file(guest: Guest, path: Path) -> File:
    return opened(guest)


@pytest.fixture
def other(start_guest: StartGuest, path: Path) -> File:
    """The same file in another guest."""
    guest = start_guest()
    guest.init()
    return opened(guest)


@contextmanager
def on_host(path: Path, take: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of the host that holds a lock until the end of the block, or of its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(take=take), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.communicate("end\n", timeout=20)


def host_may(path: Path, kind: int, where: tuple[int, int] = WHOLE, *, flock: bool = False) -> bool:
    """Whether an open file of this process, a lock owner of its own, could have that lock."""
    start, end = where
    with path.open("r+b") as file:
        if flock:
            operation = fcntl.LOCK_EX if kind == F_WRLCK else fcntl.LOCK_SH
            try:
                fcntl.flock(file, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
        length = 0 if end == END else end - start + 1
        asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
        return bool(struct.unpack("hhqqi4x", fcntl.fcntl(file, 36, asked))[0] == F_UNLCK)  # F_OFD_GETLK


# ---- at once


def test_locks_are_offered_where_asked_for(start_guest: StartGuest) -> None:
    agreed = start_guest().init().flags
    assert agreed & Init.FLOCK_LOCKS and agreed & Init.POSIX_LOCKS


def test_posix_locks_exclude_owners_guests_and_the_host(file: File, other: File, path: Path) -> None:
    file.lock(1, F_WRLCK, (10, 19))
    for refused_one in (file, other):
        with refused(errno.EAGAIN):
            refused_one.lock(2, F_RDLCK, (19, 19))
        refused_one.lock(2, F_WRLCK, (20, 29) if refused_one is file else (30, 39))
    assert not host_may(path, F_RDLCK, (0, 10))
    assert host_may(path, F_RDLCK, (0, 9))
    # The same number of another guest is another owner; one's own locks are replaced.
    with refused(errno.EAGAIN):
        other.lock(1, F_RDLCK, (10, 10))
    file.lock(1, F_RDLCK, (10, 19))
    other.lock(1, F_RDLCK, (10, 10))
    assert host_may(path, F_RDLCK, (0, 19)) and not host_may(path, F_WRLCK, (19, 19))
    file.unlock(1)
    other.unlock(1)
    assert host_may(path, F_WRLCK, (0, 19))
    with refused(errno.EAGAIN):
        other.lock(1, F_WRLCK, (0, 20))


def test_flock_excludes_open_files_guests_and_the_host(
    guest: Guest, file: File, other: File, path: Path
) -> None:
    file.flock(F_RDLCK)
    other.flock(F_RDLCK)
    assert host_may(path, F_RDLCK, flock=True) and not host_may(path, F_WRLCK, flock=True)
    second = opened(guest)
    with refused(errno.EAGAIN):
        second.flock(F_WRLCK)
    other.flock(F_UNLCK)
    file.flock(F_WRLCK)
    with refused(errno.EAGAIN):
        second.flock(F_RDLCK)
    assert not host_may(path, F_RDLCK, flock=True)
    assert host_may(path, F_WRLCK), "a flock is no POSIX lock"
    file.release()
    assert host_may(path, F_WRLCK, flock=True)


@pytest.mark.parametrize("flock", [False, True])
def test_what_an_open_file_locked_ends_with_it(guest: Guest, path: Path, flock: bool) -> None:
    """Linux sends no FLUSH by the owner of an open file description lock."""
    file, another = opened(guest), opened(guest)
    file.lock(1, F_WRLCK, (0, 9))
    another.lock(2, F_WRLCK, (10, 19))
    if flock:
        file.flock(F_WRLCK)
    file.release()
    assert host_may(path, F_WRLCK, (0, 9)) and host_may(path, F_WRLCK, flock=True)
    assert not host_may(path, F_RDLCK, (10, 19))


def test_a_conversion_that_fails_loses_the_lock_as_flock_has_it(file: File, other: File, path: Path) -> None:
    file.flock(F_RDLCK)
    other.flock(F_RDLCK)
    with refused(errno.EAGAIN):
        file.flock(F_WRLCK)
    other.flock(F_WRLCK)  # nobody else has one any more
    other.flock(F_UNLCK)
    file.flock(F_RDLCK)
    with on_host(path, "fcntl.flock(file, fcntl.LOCK_SH)"):
        with refused(errno.EAGAIN):
            file.flock(F_WRLCK)
        other.flock(F_RDLCK)
    other.flock(F_WRLCK)


def test_the_host_excludes_guests(file: File, path: Path) -> None:
    with on_host(path, POSIX):
        with refused(errno.EAGAIN):
            file.lock(1, F_RDLCK, (0, 5))
        file.lock(1, F_RDLCK, (0, 4))
        assert file.test(1, F_RDLCK) == (5, 14, F_WRLCK, 0xFFFFFFFF)
    file.lock(1, F_WRLCK)
    file.unlock(1)
    with on_host(path, FLOCK), refused(errno.EAGAIN):
        file.flock(F_RDLCK)
    file.flock(F_RDLCK)


def test_getlk_tells_who_stands_in_the_way(file: File, other: File) -> None:
    file.lock(1, F_RDLCK, (10, 19))
    file.lock(1, F_RDLCK, (20, 29))  # they touch: it is one
    file.lock(1, F_WRLCK, (40, END))
    assert file.test(2, F_WRLCK) == (10, 29, F_RDLCK, 77)
    assert other.test(1, F_WRLCK) == (10, 29, F_RDLCK, 0xFFFFFFFF)
    assert file.test(2, F_RDLCK) == (40, END, F_WRLCK, 77)
    assert file.test(2, F_RDLCK, (0, 39))[2] == F_UNLCK
    assert file.test(1, F_WRLCK)[2] == F_UNLCK
    file.unlock(1, (15, 24))
    assert file.test(2, F_WRLCK, (12, 39)) == (10, 14, F_RDLCK, 77)
    assert file.test(2, F_WRLCK, (15, 39)) == (25, 29, F_RDLCK, 77)


def test_read_locks_become_write_locks_on_another_handle(guest: Guest, path: Path) -> None:
    reader, writer = opened(guest, flags=os.O_RDONLY), opened(guest, flags=os.O_WRONLY)
    reader.lock(1, F_RDLCK, (0, 9))
    writer.lock(1, F_WRLCK, (20, 29))
    assert not host_may(path, F_WRLCK, (0, 9)) and not host_may(path, F_RDLCK, (20, 29))
    assert host_may(path, F_RDLCK, (0, 9))
    writer.flush(1)
    assert host_may(path, F_WRLCK)


def test_bad_locks_are_refused_as_linux_does(guest: Guest, file: File, path: Path) -> None:
    reader, writer = opened(guest, flags=os.O_RDONLY), opened(guest, flags=os.O_WRONLY)
    for bad, where, kind, flags in (
        (errno.EINVAL, WHOLE, 3, 0),
        (errno.EINVAL, WHOLE, -1 & 0xFFFFFFFF, 0),
        (errno.EINVAL, (2**63, 2**63 + 5), F_WRLCK, 0),
        (errno.EINVAL, (10, 9), F_WRLCK, 0),
        (errno.EOVERFLOW, (5, 2**63), F_WRLCK, 0),
        (errno.EOVERFLOW, (5, 2**64 - 1), F_RDLCK, 0),
        (errno.EINVAL, WHOLE, F_WRLCK, 2),
        (errno.EINVAL, WHOLE, F_WRLCK, 0x80000001),
    ):
        for op in ("SETLK", "SETLKW", "GETLK"):
            with refused(bad):
                guest.body(op, file.nodeid, file.args(1, kind, where, flags))
    with refused(errno.EBADF):
        reader.lock(1, F_WRLCK)
    with refused(errno.EBADF):
        writer.lock(1, F_RDLCK)
    reader.flock(F_WRLCK)
    with refused(errno.EINVAL):
        file.test(1, F_UNLCK)
    with refused(errno.EINVAL):
        guest.body("GETLK", file.nodeid, file.args(1, F_RDLCK, WHOLE, abi.LK_FLOCK))
    with refused(errno.EINVAL):
        guest.body("SETLK", file.nodeid, file.args(1, F_RDLCK, WHOLE, 0)[:-1])
    for fh in (0, file.fh + 100, 2**64 - 1):
        with refused(errno.EBADF):
            File(file.queue, file.nodeid, fh).lock(1, F_WRLCK)
        with refused(errno.EBADF):
            File(file.queue, file.nodeid, fh).flock(F_WRLCK)
    assert host_may(path, F_WRLCK)


def test_too_many_locks_are_refused_and_can_be_given_up(guest: Guest, file: File, share: Path) -> None:
    taken = 0
    files = [file]
    with refused(errno.ENOLCK):
        while True:  # in many files: in one, the host takes long
            for where in range(0, 1000, 2):
                files[-1].lock(1, F_WRLCK, (where, where))
                taken += 1
            (share / "file").rename(share / str(taken))
            (share / "file").write_bytes(b"")
            files.append(opened(guest))
    assert taken > 10000
    file.unlock(1, (10, 20))
    file.lock(1, F_WRLCK, (10, 10))
    file.unlock(1)
    file.lock(2, F_WRLCK)


# ---- after a wait


@pytest.mark.parametrize("flags", [0, abi.LK_FLOCK])
def test_a_waiter_gets_the_lock_and_others_are_served_meanwhile(file: File, other: File, flags: int) -> None:
    other.lock(1, F_WRLCK, flags=flags)
    token = file.wait(1, F_WRLCK, flags=flags)
    for _ in range(100):
        assert file.still_waits(token)
    other.lock(1, F_UNLCK, flags=flags)
    assert file.ended(token) == 0
    with refused(errno.EAGAIN):
        other.lock(1, F_RDLCK, flags=flags)


@pytest.mark.parametrize(("take", "flags"), [(POSIX, 0), (FLOCK, abi.LK_FLOCK)])
def test_a_waiter_gets_what_a_host_process_gives_up(file: File, path: Path, take: str, flags: int) -> None:
    with on_host(path, take):
        tokens = [file.wait(owner, F_RDLCK, flags=flags) for owner in (1, 2, 3)]
        assert file.still_waits(*tokens)
    assert [file.ended(token) for token in tokens] == [0, 0, 0]
    assert not host_may(path, F_WRLCK, flock=bool(flags))


def test_a_waiter_gets_what_a_dying_guest_held(start_guest: StartGuest, file: File, path: Path) -> None:
    victim = start_guest()
    victim.init()
    held = opened(victim)
    held.lock(1, F_WRLCK)
    held.flock(F_WRLCK)
    tokens = [file.wait(1, F_WRLCK), file.wait(1, F_WRLCK, flags=abi.LK_FLOCK)]
    assert file.still_waits(*tokens)
    victim.close()
    assert [file.ended(token) for token in tokens] == [0, 0]


def test_a_waiter_whose_guest_dies_is_forgotten(start_guest: StartGuest, file: File, served: Daemon) -> None:
    victim = start_guest()
    victim.init()
    waiting = opened(victim)
    file.lock(1, F_WRLCK)
    assert waiting.still_waits(waiting.wait(1, F_WRLCK))
    before = served.log.count(LEFT)
    victim.close()
    assert eventually(lambda: served.log.count(LEFT) > before)
    file.unlock(1)
    file.lock(2, F_WRLCK)


@pytest.mark.parametrize("end", ["release", "flush", "destroy", "stop", "reset"])
def test_a_wait_ends_with_what_it_waits_through(start_guest: StartGuest, file: File, end: str) -> None:
    guest = start_guest(request_queues=2)
    guest.init()
    waiting = opened(guest, queue=2)
    file.lock(1, F_WRLCK, (0, 9))
    waiting.lock(5, F_WRLCK, (20, 29))
    token = waiting.wait(5, F_WRLCK, (0, 9))
    assert waiting.still_waits(token)
    if end == "release":
        waiting.release()
    elif end == "flush":
        waiting.flush(6)
        assert waiting.still_waits(token)
        waiting.flush(5)
    elif end == "destroy":
        guest.destroy()
    elif end == "stop":
        guest.frontend.get_vring_base(2)
    else:
        guest.frontend.reset_device(ack=True)
    assert waiting.ended(token) == (errno.EBADF if end in ("release", "flush") else errno.ENOLCK)
    if end in ("flush", "destroy", "reset"):
        file.lock(1, F_WRLCK, (20, 29))
    file.unlock(1)
    file.lock(2, F_WRLCK, (0, 9))


def test_an_interrupt_ends_the_wait_it_is_for_alone(start_guest: StartGuest, file: File) -> None:
    guest = start_guest()
    guest.init()
    waiting = opened(guest)
    file.lock(1, F_WRLCK)
    first, second = waiting.wait(1, F_WRLCK), waiting.wait(2, F_WRLCK)
    assert waiting.still_waits(first, second)
    unique = waiting.queue._pending[first].unique
    Operations(file.queue).body("INTERRUPT", 0, abi.INTERRUPT_IN.pack(unique))  # of another guest
    assert waiting.still_waits(first, second)
    guest.body("INTERRUPT", 0, abi.INTERRUPT_IN.pack(unique))
    assert waiting.ended(first) == errno.EINTR
    assert waiting.still_waits(second)
    file.unlock(1)
    assert waiting.ended(second) == 0


def test_a_wait_goes_on_while_memory_is_plugged_in(start_guest: StartGuest, file: File) -> None:
    guest = start_guest()
    guest.init()
    waiting = opened(guest)
    file.lock(1, F_WRLCK)
    token = waiting.wait(1, F_WRLCK)
    assert waiting.still_waits(token)
    guest.add_region(0x9_0000_0000, 1 << 20)
    assert waiting.still_waits(token)
    file.unlock(1)
    assert waiting.ended(token) == 0


def test_a_ring_of_owners_is_a_deadlock(file: File, other: File) -> None:
    file.lock(1, F_WRLCK, (0, 0))
    file.lock(2, F_WRLCK, (1, 1))
    other.lock(1, F_WRLCK, (2, 2))
    first = file.wait(1, F_WRLCK, (1, 1))
    second = file.wait(2, F_WRLCK, (2, 2))
    assert file.still_waits(first, second)
    assert other.ended(other.wait(1, F_WRLCK, (0, 0))) == errno.EDEADLK
    other.unlock(1)
    assert file.ended(second) == 0
    file.unlock(2)
    assert file.ended(first) == 0


def test_a_deadlock_that_comes_about_while_waiting_is_seen(file: File, other: File) -> None:
    """Two wait for one lock; who gets it would then wait for who does not."""
    file.lock(1, F_WRLCK, (0, 0))
    file.lock(3, F_WRLCK, (8, 8))
    other.lock(2, F_WRLCK, (9, 9))
    waits = [(3, file, file.wait(3, F_WRLCK, (0, 0))), (2, other, other.wait(2, F_WRLCK, (0, 0)))]
    for _, waiting, token in waits:
        assert waiting.still_waits(token)
    file.unlock(1)
    winner, to, _ = ready(waits, 15)[0]
    _, waiting, token = next(wait for wait in waits if wait[0] != winner)
    assert waiting.still_waits(token)
    asked = (9, 9) if winner == 3 else (8, 8)
    assert to.ended(to.wait(winner, F_WRLCK, asked)) == errno.EDEADLK
    assert waiting.still_waits(token)
    to.unlock(winner)
    assert waiting.ended(token) == 0


def test_a_thousand_waiters_keep_nobody_waiting(start_guest: StartGuest, file: File, served: Daemon) -> None:
    guest = start_guest(num=1024)
    guest.init()
    waiting = opened(guest)
    file.lock(1, F_WRLCK)
    server = served.servers()[-1]
    threads, memory = status(server)
    tokens = [waiting.wait(owner, F_WRLCK) for owner in range(1, 1001)]
    for _ in range(200):
        assert waiting.still_waits(*tokens[:1], *tokens[-1:])
    many, more = status(server)
    assert many <= threads + 1 and more - memory < 8 << 20
    file.unlock(1)
    # One after the other, in the order they came.
    for owner, token in enumerate(tokens, 1):
        assert waiting.ended(token) == 0
        assert waiting.still_waits(*tokens[owner:][:1])
        waiting.unlock(owner)


def test_a_ring_is_never_full_of_waiters(start_guest: StartGuest, path: Path) -> None:
    """Or whoever holds the lock could not say that it gives it up."""
    guest = start_guest(num=64)
    guest.init()
    file = opened(guest)
    file.lock(1, F_WRLCK)
    tokens = [file.wait(owner, F_RDLCK) for owner in range(2, 50)]
    assert file.ended(file.wait(50, F_RDLCK)) == errno.ENOLCK
    assert file.still_waits(*tokens)
    file.unlock(1)
    assert [file.ended(token) for token in tokens] == [0] * len(tokens)


def status(pid: int) -> tuple[int, int]:
    """Threads, and bytes of resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["Threads"]), int(fields["VmRSS"].split()[0]) << 10


def test_waiters_of_two_guests_take_turns(start_guest: StartGuest, path: Path) -> None:
    """Each adds one to a number in the file, under the lock."""
    path.write_bytes(bytes(8))
    files = []
    for _ in range(2):
        guest = start_guest(request_queues=2)
        guest.init()
        files += [opened(guest, queue=1), opened(guest, queue=2)]
    for _ in range(25):
        left = [(owner, file, file.wait(owner, F_WRLCK)) for owner, file in enumerate(files, 1)]
        while left:
            owner, file, _ = mine = ready(left, 15)[0]
            ops = Operations(file.queue)
            count = int.from_bytes(ops.read(file.nodeid, file.fh, 0, 8), "little")
            assert not ready([one for one in left if one is not mine]), "two have it"
            ops.write(file.nodeid, file.fh, 0, (count + 1).to_bytes(8, "little"))
            file.unlock(owner)
            left.remove(mine)
    assert int.from_bytes(path.read_bytes(), "little") == 4 * 25


def ready(waits: list[tuple[int, File, int]], timeout_s: float = 0) -> list[tuple[int, File, int]]:
    """Those that have the lock, one at least if there is time to wait."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = [one for one in waits if has(*one[1:])]
        if found or time.monotonic() >= deadline:
            return found
        Operations(waits[0][1].queue).getattr(waits[0][1].nodeid)


def has(file: File, token: int) -> bool:
    Operations(file.queue).getattr(file.nodeid)  # takes what has been answered
    return token in file.queue._done and file.queue._done[token].error == 0


def test_nothing_is_left_of_a_session(guest: Guest, path: Path, served: Daemon) -> None:
    before = Counter(served.descriptors())
    files = [opened(guest) for _ in range(5)]
    for owner, file in enumerate(files, 1):
        file.lock(owner, F_WRLCK, (owner, owner))
        file.flock(F_RDLCK)
    guest.destroy()
    assert host_may(path, F_WRLCK) and host_may(path, F_WRLCK, flock=True)
    assert eventually(lambda: Counter(served.descriptors()) <= before)
    guest.init()
    opened(guest).lock(1, F_WRLCK)
    assert guest.listing(ROOT)
