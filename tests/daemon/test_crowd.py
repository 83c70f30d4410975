"""Front ends that come in numbers, say little or nothing, or find no room: an honest one is served."""

import contextlib
import errno
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.rawguest import Guest
from guests import Daemon, StartDaemon
from guests.daemon import eventually

from vfsd.daemon import supervisor

GET_FEATURES = struct.pack("=III", 1, 1, 0)
THOUSAND = 1000


@pytest.fixture
def crowded(daemon: StartDaemon, tmp_path: Path) -> Daemon:
    (tmp_path / "file").write_bytes(b"content")
    return daemon(tmp_path)


@contextlib.contextmanager
def crowd(daemon: Daemon, count: int, says: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(daemon.socket))
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(says)
            socks.append(sock)
        yield socks


@pytest.mark.parametrize("says", [b"", GET_FEATURES[:6], struct.pack("=III", 2, 1, 8)])
def test_a_thousand_that_say_half_a_message(crowded: Daemon, says: bytes) -> None:
    with Guest(crowded.socket) as guest:
        guest.init()
        with crowd(crowded, THOUSAND, says):
            for _ in range(1000):
                guest.statfs()
            with Guest(crowded.socket) as honest:
                honest.init()
                assert honest.walk("file")
            assert len(crowded.servers()) <= 2
            assert len(crowded.descriptors(crowded.pid)) < supervisor.SILENT_MAX + 64


def test_who_says_half_a_message_is_let_go(crowded: Daemon) -> None:
    with crowd(crowded, 1, GET_FEATURES[:6]) as (silent,):
        silent.settimeout(supervisor.PARTIAL_S + 20)
        with contextlib.suppress(ConnectionResetError):  # what it said has not been taken
            assert silent.recv(1) == b""
    assert eventually(lambda: "said half a message" in crowded.log)


def test_a_message_in_pieces_is_heard(crowded: Daemon) -> None:
    with crowd(crowded, 1, GET_FEATURES[:6]) as (slow,):
        assert eventually(lambda: len(crowded.descriptors(crowded.pid)) > 0)
        slow.sendall(GET_FEATURES[6:])
        slow.settimeout(20)
        assert len(slow.recv(20)) == 20


def test_without_a_channel_front_ends_are_let_go(crowded: Daemon) -> None:
    """There is a descriptor to accept them, and none for their servers."""
    with Guest(crowded.socket) as guest:
        guest.init()
        soft, hard = resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE)
        used = {int(entry.name) for entry in Path(f"/proc/{crowded.pid}/fd").iterdir()}
        free = next(fd for fd in range(soft) if fd not in used)
        resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE, (free + 1, hard))
        with crowd(crowded, 1, GET_FEATURES) as (unlucky,):
            unlucky.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert unlucky.recv(1) == b""
        guest.statfs()
        resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert eventually(lambda: serves(crowded))
    assert crowded.log.count("can't be served") == 1


def serves(daemon: Daemon) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        if sock.connect_ex(str(daemon.socket)) not in (0, errno.EISCONN):
            return False
        sock.settimeout(20)
        sock.sendall(GET_FEATURES)
        with contextlib.suppress(ConnectionResetError):
            return len(sock.recv(20)) == 20
    return False


def test_after_it_was_out_of_descriptors_it_accepts_though_nobody_leaves(crowded: Daemon) -> None:
    with Guest(crowded.socket) as guest:
        guest.init()
        hard = resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE, (4, hard[1]))
        with crowd(crowded, 1, GET_FEATURES) as (waiting,):
            assert eventually(lambda: "can't be accepted" in crowded.log)
            resource.prlimit(crowded.pid, resource.RLIMIT_NOFILE, hard)
            waiting.settimeout(20)
            assert len(waiting.recv(20)) == 20
        guest.statfs()
    assert crowded.log.count("can't be accepted") == 1
