"""COPY_FILE_RANGE, SYNCFS, and every mode of FALLOCATE and RENAME2: what moves or settles whole ranges."""

import ctypes
import os
import stat
from collections.abc import Callable
from errno import EBADF, EEXIST, EFBIG, EINVAL, EISDIR, ENXIO, EOPNOTSUPP
from pathlib import Path

import pytest
from fuse.fixtures import StartGuest, guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, disk

from vfsd.fuse import abi
from vfsd.fuse.abi import Rename

COPY_MAX = 128 << 20
LAST = 2**63 - 1
OPS = ["COPY_FILE_RANGE", "COPY_FILE_RANGE_64"]


@pytest.fixture
def pair(guest: Guest, share: Path) -> tuple[int, int, int, int]:
    """nodeid and fh of `from`, which has content, and of `to`, which has none."""
    (share / "from").write_bytes(bytes(range(256)) * 64)
    (share / "to").touch()
    source, target = guest.walk("from"), guest.walk("to")
    return source, guest.open(source, os.O_RDONLY), target, guest.open(target, os.O_RDWR)


@pytest.mark.parametrize("op", OPS)
def test_copy(guest: Guest, share: Path, pair: tuple[int, int, int, int], op: str) -> None:
    source, fh, target, to_fh = pair
    data = (share / "from").read_bytes()
    assert guest.copy_file_range(source, fh, 0, target, to_fh, 0, len(data), op=op) == len(data)
    assert (share / "to").read_bytes() == data
    assert guest.copy_file_range(source, fh, 5, target, to_fh, 20_000, 100, op=op) == 100
    assert (share / "to").read_bytes() == data + bytes(20_000 - len(data)) + data[5:105]
    # Short where the source ends; nothing beyond it.
    assert guest.copy_file_range(source, fh, len(data) - 10, target, to_fh, 0, 100, op=op) == 10
    assert guest.copy_file_range(source, fh, len(data), target, to_fh, 0, 100, op=op) == 0
    assert guest.copy_file_range(source, fh, 0, target, to_fh, 0, 0, op=op) == 0
    assert (share / "to").read_bytes()[:10] == data[-10:]


@pytest.mark.parametrize("op", OPS)
def test_a_copy_is_short_rather_than_long(guest: Guest, share: Path, op: str) -> None:
    size = COPY_MAX + 4096
    for name in ("from", "to"):
        (share / name).touch()
    os.truncate(share / "from", size)
    source, target = guest.walk("from"), guest.walk("to")
    fh, to_fh = guest.open(source), guest.open(target, os.O_WRONLY)
    assert guest.copy_file_range(source, fh, 0, target, to_fh, 0, 2**64 - 1, op=op) == COPY_MAX
    assert guest.copy_file_range(source, fh, COPY_MAX, target, to_fh, COPY_MAX, 2**32 - 4096, op=op) == 4096
    assert (share / "to").stat().st_size == size


def host_copy(share: Path, at: int, to: int, length: int) -> int:
    """copy_file_range(2) itself, with the same bits in its signed arguments."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(share / "from", "rb") as source, open(share / "to", "r+b") as target:
        done: int = libc.copy_file_range(
            source.fileno(), ctypes.byref(ctypes.c_uint64(at)),
            target.fileno(), ctypes.byref(ctypes.c_uint64(to)), ctypes.c_size_t(length), 0,
        )  # fmt: skip
    if done < 0:
        raise OSError(ctypes.get_errno(), "copy_file_range")
    return done


def outcome(call: Callable[[], int]) -> int:
    """What it comes to, an errno as a negative number."""
    try:
        return call()
    except OSError as problem:
        return -(problem.errno or 0)


@pytest.mark.parametrize("op", OPS)
def test_bad_copies(guest: Guest, share: Path, pair: tuple[int, int, int, int], op: str) -> None:
    source, fh, target, to_fh = pair

    def copy(*arguments: int, flags: int = 0) -> int:
        return guest.copy_file_range(source, *arguments, flags=flags, op=op)

    for bad in (0, 1 << 40, 2**63, 2**64 - 1):
        with refused(EBADF):
            copy(bad, 0, target, to_fh, 0, 10)
        with refused(EBADF):
            copy(fh, 0, target, bad, 0, 10)
    with refused(EBADF):  # not open for that
        copy(fh, 0, source, fh, 10_000_000, 10)
    writer = guest.open(source, os.O_WRONLY)
    with refused(EBADF):
        copy(writer, 0, target, to_fh, 0, 10)
    for flags in (1, 2**31, 2**32, 2**63, 2**64 - 1):
        with refused(EINVAL):
            copy(fh, 0, target, to_fh, 0, 10, flags=flags)
    for at, to, length in (
        (LAST, 0, 10), (0, LAST, 10), (0, LAST - 10, 10), (LAST, LAST, LAST), (1, LAST, LAST), (2**63, 0, 10),
        (0, 2**63, 10), (2**64 - 1, 0, 10), (0, 2**64 - 1, 10),
    ):  # fmt: skip
        assert outcome(lambda: copy(fh, at, target, to_fh, to, length)) == outcome(  # noqa: B023
            lambda: host_copy(share, at, to, length)  # noqa: B023
        ), (at, to, length)
    both = guest.open(source, os.O_RDWR)
    with refused(EINVAL):  # it overlaps
        copy(both, 0, source, both, 10, 100)
    with refused(EISDIR):
        copy(guest.opendir(ROOT), 0, target, to_fh, 0, 10)
    assert (share / "to").read_bytes() == b""


def test_a_copy_keeps_no_other_request_waiting(start_guest: StartGuest, share: Path) -> None:
    """On the one queue there is, what comes after it is answered before it."""
    guest = start_guest()
    guest.init()
    (share / "from").write_bytes(os.urandom(1 << 20) * 100)
    (share / "to").touch()
    source, target = guest.walk("from"), guest.walk("to")
    fh, to_fh = guest.open(source), guest.open(target, os.O_WRONLY)
    args = abi.COPY_FILE_RANGE_IN.pack(fh, 0, target, to_fh, 0, 100 << 20, 0)
    token = guest.queue.submit("COPY_FILE_RANGE_64", source, args)
    during = 0
    while token not in guest.queue._done:
        guest.getattr(source)
        during += 1
    assert guest.queue.wait(token).body == (100 << 20).to_bytes(8, "little")
    assert during > 3


# SYNCFS


def on_disk(image: Path, data: bytes) -> bool:
    """What the loop device's file has, read past every cache of the file system in it."""
    return data in image.read_bytes()


@pytest.mark.skipif(disk.missing() is not None, reason=str(disk.missing()))
def test_syncfs_returns_when_the_data_are_on_the_disk(tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "point"
    with disk.loop_mount(image, point, 24):
        (point / "share" / "dir").mkdir(parents=True)
        with Daemon(point / "share") as served, guests_of(served) as start:
            guest = start()
            guest.init()
            for number, nodeid in enumerate((ROOT, guest.walk("dir"))):
                data = os.urandom(1 << 16)
                entry, fh = guest.create(ROOT, b"f%d" % number)
                guest.write(entry.nodeid, fh, 0, data)
                assert not on_disk(image, data)
                guest.syncfs(nodeid)
                assert on_disk(image, data)
                guest.release(entry.nodeid, fh)


def test_syncfs_of_what_is_no_directory(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    guest.syncfs(guest.walk("file"))
    os.mkfifo(share / "fifo")
    with refused(EBADF):
        guest.syncfs(guest.walk("fifo"))
    for size in range(8):
        assert guest.queue.ask("SYNCFS", ROOT, bytes(size)).error == EINVAL


# FALLOCATE

KEEP_SIZE, PUNCH_HOLE, ZERO = 1, 2, 16  # of the eight there are


def test_every_mode_of_fallocate(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"x" * 16384)
    nodeid = guest.walk("file")
    fh = guest.open(nodeid, os.O_RDWR)
    passed = {0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE}
    for mode in range(256):
        if mode in passed:
            guest.fallocate(nodeid, fh, 4096, 4096, mode)
        else:
            with refused(EOPNOTSUPP):
                guest.fallocate(nodeid, fh, 4096, 4096, mode)
    assert (share / "file").read_bytes() == b"x" * 4096 + bytes(4096) + b"x" * 8192
    for mode in (1 << 8, 1 << 31, 2**32 - 1):
        with refused(EOPNOTSUPP):
            guest.fallocate(nodeid, fh, 0, 4096, mode)
    for offset, length in ((LAST, 1), (LAST, LAST), (2**40, LAST - 2**40)):
        with refused(EFBIG):
            guest.fallocate(nodeid, fh, offset, length)
    for offset, length in ((2**63, 1), (0, 0), (0, 2**63), (2**64 - 1, 2**64 - 1)):
        with refused(EINVAL):
            guest.fallocate(nodeid, fh, offset, length)


def test_lseek_beyond_every_file(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"x")
    nodeid = guest.walk("file")
    fh = guest.open(nodeid)
    for offset in (1, LAST, 2**63, 2**64 - 1):
        for whence in abi.SeekWhence:
            with refused(ENXIO):
                guest.lseek(nodeid, fh, offset, whence)


# RENAME2


def test_rename_leaves_a_whiteout(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"content")
    (share / "other").touch()
    share.chmod(0o777)
    uid = 1234 if os.geteuid() == 0 else 0
    body = abi.RENAME2_IN.pack(ROOT, Rename.WHITEOUT, 0) + b"file\0moved\0"
    reply = guest.queue.ask("RENAME2", ROOT, body, uid=uid, gid=uid)
    share.chmod(0o755)
    assert reply.error == 0
    assert (share / "moved").read_bytes() == b"content"
    st = os.lstat(share / "file")
    assert stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
    assert st.st_uid == uid
    with refused(EINVAL):
        guest.rename2(ROOT, b"moved", ROOT, b"other", Rename.WHITEOUT | Rename.EXCHANGE)
    with refused(EEXIST):
        guest.rename2(ROOT, b"moved", ROOT, b"other", Rename.WHITEOUT | Rename.NOREPLACE)
    guest.rename2(ROOT, b"moved", ROOT, b"new", Rename.WHITEOUT | Rename.NOREPLACE)
    guest.mkdir(ROOT, b"roots")
    assert os.stat(share / "roots").st_uid == os.geteuid()
