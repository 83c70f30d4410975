"""The back-end channel of a shared memory region, with a front end of plain sockets."""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vfsd.errors import ProtocolError
from vfsd.vhost import messages, shmem
from vfsd.vhost.messages import REPLY, SHMEM_MAP, U64, BackendRequest, Message, MessageReader, ShmemMap
from vfsd.vhost.shmem import SharedMemory

MAP, UNMAP = BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP
DEADLINE_S = 20.0


class Peer:
    """The other end, by hand."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.reader = MessageReader(self.sock, messages.check_backend_request, messages.backend_name)
        self.memory = SharedMemory(0, 1 << 21)
        self.memory.connect(theirs.detach())
        self.fd = os.memfd_create("file")

    def read(self) -> Message:
        while (message := self.reader.read()) is None:
            assert messages.wait(self.sock, select.POLLIN, time.monotonic() + DEADLINE_S), "no request"
        message.close()
        return message

    def answer(self, request: int, code: int = 0, flags: int = REPLY) -> None:
        messages.send(self.sock, messages.encode(request, U64.pack(code), flags))

    def map(self, at: int = 0) -> None:
        self.memory.map(self.fd, 0, at, 4096, True)

    def close(self) -> None:
        self.memory.close()
        self.sock.close()
        os.close(self.fd)


@pytest.fixture
def peer(no_leak: None) -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def no_leak() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shmem, "ANSWER_TIMEOUT_S", 0.05)


def fails(call: Callable[[], object], wanted: int) -> None:
    with pytest.raises(OSError) as info:
        call()
    assert info.value.errno == wanted, info.value


class Asking(threading.Thread):
    """A call in a thread of its own; `error` is its errno, 0 for none."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call
        self.error = 0
        self.start()

    def run(self) -> None:
        try:
            self.call()
        except OSError as problem:
            self.error = problem.errno or -1

    def end(self) -> int:
        self.join(DEADLINE_S)
        assert not self.is_alive()
        return self.error


def test_a_request_and_its_answer(peer: Peer) -> None:
    asking = Asking(lambda: peer.memory.map(peer.fd, 8192, 4096, 12288, False))
    message = peer.read()
    assert (message.request, message.flags) == (MAP, 1 | messages.NEED_REPLY)
    assert ShmemMap(*SHMEM_MAP.unpack(message.payload)) == ShmemMap(0, 8192, 4096, 12288, 0)
    assert peer.memory.maps(peer.fd, 8192, 12288), "before it is answered"
    peer.answer(MAP)
    assert asking.end() == 0
    asking = Asking(lambda: peer.memory.unmap(4096, 12288))
    assert ShmemMap(*SHMEM_MAP.unpack(peer.read().payload)) == ShmemMap(0, 0, 4096, 12288, 0)
    assert peer.memory.maps(peer.fd, 12288, 4096)
    assert not peer.memory.maps(peer.fd, 8192, 16384)
    peer.answer(UNMAP, 1)  # the front end has none: that is what is wanted
    assert asking.end() == 0
    assert not peer.memory.maps(peer.fd, 8192, 12288)


def test_a_refusal(peer: Peer) -> None:
    peer.answer(MAP, 2**64 - 12)
    fails(peer.map, errno.EIO)
    assert not peer.memory.maps(peer.fd, 0, 4096)


def test_an_answer_that_comes_late(peer: Peer, impatient: None) -> None:
    with pytest.raises(TimeoutError):
        peer.map()
    assert peer.memory.maps(peer.fd, 0, 4096), "it may be mapped"
    fails(peer.map, errno.EIO)  # at once, as long as an answer is owed
    peer.answer(MAP, 1)
    peer.answer(UNMAP)
    peer.memory.unmap(0, 4096)
    assert not peer.memory.maps(peer.fd, 0, 4096)


def test_answers_that_nobody_waits_for(peer: Peer) -> None:
    for _ in range(3):
        assert peer.memory.unmap_unheard(0, 4096)
    asking = Asking(peer.map)
    for request in (UNMAP, UNMAP, UNMAP, MAP):
        assert peer.read().request == request
    for request in (UNMAP, UNMAP, UNMAP):
        peer.answer(request, 1)
    peer.answer(MAP)
    assert asking.end() == 0 and peer.memory.maps(peer.fd, 0, 4096)


def test_no_answer_while_a_queue_is_stopped(peer: Peer) -> None:
    asking = Asking(peer.map)
    peer.read()
    with peer.memory.suspended():
        assert asking.end() == errno.EAGAIN
        fails(lambda: peer.memory.unmap(0, 4096), errno.EAGAIN)
    peer.answer(MAP)
    asking = Asking(lambda: peer.memory.unmap(0, 4096))
    peer.read()
    peer.answer(UNMAP)
    assert asking.end() == 0


@pytest.mark.parametrize(
    "junk",
    [
        messages.encode(MAP, U64.pack(0)),  # no reply
        messages.encode(MAP, bytes(4), REPLY),
        messages.encode(MAP, bytes(16), REPLY),
        messages.encode(UNMAP, U64.pack(0), REPLY),
        b"\xff" * 40,
    ],
)
def test_an_answer_that_cannot_be(peer: Peer, junk: bytes) -> None:
    peer.sock.sendall(junk)
    fails(peer.map, errno.ENODEV)
    assert not peer.memory.connected and not peer.memory.maps(peer.fd, 0, 4096)
    fails(peer.map, errno.ENODEV)


def test_a_channel_that_is_closed(peer: Peer) -> None:
    asking = Asking(peer.map)
    peer.read()
    peer.sock.close()
    assert asking.end() == errno.ENODEV
    assert not peer.memory.unmap_unheard(0, 4096)


def test_a_channel_that_nobody_reads(peer: Peer) -> None:
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sent = 0
    while peer.memory.unmap_unheard(0, 4096):
        sent += 1
        assert sent < 100_000
    fails(peer.map, errno.ENODEV)


def test_a_channel_in_place_of_another(peer: Peer) -> None:
    asking = Asking(peer.map)
    peer.read()
    ours, theirs = socket.socketpair()
    peer.memory.connect(theirs.detach())
    assert asking.end() == errno.EAGAIN
    peer.sock.close()
    peer.sock = ours
    peer.reader = MessageReader(ours, messages.check_backend_request, messages.backend_name)
    peer.answer(UNMAP)
    peer.memory.unmap(0, 4096)
    assert peer.read().request == UNMAP


def test_a_channel_that_is_no_socket(peer: Peer) -> None:
    with pytest.raises(ProtocolError, match="no socket"):
        peer.memory.connect(os.dup(peer.fd))
