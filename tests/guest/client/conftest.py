"""A shared directory, a real daemon for it, and our guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from vfsd.guest import Device, Filesystem, mount
from vfsd.guest.client import objects

from .peers import PEERS, Peer, missing

CACHES = [("vfsd", "never"), ("vfsd", "auto"), ("vfsd", "always"), ("qemu-virtiofsd", "auto")]
CACHES += [("rust-virtiofsd", "auto")] if "rust-virtiofsd" in PEERS else []


class Clock:
    """What cache timeouts go by, so that no test waits for them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class StartPeer(Protocol):
    def __call__(self, kind: str = ..., *, cache: str = ..., options: tuple[str, ...] = ...) -> Peer: ...


@pytest.fixture(params=PEERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each daemon in turn."""
    name: str = request.param
    if reason := missing(name):
        pytest.skip(reason)
    return name


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    yield
    assert objects.alive() == dict.fromkeys(objects.KINDS, 0)


@pytest.fixture
def start(shared: Path) -> Iterator[StartPeer]:
    """Starts daemons for the shared directory; they are ended after the test."""
    with ExitStack() as stack:

        def start_peer(kind: str = "vfsd", *, cache: str = "auto", options: tuple[str, ...] = ()) -> Peer:
            if reason := missing(kind):
                pytest.skip(reason)
            return stack.enter_context(Peer(kind, shared, cache=cache, options=options))

        yield start_peer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mounted(start: StartPeer, clock: Clock) -> Iterator[Callable[..., Filesystem]]:
    """Starts a daemon and mounts it; unmounted after the test."""
    with ExitStack() as stack:

        def mount_peer(
            kind: str = "vfsd", *, cache: str = "auto", daemon: tuple[str, ...] = (), **arguments: Any
        ) -> Filesystem:
            peer = start(kind, cache=cache, options=daemon)
            arguments.setdefault("clock", clock)
            return stack.enter_context(mount(peer.socket, **arguments))

        yield mount_peer


@pytest.fixture(params=CACHES, ids="-".join)
def fs(request: pytest.FixtureRequest, mounted: Callable[..., Filesystem]) -> Filesystem:
    """Mounted from vfsd in each cache mode, and from the other daemons."""
    kind, cache = request.param
    return mounted(kind, cache=cache, daemon=("xattr",))


@pytest.fixture
def device(start: StartPeer) -> Iterator[Device]:
    """A device of vfsd that outlives its mounts."""
    found = Device.connect(start().socket)
    yield found
    found.remove()


def requests(fs: Filesystem) -> Callable[..., int]:
    """How many of these requests were sent since this was called."""
    before = dict(fs.conn.requests)

    def since(*names: str) -> int:
        return sum(
            count - before.get(opcode, 0)
            for opcode, count in fs.conn.requests.items()
            if not names or opcode.name in names
        )

    return since
