"""Operations that only a host's own file system can do: on vfsd's share, and what they fall back to."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.fuse.opcodes import Opcode
from vfsd.guest import Filesystem, mount

from .conftest import requests
from .peers import Peer

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
NODUMP, IMMUTABLE = 0x40, 0x10
MIB = 1 << 20

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may open files as somebody else")


@pytest.fixture
def fs(mounted: Callable[..., Filesystem]) -> Filesystem:
    return mounted("vfsd")


def fails(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, caught.value


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4], "little")
    except OSError as problem:
        pytest.skip(f"the file system of {path} has no flags: {problem.strerror}")
    finally:
        os.close(fd)


def test_flags_and_attributes(fs: Filesystem, shared: Path) -> None:
    (shared / "file").touch()
    (shared / "dir").mkdir()
    for path, flags in (("file", os.O_RDWR), ("dir", os.O_RDONLY | os.O_DIRECTORY)):
        before = flags_of(shared / path)
        with fs.open(path, flags) as file:
            since = requests(fs)
            assert fs.ioctl(file, FS_IOC_GETFLAGS) == before.to_bytes(4, "little")
            assert (since("OPEN", "OPENDIR"), since("IOCTL"), since("RELEASE", "RELEASEDIR")) == (1, 1, 1)
            fs.ioctl(file, FS_IOC_SETFLAGS, (before | NODUMP).to_bytes(8, "little"))
            assert flags_of(shared / path) == before | NODUMP
            attributes = fs.ioctl(file, FS_IOC_FSGETXATTR)
            assert len(attributes) == 28 and attributes[0] & 0x80
            fs.ioctl(file, FS_IOC_FSSETXATTR, bytes([attributes[0] & ~0x80]) + attributes[1:])
            assert flags_of(shared / path) == before
            fails(errno.EFAULT, fs.ioctl, file, FS_IOC_SETFLAGS, b"\0")


@needs_root
def test_only_the_owner_sets_flags_and_only_root_makes_immutable(fs: Filesystem, shared: Path) -> None:
    (shared / "file").touch()
    before = flags_of(shared / "file")
    shared.chmod(0o777)
    with fs.as_user(1234, 1234):
        with fs.open("/file") as file:
            fails(errno.EPERM, fs.ioctl, file, FS_IOC_SETFLAGS, (before | NODUMP).to_bytes(4, "little"))
        with fs.open("/own", "w") as file:
            fs.ioctl(file, FS_IOC_SETFLAGS, (flags_of(shared / "own") | NODUMP).to_bytes(4, "little"))
            fails(errno.EPERM, fs.ioctl, file, FS_IOC_SETFLAGS, (before | IMMUTABLE).to_bytes(4, "little"))
    assert flags_of(shared / "own") & (NODUMP | IMMUTABLE) == NODUMP


def test_a_file_without_a_name_gets_one(fs: Filesystem, shared: Path) -> None:
    with fs.open("/", os.O_TMPFILE | os.O_RDWR, 0o640) as file:
        file.write(b"data")
        assert os.listdir(shared) == []
        st = fs.fstat(file)
        assert (st.st_nlink, st.st_size, oct(st.st_mode & 0o777)) == (0, 4, oct(0o640 & ~os_umask()))
        fs.link_open(file, "/name")
        assert fs.fstat(file).st_nlink == 1
        assert fs.stat("/name").st_ino == st.st_ino
        fails(errno.EEXIST, fs.link_open, file, "/name")
    assert (shared / "name").read_bytes() == fs.read_bytes("/name") == b"data"
    with fs.open("/", os.O_TMPFILE | os.O_EXCL | os.O_WRONLY) as file:
        fails(errno.ENOENT, fs.link_open, file, "/never")
    fails(errno.EINVAL, fs.open, "/", os.O_TMPFILE | os.O_RDONLY)
    assert os.listdir(shared) == ["name"]


def os_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_copy_is_one_request(fs: Filesystem, shared: Path) -> None:
    data = os.urandom(3 * MIB)
    (shared / "one").write_bytes(data)
    with fs.open("/one") as one, fs.open("/two", "w+") as two:
        fs.write_bytes("/other", b"")
        since = requests(fs)
        assert fs.copy_file_range(one, two, len(data)) == len(data)
        assert (since("COPY_FILE_RANGE_64"), since("READ", "WRITE")) == (1, 0)
        assert fs.copy_file_range(one, two, 100, MIB, 5 * MIB) == 100
        assert fs.fstat(two).st_size == 5 * MIB + 100
        two.seek(0)
        assert two.read(len(data)) == data
    assert (shared / "two").read_bytes() == data + bytes(2 * MIB) + data[MIB : MIB + 100]


def test_a_copy_to_an_older_daemon_is_counted_in_32_bits(
    mounted: Callable[..., Filesystem], shared: Path
) -> None:
    (shared / "one").write_bytes(b"content")
    fs = mounted("vfsd", minor=41)
    with fs.open("/one") as one, fs.open("/two", "w+") as two:
        since = requests(fs)
        assert fs.copy_file_range(one, two, 100) == 7
        assert (since("COPY_FILE_RANGE"), since("COPY_FILE_RANGE_64")) == (1, 0)


def test_every_mode_of_fallocate(fs: Filesystem, shared: Path) -> None:
    (shared / "file").write_bytes(b"x" * 16384)
    with fs.open("/file", "r+") as file:
        for mode in (0, 1, 2 | 1, 16, 16 | 1):
            fs.fallocate(file, mode, 4096, 4096)
        for mode in (2, 4, 8, 32, 64, 128):
            fails(errno.EOPNOTSUPP, fs.fallocate, file, mode, 4096, 4096)
        assert file.pread(16384, 0) == b"x" * 4096 + bytes(4096) + b"x" * 8192


def test_the_birth_time_is_the_hosts(fs: Filesystem, shared: Path) -> None:
    (shared / "file").touch()
    os.utime(shared / "file", (1, 1))
    words = subprocess.run(["stat", "-c", "%W", shared / "file"], capture_output=True, text=True, check=True)
    born = fs.birthtime_ns("/file")
    assert (0 if born is None else born // 10**9) == int(words.stdout)


def test_renames_that_exchange_and_leave_a_whiteout(fs: Filesystem, shared: Path) -> None:
    fs.write_bytes("/a", b"a")
    fs.write_bytes("/b", b"b")
    fs.rename("/a", "/b", 2)
    assert (fs.read_bytes("/a"), fs.read_bytes("/b")) == (b"b", b"a")
    fails(errno.EEXIST, fs.rename, "/a", "/b", 1)
    fs.rename("/a", "/c", 4)
    assert fs.read_bytes("/c") == b"b"
    assert (fs.stat("/a").st_mode & 0o170000, fs.stat("/a").st_rdev) == (0o020000, 0)


@needs_root
def test_a_whiteout_is_the_callers(fs: Filesystem, shared: Path) -> None:
    shared.chmod(0o777)
    with fs.as_user(1234, 2345):
        fs.write_bytes("/file", b"")
        fs.rename("/file", "/moved", 4)
    left = os.lstat(shared / "file")
    assert (left.st_mode & 0o170000, left.st_uid, left.st_gid) == (0o020000, 1234, 2345)


def test_a_sync_of_the_share_reaches_the_host(fs: Filesystem) -> None:
    since = requests(fs)
    fs.syncfs()
    assert since("SYNCFS") == 1
    assert not fs.conn.lacks(Opcode.SYNCFS)


def test_a_readonly_share_changes_nothing(mounted: Callable[..., Filesystem], shared: Path) -> None:
    (shared / "file").write_bytes(b"content")
    fs = mounted("vfsd", daemon=("readonly",))
    assert fs.read_bytes("/file") == b"content"
    fails(errno.EROFS, fs.open, "/file", "r+")
    fails(errno.EROFS, fs.open, "/new", "w")
    fails(errno.EROFS, fs.open, "/", os.O_TMPFILE | os.O_RDWR)
    fails(errno.EROFS, fs.truncate, "/file", 0)
    fails(errno.EROFS, fs.unlink, "/file")
    with fs.open("/file") as file:
        fails(errno.EROFS, fs.ioctl, file, FS_IOC_SETFLAGS, bytes(4))
    assert os.listdir(shared) == ["file"]


def test_a_root_that_is_a_file_is_not_what_linux_takes_it_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with Peer("vfsd", tmp_path / "file", cache="auto") as peer, mount(peer.socket) as fs:
        fails(errno.EIO, fs.stat, "/")
        fails(errno.EIO, fs.open, "/")
        fails(errno.EIO, fs.listdir, "/")
