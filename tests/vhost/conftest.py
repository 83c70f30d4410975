import os
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from vfsd.vhost import messages
from vfsd.vhost.messages import FrontendRequest

from .peers import Daemon, Guest, Link, RecordingDevice, Wire


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def link(device: RecordingDevice) -> Iterator[Link]:
    """A connection whose messages the test hands over one by one."""
    link = Link(device)
    yield link
    link.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture(scope="session")
def shared_guest() -> Iterator[Guest]:
    """One for tests that only send its numbers."""
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), "--tag", "test")
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test leaves this process with as many descriptors as it had."""
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def record(guest: Guest) -> Callable[[str], Wire]:
    """What a front end sends from handshake to start: (bytes, descriptors) per message."""

    def recording(order: str) -> Wire:
        wire: Wire = []
        link = Link(RecordingDevice(config=bytes(40)))
        send = messages.send

        def keep(sock: socket.socket, data: bytes, fds: Sequence[int] = (), timeout_s: float = 5) -> None:
            if (
                sock is link.sock
                and messages.HEADER.unpack_from(data)[0] != FrontendRequest.SET_BACKEND_REQ_FD
            ):
                wire.append((data, list(fds)))
            send(sock, data, fds, timeout_s)

        with pytest.MonkeyPatch.context() as patch, link:
            patch.setattr(messages, "send", keep)
            link.frontend.handshake(order, guest.setup())
            link.frontend.start(order, guest.setup())
            link.frontend.get_features()
        return wire

    return recording
