"""--readonly: every operation that would change something, and those that would not."""

import os
from collections.abc import Iterator
from errno import EROFS
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.requests import FS_IOC_GETFLAGS, hold, request_for, snapshot
from fuse.wire import ROOT
from guests import StartDaemon

from vfsd.fuse.abi import Fattr, Rename
from vfsd.fuse.opcodes import OPERATIONS

FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR = 0x40086602, 0x401C5820
READS = {
    "LOOKUP", "FORGET", "BATCH_FORGET", "GETATTR", "STATX", "READLINK", "OPEN", "READ", "STATFS", "RELEASE",
    "FSYNC", "GETXATTR", "LISTXATTR", "FLUSH", "INIT", "DESTROY", "OPENDIR", "READDIR", "READDIRPLUS",
    "RELEASEDIR", "FSYNCDIR", "ACCESS", "IOCTL", "LSEEK", "SYNCFS", "GETLK", "SETLK", "SETLKW",
    "INTERRUPT", "SETUPMAPPING", "REMOVEMAPPING",
}  # fmt: skip
"""Operations that change nothing, or look at their arguments to tell."""


@pytest.fixture
def readonly(daemon: StartDaemon, tmp_path: Path) -> Iterator[tuple[Guest, Path]]:
    """A guest of a share it may not change."""
    share = tmp_path / "share"
    share.mkdir()
    with guests_of(daemon(share, options=["--readonly", "--xattr"])) as start:
        guest = start()
        guest.init()
        yield guest, share


def test_the_table_says_which_operations_modify() -> None:
    assert {op.name for op in OPERATIONS if not op.modifies} <= READS
    assert not {op.name for op in OPERATIONS if op.modifies} & READS


def test_nothing_is_changed(readonly: tuple[Guest, Path]) -> None:
    guest, share = readonly
    things = hold(guest, share, os.O_RDONLY)
    before = snapshot(share)
    for op in OPERATIONS:
        if op.modifies:
            whole = request_for(op.name, things)
            assert guest.queue.ask(op.name, whole.nodeid, whole.body, out=whole.out).error == EROFS, op.name
            assert guest.queue.ask(op.name, whole.nodeid, b"", out=whole.out).error == EROFS, op.name
    for valid in Fattr:
        with refused(EROFS):
            guest.setattr(things.file, valid)
    for flags in (0, *Rename):
        with refused(EROFS):
            guest.rename2(ROOT, b"file", ROOT, b"dir", flags)
    assert snapshot(share) == before


def test_nothing_is_opened_for_writing(readonly: tuple[Guest, Path]) -> None:
    guest, share = readonly
    (share / "file").write_bytes(b"content")
    nodeid = guest.walk("file")
    for flags in (os.O_WRONLY, os.O_RDWR, 3, os.O_TRUNC, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        with refused(EROFS):
            guest.open(nodeid, flags)
    fh = guest.open(nodeid)
    assert guest.read(nodeid, fh, 0, 10) == b"content"
    for command in (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR):
        with refused(EROFS):
            guest.ioctl(nodeid, fh, command, bytes(28))
    assert (share / "file").read_bytes() == b"content"


def test_reading_goes_on_as_ever(readonly: tuple[Guest, Path]) -> None:
    guest, share = readonly
    (share / "file").write_bytes(b"content")
    (share / "link").symlink_to("file")
    os.setxattr(share / "file", "user.a", b"value")
    nodeid = guest.walk("file")
    fh = guest.open(nodeid)
    assert len(guest.ioctl(nodeid, fh, FS_IOC_GETFLAGS, out_size=4)) == 4
    assert guest.getxattr(nodeid, b"user.a") == b"value"
    assert guest.readlink(guest.walk("link")) == b"file"
    assert {found.name for found in guest.listing(ROOT, plus=True)} == {b"file", b"link"}
    assert guest.statfs()[0] == os.statvfs(share).f_blocks
    guest.statx(nodeid)
    guest.fsync(nodeid, fh)
    guest.syncfs()
    guest.flush(nodeid, fh)
    for name, mask, may in (("file", os.R_OK, True), ("file", os.W_OK, False), ("link", os.W_OK, False)):
        if may:
            guest.access(guest.walk(name), mask)
        else:
            with refused(EROFS):
                guest.access(guest.walk(name), mask)
    os.mkfifo(share / "fifo")  # what is written to it never reaches the file system
    guest.access(guest.walk("fifo"), os.W_OK)
