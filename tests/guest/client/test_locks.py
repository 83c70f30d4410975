"""Locks that the daemon wants to hear of, with QEMU's virtiofsd, which offers them."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfsd.fuse.abi import Init
from vfsd.guest import Filesystem

from .conftest import requests


@pytest.fixture
def fs(mounted: Callable[..., Filesystem], shared: Path) -> Filesystem:
    (shared / "file").write_bytes(b"x" * 100)
    found = mounted("qemu-virtiofsd", daemon=("flock", "posix_lock"))
    found.stat("/")
    assert found.conn.has(Init.FLOCK_LOCKS) and found.conn.has(Init.POSIX_LOCKS)
    return found


@pytest.fixture
def on_host(shared: Path) -> Iterator[int]:
    with (shared / "file").open("r+b") as file:
        yield file.fileno()


def test_flock_is_seen_on_the_host_and_goes_with_release(fs: Filesystem, on_host: int) -> None:
    since = requests(fs)
    file = fs.open("/file", "r+")
    fs.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert since("SETLK") == 1
    with pytest.raises(BlockingIOError):
        fcntl.flock(on_host, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with fs.open("/file") as other, pytest.raises(BlockingIOError):
        fs.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    file.close()
    fcntl.flock(on_host, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lockf_is_seen_by_other_owners_and_goes_with_flush(fs: Filesystem) -> None:
    since = requests(fs)
    with fs.open("/file", "r+") as file, fs.open("/file", "r+") as other:
        fs.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
        assert since("SETLK") == 1
        with pytest.raises(BlockingIOError):
            fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 5, 5, owner=-1)
        fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 5, 10, owner=-1)
        file.close()
        fs.lockf(other, fcntl.LOCK_SH | fcntl.LOCK_NB, 5, 5, owner=-1)


def test_a_lock_that_would_wait_is_sent_as_setlkw(fs: Filesystem) -> None:
    """virtiofsd refuses these: a guest that waited could not be killed."""
    since = requests(fs)
    with fs.open("/file", "r+") as file:
        for call in (lambda: fs.flock(file, fcntl.LOCK_EX), lambda: fs.lockf(file, fcntl.LOCK_EX)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP
    assert since("SETLKW") == 2
