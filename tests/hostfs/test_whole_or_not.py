"""What can't be answered has not been done: a guest's descriptors run out, all but none, one or two."""

import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.fixtures import guests_of, held
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon

from vfsd.fuse import abi

from . import listfs
from .test_locks import F_WRLCK, File

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon's limits are set as root")

BUDGET = 64

Make = Callable[[Guest, bytes], int]
MAKERS: dict[str, Make] = {
    "MKDIR": lambda guest, name: guest.mkdir(ROOT, name).nodeid,
    "MKNOD": lambda guest, name: guest.mknod(ROOT, name, stat.S_IFREG | 0o600).nodeid,
    "SYMLINK": lambda guest, name: guest.symlink(ROOT, name, b"target").nodeid,
    "CREATE": lambda guest, name: guest.create(ROOT, name)[0].nodeid,
    "LINK": lambda guest, name: guest.link(guest.walk("file"), ROOT, name).nodeid,
}


def fill_descriptors(daemon: Daemon, guest: Guest, nodeid: int) -> list[int]:
    """Handles of the guest's until the daemon has no number free below its limit, which is lowered for it."""
    numbers = [int(name) for name in os.listdir(f"/proc/{daemon.server}/fd")]
    _, hard = resource.prlimit(daemon.server, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.server, resource.RLIMIT_NOFILE, (max(numbers) + 1, hard))
    handles = []
    while True:
        try:
            handles.append(guest.open(nodeid))
        except OSError as problem:
            assert problem.errno == errno.ENFILE
            return handles


def allow_more(daemon: Daemon, n: int) -> None:
    soft, hard = resource.prlimit(daemon.server, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.server, resource.RLIMIT_NOFILE, (soft + n, hard))


@pytest.mark.parametrize("free", [0, 1, 2])
@pytest.mark.parametrize("op", MAKERS)
def test_it_is_made_or_not(daemon: StartDaemon, tmp_path: Path, op: str, free: int) -> None:
    for name in ("file", "removed"):
        (tmp_path / name).write_text("x")
    served = daemon(tmp_path)
    with guests_of(served) as start:
        guest = start()
        guest.init()
        file = guest.walk("removed")
        (tmp_path / "removed").unlink()  # so that its own anchor can't make room
        handles = fill_descriptors(served, guest, file)
        allow_more(served, free)
        try:
            nodeid = MAKERS[op](guest, b"made")
        except OSError as problem:
            assert problem.errno == errno.ENFILE and not (op == "CREATE" and free)
            assert sorted(os.listdir(tmp_path)) == ["file"]
            return
        finally:
            for fh in handles:
                guest.release(file, fh)
        allow_more(served, 10)
        made = os.lstat(tmp_path / "made")
        assert guest.getattr(nodeid).ino == made.st_ino
        assert guest.lookup(ROOT, b"made").nodeid == nodeid


def test_a_file_is_not_truncated_by_an_open_that_fails(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with guests_of(daemon(tmp_path, options=["--fd-budget", str(BUDGET)])) as start:
        guest = start()
        guest.init()
        file = guest.walk("file")
        handles = []
        with refused(errno.ENFILE):
            while True:
                handles.append(guest.open(file))
        for _ in range(3):
            with refused(errno.ENFILE):
                guest.open(file, os.O_WRONLY | os.O_TRUNC)
            with refused(errno.ENFILE):
                guest.create(ROOT, b"file", os.O_WRONLY | os.O_TRUNC)
            with refused(errno.ENFILE):
                guest.create(ROOT, b"new")
            with refused(errno.ENFILE):
                guest.tmpfile(ROOT)
            with refused(errno.ENFILE):
                guest.opendir(ROOT)
        assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "content"
        # No refusal has cost a place.
        guest.release(file, handles.pop())
        guest.release(file, guest.open(file))
        handles.append(guest.open(file))
        with refused(errno.ENFILE):
            guest.open(file)


# ---- every descriptor counts


def test_lock_owners_are_within_the_budget(daemon: StartDaemon, tmp_path: Path) -> None:
    served = daemon(tmp_path, options=["--posix-lock", "--fd-budget", str(BUDGET)])
    with guests_of(served) as start:
        guest = start()
        guest.init()
        files = []
        for i in range(20):
            entry, fh = guest.create(ROOT, b"%d" % i)
            files.append(File(guest.queues[1], entry.nodeid, fh))
        taken = []
        with refused(errno.ENOLCK):
            for owner in range(1, 10):
                for at, file in enumerate(files):
                    file.lock(owner, F_WRLCK, (owner, owner))
                    taken.append((at, owner))
        assert len(held(served)) <= BUDGET
        with refused(errno.ENFILE):
            guest.open(files[0].nodeid)
        for at, owner in taken:
            files[at].unlock(owner, (owner, owner))
        handles = [guest.open(files[0].nodeid) for _ in taken]
        assert len(handles) == len(taken)


def test_files_read_without_an_open_are_within_the_budget(daemon: StartDaemon, tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / str(i)).write_text(str(i))
    options = ["--zero-message-open", "--fd-budget", str(BUDGET)]
    served = daemon(tmp_path, options=options, cache="always")
    with guests_of(served) as start:
        guest = start()
        guest.init()
        for i in range(300):
            nodeid = guest.walk(str(i))
            assert guest.read(nodeid, 0, 0, 100) == str(i).encode()
            assert len(held(served)) <= BUDGET


# ---- what is open for writing is closed in time


def test_a_file_that_was_written_is_closed_before_the_answer(daemon: StartDaemon, tmp_path: Path) -> None:
    """The host could not execute it yet (ETXTBSY). Closing takes long here: it waits for a FLUSH."""
    with listfs.served(tmp_path / "share", [10], gated=True) as share:
        assert share.stdin is not None and share.stdout is not None
        served = daemon(tmp_path / "share")
        with guests_of(served) as start:
            guest = start()
            guest.init()
            nodeid = guest.lookup(ROOT, listfs.names_of([10])[0]).nodeid
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
                fh = guest.open(nodeid, flags)
                answered = guest.queue.used_idx
                token = guest.queue.submit("RELEASE", nodeid, abi.RELEASE_IN.pack(fh, 0, 0, 0))
                assert share.stdout.readline() == "FLUSH\n"
                assert (guest.queue.used_idx != answered) == (flags == os.O_RDONLY)
                share.stdin.write("\n")
                share.stdin.flush()
                guest.queue.wait(token)
