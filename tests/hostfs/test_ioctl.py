"""IOCTL: the flags of a file, sizes that lie, and every other command."""

import fcntl
import os
from errno import EBADF, EINVAL, ENOTTY, EOPNOTSUPP, EPERM
from pathlib import Path

import pytest
from fuse.ops import refused
from fuse.rawguest import Guest, scrambled
from fuse.requests import FS_IOC_GETFLAGS
from fuse.wire import ROOT

from vfsd.fuse import abi

# linux/fs.h
FS_IOC_SETFLAGS = 0x40086602
FS_IOC32_GETFLAGS, FS_IOC32_SETFLAGS = 0x80046601, 0x40046602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
NODUMP = 0x40  # FS_NODUMP_FL
IMMUTABLE = 0x10
XFLAG_NODUMP = 0x80  # FS_XFLAG_NODUMP
COMPAT, DIR = 1, 16
IOC_SIZE_MAX = 2**14 - 1

File = tuple[int, int]


def host_flags(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4], "little")
    finally:
        os.close(fd)


@pytest.fixture
def file(guest: Guest, share: Path) -> File:
    (share / "file").write_bytes(b"content")
    try:
        host_flags(share / "file")
    except OSError as problem:
        pytest.skip(f"the file system of {share} has no flags: {problem.strerror}")
    nodeid = guest.walk("file")
    return nodeid, guest.open(nodeid)


def number(data: bytes) -> int:
    assert len(data) == 4
    return int.from_bytes(data, "little")


@pytest.mark.parametrize(
    ("get", "put"), [(FS_IOC_GETFLAGS, FS_IOC_SETFLAGS), (FS_IOC32_GETFLAGS, FS_IOC32_SETFLAGS)]
)
def test_flags(guest: Guest, share: Path, file: File, get: int, put: int) -> None:
    before = number(guest.ioctl(*file, get, out_size=4))
    assert before == host_flags(share / "file")
    assert guest.ioctl(*file, put, (before | NODUMP).to_bytes(4, "little")) == b""
    assert host_flags(share / "file") == before | NODUMP
    # As before Linux 5.13, where the command's size counts.
    assert number(guest.ioctl(*file, get, out_size=8, flags=COMPAT)) == before | NODUMP
    assert guest.ioctl(*file, put, before.to_bytes(8, "little"), flags=COMPAT) == b""
    assert host_flags(share / "file") == before


def test_flags_of_a_directory(guest: Guest, share: Path, file: File) -> None:
    (share / "dir").mkdir()
    nodeid = guest.walk("dir")
    fh = guest.opendir(nodeid)
    before = number(guest.ioctl(nodeid, fh, FS_IOC_GETFLAGS, out_size=4, flags=DIR))
    guest.ioctl(nodeid, fh, FS_IOC_SETFLAGS, (before | NODUMP).to_bytes(4, "little"), flags=DIR)
    assert host_flags(share / "dir") == before | NODUMP


def test_attributes(guest: Guest, share: Path, file: File) -> None:
    before = guest.ioctl(*file, FS_IOC_FSGETXATTR, out_size=28)
    assert len(before) == 28
    changed = (int.from_bytes(before[:4], "little") | XFLAG_NODUMP).to_bytes(4, "little") + before[4:]
    assert guest.ioctl(*file, FS_IOC_FSSETXATTR, changed) == b""
    assert host_flags(share / "file") & NODUMP
    assert guest.ioctl(*file, FS_IOC_FSGETXATTR, out_size=28) == changed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_setting_is_the_callers(guest: Guest, share: Path, file: File) -> None:
    flags = host_flags(share / "file")
    wanted = (flags | NODUMP).to_bytes(4, "little")
    with refused(EPERM):
        guest.ioctl(*file, FS_IOC_SETFLAGS, wanted, uid=1234, gid=1234)
    os.chown(share / "file", 1234, 1234)
    guest.ioctl(*file, FS_IOC_SETFLAGS, wanted, uid=1234, gid=1234)
    with refused(EPERM):
        guest.ioctl(*file, FS_IOC_SETFLAGS, (flags | IMMUTABLE).to_bytes(4, "little"), uid=1234, gid=1234)
    assert host_flags(share / "file") == flags | NODUMP
    guest.mkdir(ROOT, b"roots")  # the pool's thread is itself again
    assert os.stat(share / "roots").st_uid == 0


def test_no_other_ioctl_reaches_the_host(guest: Guest, share: Path, file: File) -> None:
    some = [0, 1, 0x5421, 0x80081272, 0xC0045878, 0xC0185879, 0x40049409, 0x4020940D, 0x6685, 2**32 - 1]
    for command in (*some, FS_IOC_GETFLAGS + 0x100, FS_IOC_FSGETXATTR + 0x10000):
        for size in (0, 1, 4095, 4096, 4097, IOC_SIZE_MAX, IOC_SIZE_MAX + 1):
            with refused(ENOTTY):
                guest.ioctl(*file, command, b"x" * size, out_size=size)
    with refused(ENOTTY, EOPNOTSUPP):
        guest.ioctl(*file, 0x40046602 | 0x100, bytes(4))
    assert (share / "file").read_bytes() == b"content"


def test_sizes_that_lie(guest: Guest, share: Path, file: File) -> None:
    before = host_flags(share / "file")
    for out_size, pages in ((0, 100), (3, 100), (4, 3), (2**32 - 1, 100), (2**31, 100), (8, 7), (101, 100)):
        with refused(EINVAL):
            guest.ioctl(*file, FS_IOC_GETFLAGS, out_size=out_size, pages=pages)
    for in_size, data in ((0, b"1234"), (3, b"1234"), (5, b"1234"), (2**32 - 1, b"1234"), (4, b"123")):
        with refused(EINVAL):
            guest.ioctl(*file, FS_IOC_SETFLAGS, data, in_size=in_size)
    for size in (0, 27):
        with refused(EINVAL):
            guest.ioctl(*file, FS_IOC_FSGETXATTR, out_size=size, pages=100)
        with refused(EINVAL):
            guest.ioctl(*file, FS_IOC_FSSETXATTR, bytes(size))
    for room in range(16):
        args = abi.IOCTL_IN.pack(file[1], 0, FS_IOC_GETFLAGS, 0, 0, 4)
        assert guest.queue.ask("IOCTL", file[0], args, out=room).error == EINVAL
    for flags in (4, 64, 2**31, 2**32 - 1):
        with refused(EINVAL):
            guest.ioctl(*file, FS_IOC_GETFLAGS, out_size=4, flags=flags)
    assert host_flags(share / "file") == before


def test_data_beyond_what_is_needed(guest: Guest, share: Path, file: File) -> None:
    """In what is sent it is not looked at; nothing is written where it is room."""
    before = host_flags(share / "file")
    guest.framing = scrambled(7)
    data = before.to_bytes(4, "little") + b"\xff" * (IOC_SIZE_MAX - 4)
    assert guest.ioctl(*file, FS_IOC_SETFLAGS, data, out_size=IOC_SIZE_MAX) == b""
    assert number(guest.ioctl(*file, FS_IOC_GETFLAGS, b"x" * IOC_SIZE_MAX, out_size=IOC_SIZE_MAX)) == before


def test_unknown_handles(guest: Guest, file: File) -> None:
    nodeid, fh = file
    guest.release(nodeid, fh)
    for bad in (fh, 0, 1, 2**63, 2**64 - 1):
        with refused(EBADF):
            guest.ioctl(nodeid, bad, FS_IOC_GETFLAGS, out_size=4)
        with refused(EBADF):
            guest.ioctl(nodeid, bad, FS_IOC_SETFLAGS, bytes(4))
