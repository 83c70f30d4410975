"""What ends one guest's server ends that guest alone."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon
from guests.daemon import eventually

from vfsd.vhost.messages import PeerClosed

SLOW_S = 5.0  # generous: what an answer may take on a busy machine


@pytest.fixture
def sandbox() -> str:
    return "namespace"


@pytest.fixture
def apart(tmp_path: Path, sandbox: str) -> Iterator[Daemon]:
    """Its exit status is for the test to look at."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_bytes(b"content")
    daemon = Daemon(tmp_path / "share", options=["--posix-lock", "--no-keeper", "--sandbox", sandbox])
    yield daemon
    daemon.kill()


@contextlib.contextmanager
def connected(daemon: Daemon) -> Iterator[tuple[Guest, int]]:
    """A guest that has a file open, and its server's process id."""
    before = set(daemon.servers())
    with Guest(daemon.socket) as guest:
        guest.init()
        (pid,) = set(daemon.servers()) - before
        yield guest, pid


class Worker:
    """A guest that works all the time, in a thread."""

    def __init__(self, guest: Guest) -> None:
        self.answers = 0
        self.slowest = 0.0
        self._guest = guest
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def goes_on(self) -> bool:
        before = self.answers
        return eventually(lambda: self.answers > before + 100, 20) and self.slowest < SLOW_S

    def _work(self) -> None:
        nodeid = self._guest.walk("file")
        fh = self._guest.open(nodeid)
        while not self._stopped.is_set():
            began = time.monotonic()
            assert self._guest.read(nodeid, fh, 0, 10) == b"content"
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.answers += 1


def is_closed(guest: Guest) -> bool:
    guest.sock.settimeout(20)
    with contextlib.suppress(ConnectionResetError):
        return guest.sock.recv(1) == b""
    return True


# The first process of a PID namespace is sent none from outside but SIGKILL; faults of its own end it, too.
@pytest.mark.parametrize(
    ("number", "sandbox"),
    [
        (signal.SIGKILL, "namespace"),
        *((number, "none") for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)),
    ],
)
def test_a_signal_ends_one_guest(apart: Daemon, number: signal.Signals, sandbox: str) -> None:
    with connected(apart) as (victim, pid), connected(apart) as (other, _), Worker(other) as worker:
        victim.read(nodeid := victim.walk("file"), victim.open(nodeid), 0, 10)
        os.kill(pid, number)
        assert is_closed(victim)
        assert eventually(lambda: f"{pid} of a guest was ended by {number.name}" in apart.log), apart.log
        assert "its last request was READ" in apart.log
        assert worker.goes_on()
        with connected(apart) as (fresh, _):
            fresh.statfs()
    if number != signal.SIGABRT:  # a build that checks itself remembers that
        apart.stop()


def test_no_memory_ends_one_guest(apart: Daemon) -> None:
    """A ring of 32768 elements needs more than there is."""
    with connected(apart) as (victim, pid), connected(apart) as (other, _), Worker(other) as worker:
        vm = Path(f"/proc/{pid}/statm").read_text().split()[0]
        size = int(vm) * resource.getpagesize() + (1 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
        with pytest.raises((OSError, PeerClosed)):
            victim.add_region(0x9_0000_0000, 1 << 30)
        assert is_closed(victim)
        assert eventually(lambda: "can't be served: " in apart.log), apart.log
        assert worker.goes_on()
        with connected(apart) as (fresh, _):
            fresh.statfs()
    apart.stop()


def test_a_server_ends_with_its_supervisor(apart: Daemon) -> None:
    with connected(apart) as (guest, pid):
        os.kill(apart.pid, signal.SIGKILL)
        assert is_closed(guest)
        assert eventually(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_each_guest_has_its_own_descriptors(daemon: StartDaemon, tmp_path: Path) -> None:
    """One takes all it may; another may as many."""
    for number in range(100):
        (tmp_path / f"f{number}").touch()
    served = daemon(tmp_path, options=["--fd-budget", "96"])
    with connected(served) as (one, first), connected(served) as (two, second):
        for guest in (one, two):
            nodeids = [guest.lookup(ROOT, b"f%d" % number).nodeid for number in range(80)]
            assert len({guest.open(nodeid) for nodeid in nodeids}) == 80
        assert min(len(served.descriptors(pid)) for pid in (first, second)) > 80
