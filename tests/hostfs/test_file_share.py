"""A share that is one regular file."""

import os
from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL, ENOTDIR
from pathlib import Path

import pytest
from fuse import wire
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.requests import REQUESTS, Held, snapshot
from fuse.wire import ROOT
from guests import StartDaemon

from vfsd.fuse.abi import Fattr


@pytest.fixture
def one_file(daemon: StartDaemon, tmp_path: Path) -> Iterator[tuple[Guest, Path]]:
    (tmp_path / "beside").write_bytes(b"secret")
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with guests_of(daemon(path, options=["--xattr"])) as start:
        guest = start()
        guest.init()
        yield guest, path


def test_the_root_is_the_file(one_file: tuple[Guest, Path]) -> None:
    guest, path = one_file
    guest.getattr(ROOT).check(os.stat(path))
    assert guest.statx(ROOT).ino == os.stat(path).st_ino
    fh = guest.open(ROOT, os.O_RDWR)
    assert guest.read(ROOT, fh, 0, 100) == b"content"
    assert guest.write(ROOT, fh, 3, b"TENT!") == 5
    assert path.read_bytes() == b"conTENT!"
    guest.truncate(ROOT, 3)
    guest.setattr(ROOT, Fattr.MODE, mode=0o640)
    guest.setxattr(ROOT, b"user.a", b"value")
    guest.fallocate(ROOT, fh, 0, 4096)
    guest.fsync(ROOT, fh)
    guest.syncfs()
    assert (path.stat().st_size, path.stat().st_mode & 0o777) == (4096, 0o640)
    assert guest.statfs()[0] == os.statvfs(path).f_blocks
    guest.release(ROOT, fh)
    guest.forget(ROOT, 10)
    guest.getattr(ROOT).check(os.stat(path))


def test_it_has_no_names(one_file: tuple[Guest, Path]) -> None:
    guest, path = one_file
    before = snapshot(path.parent)
    calls: list[Callable[[], object]] = [
        lambda: guest.lookup(ROOT, b"beside"),
        lambda: guest.lookup(ROOT, b"file"),
        lambda: guest.create(ROOT, b"new"),
        lambda: guest.mkdir(ROOT, b"new"),
        lambda: guest.symlink(ROOT, b"new", b"x"),
        lambda: guest.unlink(ROOT, b"file"),
        lambda: guest.rename(ROOT, b"file", ROOT, b"new"),
        lambda: guest.link(ROOT, ROOT, b"new"),
        lambda: guest.tmpfile(ROOT),
        lambda: guest.opendir(ROOT),
    ]
    for number, call in enumerate(calls):
        with refused(ENOTDIR, EBADF):
            call()
            raise AssertionError(number)
    for name in (b"..", b".", b"../beside", b"/etc"):
        with refused(EINVAL):
            guest.lookup(ROOT, name)
    assert snapshot(path.parent) == before


def test_every_request_to_a_file_share(one_file: tuple[Guest, Path]) -> None:
    """Whatever it comes to, the daemon goes on and nothing beside the file is touched."""
    guest, path = one_file
    fh = guest.open(ROOT, os.O_RDWR)
    for name, request in REQUESTS.items():
        if name not in ("INIT", "DESTROY", "RELEASE", "RELEASEDIR"):
            nodeid, body, out = request(Held(ROOT, ROOT, ROOT, fh, fh))
            guest.queue.ask(name, nodeid, body, out=wire.FIXED.get(wire.SERVED[name], out))
    assert sorted(os.listdir(path.parent)) == ["beside", "file"]
    assert (path.parent / "beside").read_bytes() == b"secret"
