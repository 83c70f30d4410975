"""TMPFILE: files without a name, and LINK, which gives them one."""

import os
import resource
import stat
from errno import EACCES, EEXIST, EINVAL, ENOENT, ENOTDIR, ESTALE
from pathlib import Path

import pytest
from fuse.fixtures import guests_of, held
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon

from vfsd.fuse import abi

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can create as somebody else")


def test_a_tmpfile_is_a_file_without_a_name(guest: Guest, served: Daemon, share: Path) -> None:
    entry, fh = guest.tmpfile(ROOT, os.O_RDWR, 0o640)
    assert entry.nodeid not in (0, ROOT)
    assert (entry.attr.nlink, oct(entry.attr.mode)) == (0, oct(stat.S_IFREG | 0o640))
    assert entry.entry_ns == entry.attr_ns == 10**9
    assert os.listdir(share) == []
    assert guest.write(entry.nodeid, fh, 0, b"data") == 4
    assert guest.read(entry.nodeid, fh, 0, 10) == b"data"
    assert guest.getattr(entry.nodeid).size == guest.getattr(entry.nodeid, fh).size == 4
    again = guest.open(entry.nodeid)
    assert guest.read(entry.nodeid, again, 0, 10) == b"data"
    guest.release(entry.nodeid, fh)
    guest.release(entry.nodeid, again)
    guest.forget(entry.nodeid)
    with refused(ESTALE):
        guest.getattr(entry.nodeid)
    assert held(served) == []


def test_it_is_no_file_that_the_host_has_removed(guest: Guest, share: Path) -> None:
    """overlayfs truncates it by its inode while it copies up, and does not look up again upon ESTALE."""
    entry, fh = guest.tmpfile(ROOT)
    guest.write(entry.nodeid, fh, 0, b"data")
    assert guest.truncate(entry.nodeid, 2).size == 2
    guest.release(entry.nodeid, guest.open(entry.nodeid, os.O_WRONLY))
    guest.link(entry.nodeid, ROOT, b"name")
    os.unlink(share / "name")
    with refused(ESTALE):
        guest.open(entry.nodeid, os.O_WRONLY)


def test_link_gives_it_a_name(guest: Guest, share: Path) -> None:
    entry, fh = guest.tmpfile(ROOT)
    guest.write(entry.nodeid, fh, 0, b"data")
    linked = guest.link(entry.nodeid, ROOT, b"name")
    assert linked.nodeid == entry.nodeid
    linked.attr.check(os.stat(share / "name"))
    assert linked.attr.nlink == 1
    assert (share / "name").read_bytes() == b"data"
    assert guest.lookup(ROOT, b"name").nodeid == entry.nodeid
    with refused(EEXIST):
        guest.link(entry.nodeid, ROOT, b"name")
    # Also once it is closed: the guest's inode keeps it.
    other, fh = guest.tmpfile(ROOT)
    guest.release(other.nodeid, fh)
    guest.link(other.nodeid, ROOT, b"later")
    assert (share / "later").read_bytes() == b""


def test_o_excl_keeps_it_without_one(guest: Guest, share: Path) -> None:
    entry, _ = guest.tmpfile(ROOT, os.O_RDWR | os.O_EXCL)
    for again in (ESTALE, ENOENT):  # Linux looks the path up again, once
        with refused(again):
            guest.link(entry.nodeid, ROOT, b"name")
    assert os.listdir(share) == []


@needs_root
def test_it_is_the_callers(guest: Guest, share: Path) -> None:
    (share / "open").mkdir()
    (share / "open").chmod(0o777)
    (share / "closed").mkdir(mode=0o755)
    entry, _ = guest.tmpfile(guest.walk("open"), uid=1234, gid=5678)
    assert (entry.attr.uid, entry.attr.gid) == (1234, 5678)
    with refused(EACCES):
        guest.tmpfile(guest.walk("closed"), uid=1234, gid=5678)
    entry, _ = guest.tmpfile(ROOT)
    assert (entry.attr.uid, entry.attr.gid) == (0, 0)


def test_what_is_refused(guest: Guest, served: Daemon, share: Path) -> None:
    (share / "file").touch()
    with refused(EINVAL):
        guest.tmpfile(ROOT, os.O_RDONLY)
    with refused(ENOTDIR):
        guest.tmpfile(guest.walk("file"))
    head = abi.CREATE_IN.pack(os.O_RDWR, 0o600, 0, 0)
    for name in (b"", b"/", b"/\0and more", b"x" * 256 + b"\0"):
        assert guest.queue.ask("TMPFILE", ROOT, head + name, out=144).error == EINVAL, name
    assert guest.queue.ask("TMPFILE", ROOT, head + b"/\0", out=143).error == EINVAL
    assert held(served) == ["file"]


def test_it_is_never_evicted(daemon: StartDaemon, tmp_path: Path) -> None:
    """However few descriptors there are: it could not be found again."""
    for number in range(300):
        (tmp_path / f"f{number}").touch()
    with guests_of(served := daemon(tmp_path)) as start:
        guest = start()
        guest.init()
        entry, fh = guest.tmpfile(ROOT)
        guest.write(entry.nodeid, fh, 0, b"kept")
        guest.release(entry.nodeid, fh)
        few = len(served.descriptors(served.server)) + 40
        resource.prlimit(served.server, resource.RLIMIT_NOFILE, (few, few))
        for number in range(300):
            guest.lookup(ROOT, b"f%d" % number)
        assert guest.getattr(entry.nodeid).size == 4
        assert guest.read(entry.nodeid, guest.open(entry.nodeid), 0, 10) == b"kept"
