"""STATX and ACCESS, and what is answered with ENOSYS on purpose."""

import os
import socket
import subprocess
from errno import EACCES, EBADF, EINVAL, ENOSYS
from pathlib import Path

import pytest
from fuse import wire
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT

from vfsd.fuse import abi
from vfsd.fuse.abi import STATX_BASIC, STATX_BTIME
from vfsd.fuse.opcodes import NUMBER

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
FORCE_SYNC, DONT_SYNC = 0x2000, 0x4000  # AT_STATX_*
NOFOLLOW, EMPTY_PATH = 0x100, 0x1000
ATTR_APPEND, ATTR_MOUNT_ROOT = 0x20, 0x2000


def birth_of(path: Path) -> str:
    """Seconds and nanoseconds, or 0."""
    words = subprocess.run(["stat", "-c", "%W %w", path], capture_output=True, text=True, check=True).stdout
    return words.split()[0]


def test_statx_says_what_the_host_does(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"content")
    (share / "dir").mkdir()
    (share / "link").symlink_to("file")
    os.mkfifo(share / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(share / "socket"))
    if os.geteuid() == 0:
        os.mknod(share / "device", 0o060600, os.makedev(0x123, 0x45678))
    for path in (share, *share.iterdir()):
        nodeid = ROOT if path == share else guest.walk(path.name)
        found, st = guest.statx(nodeid), os.lstat(path)
        assert found.mask & STATX_BASIC == STATX_BASIC
        assert (found.attr_s, found.attr_ns, found.flags) == (1, 0, 0)
        assert (found.mode, found.uid, found.gid) == (st.st_mode, st.st_uid, st.st_gid)
        assert (found.ino, found.nlink, found.size, found.blocks) == (
            st.st_ino, st.st_nlink, st.st_size, st.st_blocks
        )  # fmt: skip
        assert found.blksize == st.st_blksize
        assert found.atime * 10**9 + found.atime_ns == st.st_atime_ns
        assert found.mtime * 10**9 + found.mtime_ns == st.st_mtime_ns
        assert found.ctime * 10**9 + found.ctime_ns == st.st_ctime_ns
        assert os.makedev(found.rdev_major, found.rdev_minor) == st.st_rdev
        assert os.makedev(found.dev_major, found.dev_minor) == st.st_dev
        assert not (found.attributes | found.attributes_mask) & ATTR_MOUNT_ROOT


def test_the_birth_time(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    os.utime(share / "file", (1, 1))
    nodeid = guest.walk("file")
    found = guest.statx(nodeid)
    if not found.mask & STATX_BTIME:
        assert birth_of(share / "file") in ("0", "-")
        pytest.skip(f"the file system of {share} keeps no birth time")
    assert str(found.btime) == birth_of(share / "file")
    assert 0 < found.btime_ns < 10**9 or found.btime_ns == 0
    assert found.mtime == 1
    fh = guest.open(nodeid)
    os.unlink(share / "file")
    assert guest.statx(nodeid, fh=fh).btime == found.btime
    assert guest.statx(nodeid, fh=fh).nlink == 0


def test_mask_and_flags(guest: Guest, share: Path) -> None:
    for flags in (0, FORCE_SYNC, DONT_SYNC):
        guest.statx(ROOT, flags=flags)
    assert guest.statx(ROOT, STATX_BTIME | 0x7FFFF000).mask & ~(STATX_BASIC | STATX_BTIME) == 0
    assert guest.statx(ROOT, 0).mode == os.stat(share).st_mode
    for flags in (FORCE_SYNC | DONT_SYNC, NOFOLLOW, EMPTY_PATH, 1, 2**31, 2**32 - 1):
        with refused(EINVAL):
            guest.statx(ROOT, flags=flags)
    with refused(EINVAL):
        guest.statx(ROOT, 2**31)
    with refused(EBADF):
        guest.statx(ROOT, fh=2**63)


def test_access_as_root(guest: Guest, share: Path) -> None:
    (share / "file").touch(0o600)
    nodeid = guest.walk("file")
    for mask in (os.F_OK, os.R_OK, os.W_OK, os.R_OK | os.W_OK):
        guest.access(nodeid, mask)
    for mask in (8, 16, 2**31, 2**32 - 1):
        with refused(EINVAL):
            guest.access(nodeid, mask)
    if os.geteuid() == 0:
        with refused(EACCES):
            guest.access(nodeid, os.X_OK)


@needs_root
def test_access_as_the_caller(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    os.chown(share / "file", 1234, 5678)
    nodeid = guest.walk("file")
    for mode, uid, gid, may in (
        (0o400, 1234, 0, os.R_OK), (0o300, 1234, 5678, os.W_OK | os.X_OK), (0o040, 99, 5678, os.R_OK),
        (0o007, 99, 99, 7), (0o770, 99, 99, 0), (0o070, 1234, 5678, 0),
    ):  # fmt: skip
        (share / "file").chmod(mode)
        for mask in range(8):
            if mask & ~may:
                with refused(EACCES):
                    guest.access(nodeid, mask, uid=uid, gid=gid)
            else:
                guest.access(nodeid, mask, uid=uid, gid=gid)
    guest.mkdir(ROOT, b"roots")  # the queue's thread is itself again
    assert os.stat(share / "roots").st_uid == 0


@pytest.mark.parametrize(
    ("name", "body", "out"),
    [
        ("BMAP", bytes(16), 8), ("POLL", bytes(24), 8),
        ("NOTIFY_REPLY", bytes(40), 0),
    ],
)  # fmt: skip
def test_what_linux_does_by_itself(guest: Guest, name: str, body: bytes, out: int) -> None:
    """ENOSYS, once and for all; without room for that, the chain comes back empty."""
    assert guest.queue.ask(name, ROOT, body, out=out).error == ENOSYS
    request = wire.in_header(NUMBER[name], 2, ROOT, len(body)) + body
    token = guest.queue.submit_bytes(request, [len(request)], [])
    assert guest.queue.wait(token).used_len == 0
    guest.getattr(ROOT)


def test_sizes_that_lie(guest: Guest) -> None:
    for room in (0, 103, 104, 287):
        assert guest.queue.ask("STATX", ROOT, bytes(24), out=room).error == EINVAL
    assert guest.queue.ask("STATX", ROOT, abi.STATX_IN.pack(1, 0, 2**64 - 1, 0, 0), out=288).error == EBADF
