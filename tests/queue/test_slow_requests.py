"""A request that its file system keeps for long keeps nobody else waiting: every opcode in turn.

The share has a slow file system mounted below it. What shows that nobody waits is order: requests of the same
queue on the share's own file system are answered while the slow one is still under way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ESTALE
from pathlib import Path
from typing import NamedTuple

import pytest
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.requests import REQUESTS, Held, request_for
from fuse.wire import ROOT
from guests import StartDaemon, eventually
from vfsd_bench.slowmount import SlowMount, slow_mount

from vfsd.fuse import abi

SLOW_US = 400_000
MEANWHILE = 5
# Ending the session, answered without the file system, or not at all.
ELSEWHERE = {"INIT", "DESTROY", "FORGET", "BATCH_FORGET", "INTERRUPT", "RELEASE", "RELEASEDIR"}
OPTIONS = ["--xattr", "--flock", "--posix-lock"]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
)


class Served(NamedTuple):
    """A guest that knows `local`, a file on the share's own file system, and what lies on the slow one."""

    guest: Guest
    mount: SlowMount
    local: int
    below: int  # nodeid of the slow file system's root
    held: Held
    pid: int  # of the server


def hold(guest: Guest, mount: SlowMount, flags: int = os.O_RDWR) -> Held:
    """As fuse.requests.hold, on the slow file system."""
    (mount.source / "file").write_bytes(b"content")
    os.setxattr(mount.source / "file", "user.attr", b"value")
    (mount.source / "dir").mkdir()
    (mount.source / "empty").mkdir()
    (mount.source / "dir" / "below").touch()
    (mount.source / "link").symlink_to("file")
    file, directory, link = (guest.walk(f"slow/{name}") for name in ("file", "dir", "link"))
    return Held(file, directory, link, guest.open(file, flags), guest.opendir(directory))


@contextmanager
def served(start: StartDaemon, base: Path, *options: str) -> Iterator[Served]:
    share = base / "share"
    share.mkdir()
    (share / "local").touch()
    with slow_mount(base / "source", share / "slow", 0) as mount:
        daemon = start(share, options=[*OPTIONS, *options])
        guest = Guest(daemon.socket)
        try:
            guest.init()
            local, below = guest.walk("local"), guest.walk("slow")
            yield Served(guest, mount, local, below, hold(guest, mount), daemon.server)
        finally:
            mount.set_delay("ALL", 0)
            guest.close()
            assert eventually(lambda: "front end has left" in daemon.log)


@pytest.fixture
def place(daemon: StartDaemon, tmp_path: Path) -> Iterator[Served]:
    with served(daemon, tmp_path) as place:
        yield place


def beside(place: Served, name: str) -> None:
    """Have one request of that name under way, and others answered meanwhile."""
    request = request_for(name, place.held)
    nodeid = place.below if request.nodeid == ROOT else request.nodeid
    queue = place.guest.queues[1]
    place.mount.set_delay("ALL", SLOW_US)
    slow = queue.submit(name, nodeid, request.body, out=request.out)
    for _ in range(MEANWHILE):
        other = queue.submit("GETATTR", place.local, bytes(abi.GETATTR_IN.size))
        assert queue.wait(other).error == 0
    place.mount.set_delay("ALL", 0)
    assert not queue.answered(slow), "it was answered before those beside it"
    assert queue.wait(slow).error == 0


@pytest.mark.parametrize("name", sorted(REQUESTS.keys() - ELSEWHERE))
def test_nobody_waits_for_a_slow(name: str, place: Served) -> None:
    beside(place, name)


@pytest.mark.parametrize("size", [1, 3])
def test_there_are_no_more_threads_than_allowed(size: int, daemon: StartDaemon, tmp_path: Path) -> None:
    with served(daemon, tmp_path, "--thread-pool-size", str(size)) as place:
        before = threads_of(place.pid)
        queue = place.guest.queues[1]
        place.mount.set_delay("GETATTR", SLOW_US)
        tokens = [queue.submit("GETATTR", place.below, bytes(abi.GETATTR_IN.size)) for _ in range(4 * size)]
        seen = 0
        for _ in range(MEANWHILE):
            other = queue.submit("GETATTR", place.local, bytes(abi.GETATTR_IN.size))
            assert queue.wait(other).error == 0
        assert not any(map(queue.answered, tokens)), "a file of another file system has waited"
        for token in tokens:
            seen = max(seen, threads_of(place.pid))
            assert queue.wait(token).error == 0
            seen = max(seen, threads_of(place.pid))
        assert seen <= before + size + 1  # the one that stands by is the queue's own


def test_entries_of_a_listing_are_looked_up_by_several_threads(place: Served) -> None:
    names = [f"{number:03}" for number in range(100)]
    directory = place.guest.mkdir(place.below, b"many").nodeid
    for name in names:
        (place.mount.source / "many" / name).touch()
    before = threads_of(place.pid)
    place.mount.set_delay("LOOKUP", 5000)
    entries = place.guest.listing(directory, plus=True)
    place.mount.set_delay("LOOKUP", 0)
    assert threads_of(place.pid) > before + 2
    assert sorted(entry.name for entry in entries) == [name.encode() for name in names]
    plain = place.guest.listing(directory)
    assert [(entry.name, entry.off) for entry in entries] == [(entry.name, entry.off) for entry in plain]
    for entry in entries:
        assert entry.entry is not None
        known = place.guest.lookup(directory, entry.name)
        assert known.nodeid == entry.entry.nodeid
        place.guest.forget(known.nodeid, 2)  # one lookup of the listing, one of just now
        with refused(ESTALE):
            place.guest.getattr(known.nodeid)


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))
