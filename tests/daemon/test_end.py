"""How it ends: also where the host's file system answers no more."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.rawguest import Guest
from guests import Daemon
from guests.daemon import eventually
from vfsd_bench.model import NotOffered
from vfsd_bench.slowmount import SlowMount, slow_mount

from vfsd.daemon.logs import SERVER_RATE
from vfsd.daemon.supervisor import EXIT_LEFT_BEHIND, KILLED_S
from vfsd.fuse.abi import INIT_IN_MIN

HANG_US = 60_000_000
STOP_S = 5.0  # --stop-timeout


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Daemon, SlowMount]]:
    """A daemon on a share that can be told to answer no more."""
    try:
        with slow_mount(tmp_path / "source", tmp_path / "place", 0) as slow:
            (slow.source / "file").write_bytes(b"content")
            daemon = Daemon(slow.directory)
            yield daemon, slow
        daemon.kill()  # its last server is free to go now
    except NotOffered as reason:
        pytest.skip(str(reason))


def test_a_share_that_never_answers_holds_nobody_else(hanging: tuple[Daemon, SlowMount]) -> None:
    daemon, slow = hanging
    with Guest(daemon.socket) as other:
        other.init()
        nodeid = other.walk("file")
        with Guest(daemon.socket) as victim:
            victim.init()
            fh = victim.open(file := victim.walk("file"))
            slow.set_delay("FSYNC", HANG_US)
            victim.queue.submit("FSYNC", file, fh.to_bytes(8, sys.byteorder) + bytes(8))
            assert eventually(lambda: blocked(daemon))
        assert other.getattr(nodeid).size == 7
        assert eventually(lambda: "can't be killed" in daemon.log or "has left" in daemon.log, 20)
        with Guest(daemon.socket) as fresh:
            fresh.init()
            fresh.statfs()
        began = time.monotonic()
        os.kill(daemon.pid, signal.SIGTERM)
        assert eventually(lambda: not daemon.running(), 30)
        assert time.monotonic() - began < STOP_S + KILLED_S + 10
    status = daemon._process.returncode
    assert status == (EXIT_LEFT_BEHIND if "left behind" in daemon.log else 0), daemon.log


def test_what_is_under_way_has_the_operators_time(tmp_path: Path) -> None:
    try:
        with slow_mount(tmp_path / "source", tmp_path / "place", 0) as slow:
            (slow.source / "file").write_bytes(b"content")
            daemon = Daemon(slow.directory, options=["--stop-timeout", "60"])
            with Guest(daemon.socket) as guest:
                guest.init()
                fh = guest.open(file := guest.walk("file"))
                slow.set_delay("FSYNC", 3_000_000)
                token = guest.queue.submit("FSYNC", file, fh.to_bytes(8, sys.byteorder) + bytes(8))
                assert eventually(lambda: blocked(daemon))
                os.kill(daemon.pid, signal.SIGTERM)
                assert guest.queue.wait(token).error == 0
            assert eventually(lambda: not daemon.running(), 30)
            assert "killed" not in daemon.log
            daemon.kill()
    except NotOffered as reason:
        pytest.skip(str(reason))


def blocked(daemon: Daemon) -> bool:
    """Whether a thread of a server waits in the host's file system."""
    for pid in daemon.servers():
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if "fuse" in (task / "wchan").read_text() or "request_wait" in (task / "stack").read_text():
                    return True
    return False


def test_a_log_that_nobody_reads_holds_nobody(tmp_path: Path) -> None:
    place, share = tmp_path / "v.sock", tmp_path / "share"
    share.mkdir()
    unread, stderr = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vfsd", "serve", "--socket", str(place), "--shared-dir", str(share)],
        stdin=subprocess.DEVNULL, stderr=stderr,
    )  # fmt: skip
    os.close(stderr)
    assert eventually(place.exists, 20)
    for _ in range(1500):  # each leaves a line; a pipe has room for some hundred
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(place))
    with Guest(place) as guest:
        guest.init()
        guest.statfs()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    os.close(unread)


def test_a_guest_can_write_so_many_lines(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    with Daemon(tmp_path / "share") as daemon:
        with Guest(daemon.socket) as guest:
            old = INIT_IN_MIN.pack(7, 1, 0, 0)
            for _ in range(5 * SERVER_RATE.burst):
                guest.queue.ask("INIT", 0, old)
            began = time.monotonic()
            seconds = time.monotonic() - began
        assert daemon.log.count("is the oldest") <= SERVER_RATE.burst + SERVER_RATE.per_s * (seconds + 30)
