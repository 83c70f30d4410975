"""When the guest is called: once for a reply that somebody waits for, once for several that nobody does.

A guest that was called looks at its used ring; one that does not has missed the call.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.rawguest import TIMEOUT_S, Guest, GuestQueue
from fuse.wire import ROOT, read_in
from guests import Daemon, StartDaemon

POLL_US = 1000  # the daemon calls again at the end of it
AGAIN_S = 0.1
BUSY = 50  # requests, so that the daemon polls
TRIES = 100  # it does not poll on a machine that is busy
NUM = 1024  # elements of the ring
STREAM = 512  # requests of one caller, each sent before the call for the last
BLOCK = 512
ENDS = 20
PAIRS = 100
OTHER_PID = 2**32 - 1
FULL = 8  # replies that it is called for at once, at most


def calls(queue: GuestQueue, timeout_s: float) -> int:
    """How often the guest has been called since the last time, waiting for it if it was not."""
    return os.eventfd_read(queue.call_fd) if select.select([queue.call_fd], [], [], timeout_s)[0] else 0


def calls_for_one(queue: GuestQueue) -> int:
    """How often the guest, busy until then, is called for a reply that it does not look at."""
    for _ in range(BUSY):
        assert queue.ask("GETATTR", ROOT, bytes(16)).error == 0
    assert not queue.ring.enable_call()  # nothing is there yet
    calls(queue, 0)
    token = queue.submit("GETATTR", ROOT, bytes(16))
    seen = calls(queue, TIMEOUT_S)
    while seen and (more := calls(queue, AGAIN_S)):
        seen += more
    assert queue.wait(token).error == 0
    return seen


def test_a_guest_that_does_not_look_is_called_again(module_daemon: StartDaemon, tmp_path: Path) -> None:
    """Once: user-mode Linux loses a call that arrives as it goes idle."""
    daemon = module_daemon(tmp_path, options=["--poll-us", str(POLL_US)])
    with guests_of(daemon) as start:
        guest = start()
        guest.init()
        for _ in range(TRIES):
            seen = calls_for_one(guest.queue)
            if seen != 1:
                break
        assert seen == 2


class Stream:
    """One caller who reads and goes on: asynchronous I/O."""

    def __init__(self, guest: Guest) -> None:
        self.queue = guest.queue
        self.entry, self.fh = guest.create(ROOT, b"file")
        assert guest.write(self.entry.nodeid, self.fh, 0, bytes(range(256)) * (BLOCK // 256)) == BLOCK
        self.half, self.stopped = threading.Event(), threading.Event()
        self.armed = 0  # what used.idx has to pass for a call
        assert not self.queue.ring.enable_call()
        calls(self.queue, 0)

    def start_anew(self) -> None:
        """With an empty ring, after it was stopped."""
        self.half.clear()
        self.stopped.clear()
        self.queue.make_ring()
        self.queue.start()
        calls(self.queue, 0)

    def prepare(self, n: int) -> list[int]:
        """Requests that only need avail_idx to be moved."""
        return [self.read() for _ in range(n)]

    def read(self, pid: int | None = None) -> int:
        args = read_in(self.fh, 0, BLOCK)
        return self.queue.submit("READ", self.entry.nodeid, args, pages=BLOCK, publish=False, pid=pid)

    def getattr(self) -> int:
        return self.queue.submit("GETATTR", self.entry.nodeid, bytes(16), publish=False)

    def go(self, tokens: list[int]) -> int:
        """Ask for one when the other is answered; how often the guest was called, and asked to be again."""
        queue, seen = self.queue, 0
        self.arm()
        for n in range(len(tokens)):
            if n == len(tokens) // 2:
                self.half.set()
            queue.avail_idx += 1
            queue.kick_always()
            if not self.answered(queue.avail_idx):
                return seen
            if calls(queue, 0):
                seen += 1
                self.arm()
        queue.ring.publish()
        return seen

    def arm(self) -> None:
        self.armed = self.queue.used_idx
        self.queue.call_after(self.armed)

    def answered(self, idx: int) -> bool:
        """Until used.idx is this, called or not. False: the ring was stopped before."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.queue.used_idx != idx:
            assert time.monotonic() < deadline
            if self.stopped.is_set():
                return False
        return True

    def end(self, tokens: list[int]) -> None:
        """All of them are answered; by calls alone the guest learns of it."""
        for token in tokens:
            assert len(self.queue.wait(token).body) == BLOCK


@contextlib.contextmanager
def first_on_the_machine(daemon: Daemon) -> Iterator[None]:
    """It and this thread have the CPUs before all others: it does not poll where somebody else would run."""
    threads = [0, *map(int, os.listdir(f"/proc/{daemon.server}/task"))]
    try:
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pytest.skip("only root may put a thread before all others")
    try:
        yield
    finally:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # a ring that was stopped has none any more
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def learnt(daemon: Daemon, stream: Stream) -> list[int]:
    """How often the guest was called in each stream, the last of which was called for several at a time.

    Anew where that was not so: a daemon that was wrong about a caller tries it more and more rarely.
    """
    found = []
    for n in range(TRIES):
        if n and n % 3 == 0:
            stream.queue.guest.frontend.get_vring_base(1)
            stream.start_anew()
        tokens = stream.prepare(STREAM)
        with first_on_the_machine(daemon):
            found.append(stream.go(tokens))
        stream.end(tokens)
        if found[-1] <= 2 * STREAM // FULL:
            break
    return found


def test_a_caller_that_goes_on_is_called_once_for_several(
    module_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = module_daemon(tmp_path, options=["--poll-us", str(POLL_US)])
    with guests_of(daemon) as start:
        guest = start(num=NUM)
        guest.init()
        found = learnt(daemon, Stream(guest))
        assert found[-1] <= 2 * STREAM // FULL, found


@pytest.mark.parametrize("other", [Stream.getattr, lambda stream: stream.read(OTHER_PID)])
def test_others_are_called_at_once(
    module_daemon: StartDaemon, tmp_path: Path, other: Callable[[Stream], int]
) -> None:
    """Between the requests of a caller that goes on: another operation, or another caller."""
    daemon = module_daemon(tmp_path, options=["--poll-us", str(POLL_US)])
    with guests_of(daemon) as start:
        guest = start(num=NUM)
        guest.init()
        stream = Stream(guest)
        assert learnt(daemon, stream)[-1] <= 2 * STREAM // FULL
        tokens = [token for _ in range(PAIRS) for token in (stream.read(), other(stream))]
        with first_on_the_machine(daemon):
            seen = stream.go(tokens)
        for token in tokens:
            assert stream.queue.wait(token).error == 0
        assert seen >= PAIRS // 2, seen


def test_a_ring_that_stops_owes_no_call(module_daemon: StartDaemon, tmp_path: Path) -> None:
    """Replies that wait for more are called for before GET_VRING_BASE is answered."""
    daemon = module_daemon(tmp_path, options=["--poll-us", str(POLL_US)])
    with guests_of(daemon) as start:
        guest = start(num=NUM)
        guest.init()
        stream = Stream(guest)
        for _ in range(ENDS):
            learnt(daemon, stream)
            tokens = stream.prepare(STREAM)
            with first_on_the_machine(daemon):
                thread = threading.Thread(target=stream.go, args=(tokens,))
                thread.start()
                assert stream.half.wait(TIMEOUT_S)
                base = guest.frontend.get_vring_base(1)
                stream.stopped.set()
                thread.join()
            assert stream.queue.used_idx == base
            assert base == stream.armed or calls(stream.queue, TIMEOUT_S), "replied to, and not called"
            stream.start_anew()
