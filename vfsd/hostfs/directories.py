"""Open directories and their listings."""

import os
from collections.abc import Callable

from vfsd.fuse import abi
from vfsd.fuse.dispatch import Request
from vfsd.hostfs._syscalls import getdents
from vfsd.hostfs.files import OFFSET_MAX, fsync, release
from vfsd.hostfs.fs import HostFs

NO_ENTRY = bytes(abi.ENTRY_OUT_SIZE)  # nodeid 0: nothing looked up, nothing to forget
LISTING_MAX = 1 << 20  # bytes: the most that one reply holds

releasedir = release
fsyncdir = fsync


def opendir(fs: HostFs, request: Request) -> bytes:
    request.take(abi.OPEN_IN)
    with fs.tables.pin(request.nodeid) as pin:
        fd = fs.reopen(pin, os.O_RDONLY | os.O_DIRECTORY)
    return abi.OPEN_OUT.pack(fs.tables.open(fd), fs.policy.cache.opendir_flags, 0)


def readdir(fs: HostFs, request: Request) -> bytes:
    return listing(fs, request, 0, lambda name: b"")


def readdirplus(fs: HostFs, request: Request) -> bytes:
    def entry(name: bytes) -> bytes:
        if name in (b".", b".."):
            return NO_ENTRY
        try:
            return fs.tables.lookup(request.nodeid, name)
        except OSError:
            # Gone since, or out of descriptors: the name is listed all the same, the guest may ask.
            return NO_ENTRY

    return listing(fs, request, abi.ENTRY_OUT_SIZE, entry)


def listing(fs: HostFs, request: Request, entry_size: int, entry: Callable[[bytes], bytes]) -> bytes:
    """As many whole records as the guest asked for: entry(name), dirent, name, padded to 8."""
    fh, offset, size, _flags, _owner, _, _ = request.take(abi.READ_IN)
    room = min(size, request.room, LISTING_MAX)
    if offset > OFFSET_MAX:
        offset -= 1 << 64  # ext4's hashed positions fill 63 bits, others' are signed
    records: list[bytes] = []
    with fs.tables.handle(fh) as handle:
        # A dirent of the host is never longer than the guest's: what is read fits, or nearly.
        for ino, after, kind, name in getdents(handle.fd, offset, bytearray(max(room, abi.PAGE_SIZE))):
            length = (entry_size + abi.DIRENT.size + len(name) + 7) & ~7
            if length > room:
                break
            room -= length
            record = entry(name) + abi.DIRENT.pack(ino, after, len(name), kind) + name
            records.append(record.ljust(length, b"\0"))
    return b"".join(records)
