"""A daemon with few descriptors and a guest that knows many files: nothing is missing, all works."""

import os
import resource
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from errno import ENOENT
from pathlib import Path

import pytest
from fuse.fixtures import guests_of, held
from fuse.ops import Operations, refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon

FILES = 2000
LIMIT = 256
BUDGET = 150
BY_NAME = "by name"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="file handles need CAP_DAC_READ_SEARCH")

Limited = Callable[[Path], Daemon]


def content(i: int) -> bytes:
    return b"content of %d" % i


def name(i: int) -> bytes:
    return b"file %04d" % i


def fill(share: Path) -> Path:
    directory = share / "dir"
    directory.mkdir(parents=True)
    for i in range(FILES):
        (directory / os.fsdecode(name(i))).write_bytes(content(i))
    return directory


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that change nothing."""
    return fill(tmp_path_factory.mktemp("many") / "share")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """For one test alone."""
    return fill(tmp_path / "share")


@pytest.fixture(params=["from its start", "lowered later", BY_NAME])
def limited(
    request: pytest.FixtureRequest, daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Limited:
    """Starts a daemon with few descriptors. Lowered later, its budget of anchors is no help: EMFILE.

    By name: inodes come back by directory and name, as where file handles don't work.
    """

    def start(share: Path) -> Daemon:
        if request.param == BY_NAME:
            return daemon(share, options=["--inode-file-handles", "never", "--fd-budget", str(BUDGET)])
        if request.param == "from its start":
            script = tmp_path / "python"
            script.write_text(f'#!/bin/sh\nulimit -n {LIMIT}\nexec {shlex.quote(sys.executable)} "$@"\n')
            script.chmod(0o755)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "executable", str(script))
                started = daemon(share, options=["--inode-file-handles", "prefer"])
        else:
            started = daemon(share, options=["--inode-file-handles", "prefer"])
            resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        assert resource.prlimit(started.pid, resource.RLIMIT_NOFILE) == (LIMIT, LIMIT)
        return started

    return start


@pytest.fixture
def few(limited: Limited, common: Path) -> Daemon:
    return limited(common.parent)


@pytest.fixture
def few_own(limited: Limited, directory: Path) -> Daemon:
    return limited(directory.parent)


@pytest.fixture
def guest(few: Daemon) -> Iterator[Guest]:
    with guests_of(few) as start:
        guest = start(request_queues=2)
        guest.init()
        yield guest


@pytest.fixture
def own_guest(few_own: Daemon) -> Iterator[Guest]:
    """On `directory`."""
    with guests_of(few_own) as start:
        guest = start()
        guest.init()
        yield guest


def check_file(guest: Operations, nodeid: int, i: int) -> None:
    assert guest.getattr(nodeid).size == len(content(i))
    fh = guest.open(nodeid, os.O_RDWR)
    assert guest.read(nodeid, fh, 0, 100) == content(i)
    guest.release(nodeid, fh)


def listed(guest: Guest, nodeid: int) -> dict[bytes, int]:
    """Names and nodeids; a name the daemon could not look up for us is looked up."""
    found = {}
    for dirent in guest.listing(nodeid, plus=True):
        assert dirent.name not in found
        assert dirent.entry is not None
        found[dirent.name] = dirent.entry.nodeid or guest.lookup(nodeid, dirent.name).nodeid
    return found


def test_every_file_by_readdirplus(guest: Guest, few: Daemon) -> None:
    found = listed(guest, guest.walk("dir"))
    assert sorted(found) == [name(i) for i in range(FILES)]
    assert len(set(found.values())) == FILES
    for i in range(FILES):
        check_file(guest, found[name(i)], i)
    assert len(few.descriptors(few.server)) <= LIMIT


def test_every_file_by_lookup(guest: Guest) -> None:
    directory = guest.walk("dir")
    nodeids = [guest.lookup(directory, name(i)).nodeid for i in range(FILES)]
    for i in reversed(range(FILES)):
        check_file(guest, nodeids[i], i)
    for i in range(0, FILES, 3):
        assert guest.lookup(directory, name(i)).nodeid == nodeids[i], "evicted, it is another inode"


def test_moved_meanwhile(own_guest: Guest, few_own: Daemon, directory: Path) -> None:
    """By the host, where the daemon does not see it, and by the guest."""
    nodeids = listed(own_guest, own_guest.walk("dir"))
    by_guest = own_guest.mkdir(ROOT, b"by guest").nodeid
    (directory.parent / "by host").mkdir()
    for i in range(0, FILES, 2):
        if i % 4:
            own_guest.rename(own_guest.walk("dir"), name(i), by_guest, b"moved %d" % i)
        else:
            os.rename(directory / os.fsdecode(name(i)), directory.parent / "by host" / f"moved {i}")
    moved = {b"moved %d" % i: nodeids[name(i)] for i in range(0, FILES, 4)}
    if "never" in few_own.argv:  # by name, they have to be looked up first
        assert listed(own_guest, own_guest.walk("by host")) == moved
    for i in range(FILES):
        check_file(own_guest, nodeids[name(i)], i)
    assert sorted(listed(own_guest, by_guest)) == sorted(b"moved %d" % i for i in range(2, FILES, 4))
    assert listed(own_guest, own_guest.walk("by host")) == moved


def test_unlinked_while_open(own_guest: Guest, directory: Path) -> None:
    parent = own_guest.walk("dir")
    nodeids = listed(own_guest, parent)
    kept = list(range(0, 1200, 40))
    handles = {i: own_guest.open(nodeids[name(i)], os.O_RDWR) for i in kept}
    for i in kept:
        if i % 80:
            own_guest.unlink(parent, name(i))
        else:
            os.unlink(directory / os.fsdecode(name(i)))
    for i in range(1, FILES, 2):  # the others' anchors push theirs out
        own_guest.getattr(nodeids[name(i)])
    for i in kept:
        nodeid = nodeids[name(i)]
        assert own_guest.read(nodeid, handles[i], 0, 100) == content(i)
        assert own_guest.getattr(nodeid, handles[i]).nlink == 0
        assert own_guest.getattr(nodeid).nlink == 0
        with refused(ENOENT):
            own_guest.lookup(parent, name(i))
        own_guest.release(nodeid, handles[i])


def test_what_is_removed_is_not_kept_on_disk(own_guest: Guest, few_own: Daemon) -> None:
    parent = own_guest.walk("dir")
    nodeids = listed(own_guest, parent)
    for i in range(FILES):
        own_guest.unlink(parent, name(i))
    for nodeid in nodeids.values():
        own_guest.forget(nodeid, 2)
    assert [path for path in held(few_own) if path.endswith(" (deleted)")] == []


def test_many_open_files_and_what_is_left_then(guest: Guest, few: Daemon) -> None:
    """Handles are what a guest may use all descriptors for: an errno then, and all is well after."""
    parent = guest.walk("dir")
    nodeids = listed(guest, parent)
    handles: dict[int, int] = {}
    problem = None
    for i in range(LIMIT + 1):
        try:
            handles[i] = guest.open(nodeids[name(i)])
        except OSError as error:
            problem = error
            break
    assert problem is not None and problem.errno in (24, 23)
    assert len(handles) > LIMIT // 2
    for i, fh in handles.items():
        assert guest.read(nodeids[name(i)], fh, 0, 100) == content(i)
    for i, fh in handles.items():
        guest.release(nodeids[name(i)], fh)
    for i in range(0, FILES, 7):
        check_file(guest, nodeids[name(i)], i)
    assert sorted(listed(guest, parent)) == sorted(nodeids)


def test_two_queues_at_once(guest: Guest) -> None:
    """Anchors are evicted by one thread while another needs them."""
    nodeids = listed(guest, guest.walk("dir"))
    failures: list[BaseException] = []

    def use(index: int, order: list[int]) -> None:
        try:
            for i in order:
                check_file(guest.on(index), nodeids[name(i)], i)
        except BaseException as problem:
            failures.append(problem)

    there, back = list(range(FILES)), list(reversed(range(FILES)))
    threads = [threading.Thread(target=use, args=args) for args in ((1, there), (2, back))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_destroy_after_evictions(guest: Guest, few: Daemon) -> None:
    nodeids = listed(guest, guest.walk("dir"))
    guest.open(nodeids[name(5)])
    guest.destroy()
    assert [path for path in held(few) if "file" in path] == []
    guest.init()
    check_file(guest, guest.walk("dir/file 0005"), 5)


def test_the_table_of_descriptors_need_not_grow_for_guests(daemon: StartDaemon, tmp_path: Path) -> None:
    """Linux makes it anew, for which all threads wait, unless it has room already."""
    served = daemon(tmp_path, options=["--fd-budget", "900", "--inode-file-handles", "prefer"])
    status = Path(f"/proc/{served.pid}/status").read_text()
    size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("FDSize:"))
    assert size >= 900
