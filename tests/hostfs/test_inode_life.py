"""Inodes whose number becomes another's, that are evicted as soon as they are known, or cached in part."""

import errno
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of, held
from fuse.ops import LINUX_FLAGS, refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon, eventually
from guests.filesystems import CannotMount, file_system

from .test_identity import MAKERS, context_ext

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

BUDGET = 64  # the least
FILES = 60
KNOWN = 20  # files that each queue knows at a time, more than there may be anchors
ROUNDS = 30
BLOCK = 64 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of an ext4, which gives a removed inode's number to the next one made."""
    try:
        with file_system("ext4", tmp_path) as place:
            (place / "share").mkdir()
            yield place / "share"
    except CannotMount as problem:
        pytest.skip(str(problem))


def name(i: int) -> bytes:
    return b"file %d" % i


def test_a_replaced_inode_keeps_its_own_lookups(disk: Path) -> None:
    """The number is another file's by now: what was looked up of that must not count for the old one."""
    with Daemon(disk, options=["--fd-budget", str(BUDGET), "--log-level", "debug"]) as daemon:
        with guests_of(daemon) as start:
            guest = start()
            guest.init()
            (disk / "old").write_text("old")
            number = (disk / "old").stat().st_ino
            old = guest.lookup(ROOT, b"old").nodeid
            others = []
            for i in range(FILES):
                (disk / os.fsdecode(name(i))).touch()
                others.append(guest.lookup(ROOT, name(i)).nodeid)
            handles = []
            with refused(errno.ENFILE):
                while True:
                    handles.append(guest.opendir(ROOT))
            assert "old" not in held(daemon), "it has not been evicted"
            (disk / "old").unlink()
            (disk / "new").write_text("new")
            assert (disk / "new").stat().st_ino == number
            new = guest.lookup(ROOT, b"new").nodeid
            assert new != old
            with refused(errno.ESTALE):
                guest.getattr(old)
            assert guest.getattr(new).size == 3
            for nodeid in (old, new, *others):
                guest.forget(nodeid)
            for fh in handles:
                guest.release(ROOT, fh, "RELEASEDIR")
            guest.destroy()
        assert re.findall(r"the session held (\d+) inodes", daemon.log)[0] == "0"


def test_inodes_that_are_evicted_as_soon_as_they_are_known(daemon: StartDaemon, tmp_path: Path) -> None:
    """Two queues look up and forget the same files, each evicting what the other has just found."""
    numbers = []
    for i in range(FILES):
        (tmp_path / os.fsdecode(name(i))).write_bytes(bytes(i))
        numbers.append((tmp_path / os.fsdecode(name(i))).stat().st_ino)
    failures: list[BaseException] = []

    def use(guest: Guest, index: int) -> None:
        ops = guest.on(index)
        known: deque[int] = deque()
        try:
            for at in range(ROUNDS * FILES):
                i = at * (7 if index == 1 else 11) % FILES
                nodeid = ops.lookup(ROOT, name(i)).nodeid
                attr = ops.getattr(nodeid)
                assert (attr.ino, attr.size) == (numbers[i], i)
                known.append(nodeid)
                if len(known) > KNOWN:
                    ops.forget(known.popleft())
            for nodeid in known:
                ops.forget(nodeid)
        except BaseException as problem:
            failures.append(problem)

    served = daemon(tmp_path, options=["--fd-budget", str(BUDGET)])
    with guests_of(served) as start:
        guest = start(request_queues=2)
        guest.init()
        handles = [guest.opendir(ROOT) for _ in range(BUDGET * 3 // 4)]
        threads = [threading.Thread(target=use, args=(guest, index)) for index in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        for fh in handles:
            guest.release(ROOT, fh, "RELEASEDIR")
        assert eventually(lambda: held(served) == []), "a forgotten file is still open"


def test_a_file_that_is_cached_in_part(disk: Path, daemon: StartDaemon) -> None:
    """READ takes what the page cache has without waiting; the rest has to come from the disk all the same."""
    content = os.urandom(8 * BLOCK - 100)
    path = disk / "file"
    path.write_bytes(content)
    with guests_of(daemon(disk)) as start:
        guest = start()
        guest.init()
        nodeid = guest.walk("file")
        fh = guest.open(nodeid)
        with path.open("rb", buffering=0) as file:
            os.fsync(file)
            for cached in (0, 1, 5, 7):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no more than is asked for
                os.pread(file.fileno(), BLOCK, cached * BLOCK)
                for offset in (cached * BLOCK, max(0, cached - 1) * BLOCK, cached * BLOCK + 5000):
                    size = 3 * BLOCK
                    assert guest.read(nodeid, fh, offset, size) == content[offset : offset + size]


@pytest.mark.parametrize("op", MAKERS)
def test_a_label_that_is_refused_leaves_nothing_open(daemon: StartDaemon, tmp_path: Path, op: str) -> None:
    served = daemon(tmp_path, options=["--security-label"])
    with guests_of(served) as start:
        guest = start()
        guest.init(flags=LINUX_FLAGS)
        before = served.descriptors(served.server)
        for _ in range(3):
            with refused(errno.EOPNOTSUPP):
                MAKERS[op](guest)(ROOT, b"made", ext=context_ext((b"nonsense", b"label")))
            assert served.descriptors(served.server) == before
        assert os.listdir(tmp_path) == []
