"""What makes no sense gets the errno that the host's Linux gives for the same on the shared file."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr

from .ops import Operations
from .rawguest import Guest

CONTENT = b"content"
OFFSETS = (2**63 - 1, 2**63 - 2, 2**63 - 4096, 2**63, 2**63 + 1, 2**64 - 4096, 2**64 - 1)
libc = ctypes.CDLL(None, use_errno=True)


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]
    return "fine"


def system_call(name: str, *arguments: object) -> Callable[[], None]:
    """By libc, with numbers that Python would refuse."""

    def call() -> None:
        words = [ctypes.c_uint64(a % 2**64) if isinstance(a, int) else a for a in arguments]
        if getattr(libc, name)(*words) < 0:
            raise OSError(ctypes.get_errno(), name)

    return call


class Both:
    """One file, open for reading and writing: by a guest, and on the host."""

    def __init__(self, guest: Operations, share: Path) -> None:
        self.path = share / "file"
        self.path.write_bytes(CONTENT)
        self.guest = guest
        self.nodeid = guest.walk("file")
        self.fh = guest.open(self.nodeid, os.O_RDWR)
        self.fd = os.open(self.path, os.O_RDWR)

    def alike(self, what: object, ours: Callable[[], object], hosts: Callable[[], object]) -> None:
        found, expected = outcome(ours), outcome(hosts)
        assert found == expected, f"{what}: {found}, on the host {expected}"


@pytest.fixture
def both(guest: Guest, share: Path) -> Both:
    return Both(guest, share)


@pytest.mark.parametrize("offset", OFFSETS)
def test_far_offsets(both: Both, offset: int) -> None:
    guest, nodeid, fh, fd = both.guest, both.nodeid, both.fh, both.fd
    buffer = ctypes.create_string_buffer(16)
    for size in (1, 2):
        both.alike(
            ("read", size), lambda size=size: guest.read(nodeid, fh, offset, size),
            system_call("pread64", fd, buffer, size, offset),
        )  # fmt: skip
        both.alike(
            ("write", size), lambda size=size: guest.write(nodeid, fh, offset, b"x" * size),
            system_call("pwrite64", fd, buffer, size, offset),
        )  # fmt: skip
    both.alike("truncate", lambda: guest.truncate(nodeid, offset), system_call("ftruncate64", fd, offset))
    for mode in (0, 1, 3):
        for start, length in ((offset, 1), (0, offset), (1, offset), (offset, offset)):
            both.alike(
                ("fallocate", mode, start, length),
                lambda mode=mode, at=(start, length): guest.fallocate(nodeid, fh, *at, mode),
                system_call("fallocate64", fd, mode, start, length),
            )
    for whence in (abi.SeekWhence.DATA, abi.SeekWhence.HOLE):
        both.alike(
            ("lseek", whence), lambda whence=whence: guest.lseek(nodeid, fh, offset, whence),
            system_call("lseek64", fd, offset, whence),
        )  # fmt: skip
    os.ftruncate(fd, len(CONTENT))


def test_unknown_flags(both: Both) -> None:
    guest, nodeid, fh, fd = both.guest, both.nodeid, both.fh, both.fd
    file, other = os.fsencode(both.path), os.fsencode(both.path.parent / "other")
    os.close(os.open(other, os.O_CREAT))
    for flags in (8, 16, 1 << 31, 1 | 2):
        both.alike(
            ("rename", flags), lambda flags=flags: guest.rename2(1, b"file", 1, b"other", flags),
            system_call("renameat2", -100, file, -100, other, flags),
        )  # fmt: skip
    for flags in (3, 4, 1 << 31):
        both.alike(
            ("setxattr", flags), lambda flags=flags: guest.setxattr(nodeid, b"user.x", b"v", flags),
            system_call("fsetxattr", fd, b"user.x", b"v", 1, flags),
        )  # fmt: skip
    for mask in (8, 16, 0o777, 1 << 31):
        both.alike(
            ("access", mask), lambda mask=mask: guest.access(nodeid, mask),
            system_call("faccessat", -100, file, mask, 0),
        )  # fmt: skip
    for whence in (5, 6, 1 << 31):
        both.alike(
            ("lseek", whence), lambda whence=whence: guest.lseek(nodeid, fh, 0, whence),
            system_call("lseek64", fd, 0, whence),
        )  # fmt: skip
    assert os.listxattr(both.path) == []


def test_names_and_values_of_attributes(both: Both) -> None:
    guest, nodeid, fd = both.guest, both.nodeid, both.fd
    too_long = (b"user." + b"n" * 251, b"n" * 256, b"n" * 70_000)
    for name in (b"", b"user", b"user.", b"nonsense", b"nonsense.x", *too_long):
        both.alike(
            ("setxattr", name[:20]), lambda name=name: guest.setxattr(nodeid, name, b"v"),
            system_call("fsetxattr", fd, name, b"v", 1, 0),
        )  # fmt: skip
        both.alike(
            ("getxattr", name[:20]), lambda name=name: guest.getxattr(nodeid, name),
            system_call("fgetxattr", fd, name, None, 0),
        )  # fmt: skip
        both.alike(
            ("removexattr", name[:20]), lambda name=name: guest.removexattr(nodeid, name),
            system_call("fremovexattr", fd, name),
        )  # fmt: skip
    for size in (65537, 100_000):
        both.alike(
            ("setxattr", size), lambda size=size: guest.setxattr(nodeid, b"user.x", bytes(size)),
            system_call("fsetxattr", fd, b"user.x", bytes(size), size, 0),
        )  # fmt: skip
    os.setxattr(fd, "user.x", b"value")
    buffer = ctypes.create_string_buffer(4)
    both.alike(
        "getxattr of 4 bytes", lambda: guest.getxattr(nodeid, b"user.x", 4),
        system_call("fgetxattr", fd, b"user.x", buffer, 4),
    )  # fmt: skip
    both.alike(
        "listxattr of 4 bytes", lambda: guest.listxattr(nodeid, 4), system_call("flistxattr", fd, buffer, 4)
    )


def test_modes_and_owners(both: Both) -> None:
    guest, nodeid = both.guest, both.nodeid
    for number in (0o10000, 0o177777, 2**31, 2**32 - 1):
        guest.setattr(nodeid, Fattr.MODE, mode=number)
        found = os.stat(both.path).st_mode
        os.chmod(both.path, number & 0o7777)
        assert found == os.stat(both.path).st_mode
