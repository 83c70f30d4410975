"""What the front end says while a request hangs: it is heard at once or within a bound, and the rest goes on.

The share is a file system whose operations take as long as they are told to.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuse import wire
from fuse.rawguest import CANARY, Guest, readable
from fuse.wire import ROOT
from guests import Daemon, eventually
from vfsd_bench.model import NotOffered
from vfsd_bench.slowmount import SlowMount, slow_mount

from vfsd.fuse import abi
from vfsd.vhost.backend import STOP_TIMEOUT_S

HANGS_US = 3600 * 10**6
AT_ONCE_S = 2.0  # on a machine that has more to do; nothing here waits for more than a thread
PLUGGED = 0x40_0000_0000
COUNTER_FULL = 2**64 - 2


@dataclass
class Slow:
    """A guest with an open file of a share whose operations can be slow."""

    mount: SlowMount
    daemon: Daemon
    guest: Guest
    nodeid: int
    fh: int

    def begin(self, op: str, seconds: float | None = None) -> int:
        """A request that takes that long, or for ever, and is under way: its token."""
        self.mount.set_delay(op, HANGS_US if seconds is None else int(seconds * 1e6))
        size = 4096
        args = {"FSYNC": abi.FSYNC_IN.pack(self.fh, 0, 0), "READ": wire.read_in(self.fh, 0, size)}
        queue = self.guest.queue
        token = queue.submit(op, self.nodeid, args.get(op, b""), pages=size if op == "READ" else 0)
        assert eventually(self.is_under_way)
        return token

    def is_under_way(self) -> bool:
        """Whether a thread of the server waits for the file system (fs/fuse/dev.c)."""
        tasks = Path(f"/proc/{self.daemon.server}/task").iterdir()
        return any("request_wait_answer" in (task / "wchan").read_text() for task in tasks)

    def end(self) -> None:
        """The daemon is told to, and does."""
        os.kill(self.daemon.pid, signal.SIGTERM)
        assert eventually(lambda: not self.daemon.running(), 10)

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.server}/task"))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    with contextlib.ExitStack() as at_end:
        with contextlib.ExitStack() as stack:
            try:
                mount = stack.enter_context(slow_mount(tmp_path / "source", tmp_path / "share", 0))
            except NotOffered as why:
                pytest.skip(str(why))
            (mount.source / "file").write_bytes(b"content" * 1000)
            served = Daemon(mount.directory)
            # A server that waits for FUSE ends with the mount: not before, whatever signal it gets.
            at_end.callback(served.kill)
            guest = stack.enter_context(Guest(served.socket))
            guest.init()
            nodeid = guest.walk("file")
            yield Slow(mount, served, guest, nodeid, guest.open(nodeid, os.O_RDWR))
        assert "Traceback" not in served.log, served.log


def at_once(call: Callable[[], object]) -> None:
    began = time.monotonic()
    call()
    assert time.monotonic() - began < AT_ONCE_S


def test_descriptors_are_swapped_while_a_request_hangs(slow: Slow) -> None:
    """As QEMU does with each interrupt that a guest masks."""
    guest, queue = slow.guest, slow.guest.queue
    slow.begin("FSYNC")
    for _ in range(3):
        for name in ("call_fd", "kick_fd", "err_fd"):
            old, new = getattr(queue, name), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            tell = getattr(guest.frontend, f"set_vring_{name.removesuffix('_fd')}")
            at_once(lambda tell=tell, new=new: tell(queue.index, new, ack=True))  # type: ignore[misc]
            setattr(queue, name, new)
            os.close(old)
        at_once(guest.statfs)


def test_memory_comes_and_goes_while_a_request_hangs(slow: Slow) -> None:
    guest = slow.guest
    slow.begin("FSYNC")
    for _ in range(3):
        at_once(lambda: guest.add_region(PLUGGED, 1 << 16))
        region = guest.regions.pop()
        at_once(lambda region=region: guest.frontend.rem_mem_reg(region.region, ack=True))  # type: ignore[misc]
        guest.memory.remove(*region.region[:3])
        os.close(region.fd)
        at_once(guest.statfs)
    at_once(lambda: guest.frontend.set_mem_table(guest.regions, ack=True))
    at_once(guest.statfs)


def test_what_lies_in_new_memory_is_found_at_once(slow: Slow) -> None:
    """The thread that polls the ring has looked the old table up a moment before."""
    guest, queue = slow.guest, slow.guest.queue
    top, end = queue._top, queue.end
    for i in range(200):
        at = PLUGGED + (i << 20)
        guest.add_region(at, 1 << 16)
        queue._top, queue.end = at, at + (1 << 16)
        guest.statfs()
        queue._top, queue.end = top, end
        region = guest.regions.pop()
        guest.frontend.rem_mem_reg(region.region, ack=True)
        guest.memory.remove(*region.region[:3])
        os.close(region.fd)


@pytest.mark.parametrize("op", ["FSYNC", "STATFS"])
def test_a_ring_is_stopped_without_the_request_that_hangs(slow: Slow, op: str) -> None:
    """FSYNC by a thread that waits, STATFS by the one that has the ring. A late reply goes nowhere."""
    guest, queue = slow.guest, slow.guest.queue
    slow.begin(op, seconds=STOP_TIMEOUT_S + 3)
    next_avail = queue.avail_idx
    before = slow.threads()
    began = time.monotonic()
    assert guest.frontend.get_vring_base(queue.index) == next_avail
    assert STOP_TIMEOUT_S - 1 < time.monotonic() - began < STOP_TIMEOUT_S + AT_ONCE_S
    queue.make_ring()
    queue.start()
    slow.mount.set_delay(op, 0)
    used = queue.used_idx
    assert eventually(lambda: slow.threads() <= before, STOP_TIMEOUT_S + 10)
    time.sleep(3)  # it has come back by now
    assert queue.used_idx == used
    guest.statfs()
    assert "has not come back" in slow.daemon.log


def test_chains_behind_one_that_hangs_are_not_lost(slow: Slow) -> None:
    """They were taken from the ring together; those that nobody has begun are there at the next start."""
    guest, queue = slow.guest, slow.guest.queue
    slow.mount.set_delay("STATFS", HANGS_US)
    first = queue.avail_idx
    for _ in range(5):
        queue.submit("STATFS", slow.nodeid, publish=False)
    queue.ring.publish()
    queue.kick_always()
    assert eventually(slow.is_under_way)
    assert guest.frontend.get_vring_base(queue.index) == (first + 1) & 0xFFFF


def test_what_comes_back_late_leaves_memory_alone(slow: Slow) -> None:
    """By then it may belong to the kernel that has been booted since."""
    guest, queue = slow.guest, slow.guest.queue
    before = slow.threads()
    slow.begin("STATFS", seconds=STOP_TIMEOUT_S + 2)
    (pending,) = queue._pending.values()
    guest.frontend.stop(guest.order, guest.setup)
    assert eventually(lambda: slow.threads() < before, STOP_TIMEOUT_S + 10)
    data = b"".join(guest.memory.read(gpa, size) for gpa, size in pending.writable)
    assert data == CANARY * len(data)
    slow.mount.set_delay("STATFS", 0)
    for each in guest.queues:
        each.make_ring()
    guest.frontend.start(guest.order, guest.setup)
    guest.init()
    nodeid = guest.walk("file")
    assert guest.read(nodeid, guest.open(nodeid), 0, 7) == b"content"


def test_a_device_is_reset_while_a_request_hangs(slow: Slow) -> None:
    slow.begin("FSYNC")
    began = time.monotonic()
    slow.guest.frontend.reset_device(ack=True)
    assert time.monotonic() - began < STOP_TIMEOUT_S + AT_ONCE_S


@pytest.mark.parametrize("op", ["FSYNC", "STATFS", "READ"])
def test_the_end_waits_for_no_request(slow: Slow, op: str) -> None:
    slow.begin(op)
    slow.end()


def test_a_session_is_reset_while_closing_its_files_hangs(slow: Slow) -> None:
    """The clean-up is nobody's that answers the front end."""
    slow.mount.set_delay("FLUSH", HANGS_US)
    at_once(lambda: slow.guest.frontend.reset_device(ack=True))
    at_once(slow.guest.frontend.get_features)


# ---- descriptors that are full


def test_an_error_descriptor_that_is_full(slow: Slow) -> None:
    guest, queue = slow.guest, slow.guest.queue
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, COUNTER_FULL)
    guest.frontend.set_vring_err(queue.index, full, ack=True)
    queue.offer(queue.num)  # a descriptor outside of the table
    assert eventually(lambda: "broke a ring" in slow.daemon.log)
    at_once(lambda: guest.frontend.get_vring_base(queue.index))
    os.close(full)


def test_a_call_descriptor_that_is_full_and_made_to_block(slow: Slow) -> None:
    """One thread is caught in the write; neither messages nor the end of the process are."""
    guest, queue = slow.guest, slow.guest.queue
    full = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(full, COUNTER_FULL)
    guest.frontend.set_vring_call(queue.index, full, ack=True)
    os.set_blocking(full, True)
    queue.ring.enable_call()
    queue.submit("STATFS", ROOT)
    at_once(lambda: guest.frontend.set_vring_call(queue.index, queue.call_fd, ack=True))
    guest.frontend.get_vring_base(queue.index)
    slow.end()
    os.close(full)


def test_a_kick_socket_that_is_flooded(slow: Slow) -> None:
    guest, queue = slow.guest, slow.guest.queue
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    guest.frontend.set_vring_kick(queue.index, theirs.fileno(), ack=True)
    theirs.close()
    ours.settimeout(0.1)
    end = threading.Event()

    def flood() -> None:
        while not end.is_set():
            with contextlib.suppress(TimeoutError):
                ours.send(bytes(256))

    floods = [threading.Thread(target=flood) for _ in range(2)]
    for thread in floods:
        thread.start()
    try:
        for _ in range(10):
            at_once(guest.statfs)
        at_once(lambda: guest.frontend.get_vring_base(queue.index))
    finally:
        end.set()
        for thread in floods:
            thread.join()
        ours.close()
    assert not readable(queue.err_fd, 0)
