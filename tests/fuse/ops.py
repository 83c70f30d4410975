"""FUSE operations by name, each one request: OSError is the errno of the reply."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr

from . import wire
from .wire import ROOT, Attr, Dirent, Entry, InitOut

if TYPE_CHECKING:
    from .rawguest import GuestQueue

# What Linux 7.3 sends without a DAX window: all it knows but FILE_OPS and MAP_ALIGNMENT.
LINUX_FLAGS = 0x7BFFFFFB | 0x5FD << 32
FORGET_MAX = 2**64 - 1


@contextmanager
def refused(*errnos: int) -> Iterator[None]:
    """The request in the block is answered with one of these."""
    with pytest.raises(OSError) as info:
        yield
    assert info.value.errno in errnos, f"{info.value}, not {[os.strerror(e) for e in errnos]}"


class Operations:
    """On one queue."""

    def __init__(self, queue: "GuestQueue") -> None:
        self.queue = queue

    def body(
        self,
        op: str | int,
        nodeid: int,
        args: bytes = b"",
        *,
        data: bytes = b"",
        out: int | None = None,
        pages: int = 0,
        uid: int = 0,
        gid: int = 0,
        ext: bytes = b"",
    ) -> bytes:
        """The reply's body."""
        reply = self.queue.ask(
            op, nodeid, args, data=data, out=out, pages=pages, uid=uid, gid=gid, ext=ext
        )
        if reply.error:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply.body

    # ---- session

    def init(
        self, *, major: int = 7, minor: int = 46, readahead: int = 131072, flags: int = LINUX_FLAGS,
        short: bool = False,
    ) -> InitOut:  # fmt: skip
        """short: the 16 bytes of before 7.36."""
        args = abi.INIT_IN_MIN.pack(major, minor, readahead, flags & 0xFFFFFFFF)
        if not short:
            args += abi.INIT_FLAGS2.pack(flags >> 32) + bytes(44)
        return wire.parse_init(self.body("INIT", 0, args))

    def destroy(self) -> None:
        self.body("DESTROY", 0)

    def statfs(self, nodeid: int = ROOT) -> tuple[int, ...]:
        return abi.KSTATFS.unpack(self.body("STATFS", nodeid))

    # ---- names

    def lookup(self, parent: int, name: bytes) -> Entry:
        return wire.parse_entry(self.body("LOOKUP", parent, name + b"\0"))

    def walk(self, path: str) -> int:
        """The nodeid of a path below the root, each part looked up."""
        nodeid = ROOT
        for part in path.split("/"):
            nodeid = self.lookup(nodeid, os.fsencode(part)).nodeid
        return nodeid

    def forget(self, nodeid: int, n: int = 1) -> None:
        self.queue.ask("FORGET", nodeid, wire.FORGET_IN.pack(n))

    def batch_forget(self, *pairs: tuple[int, int], count: int | None = None) -> None:
        """(nodeid, nlookup) each. count: what is said there are, if it is to lie."""
        head = wire.BATCH_FORGET_IN.pack(len(pairs) if count is None else count, 0)
        self.queue.ask("BATCH_FORGET", 0, head + b"".join(wire.FORGET_ONE.pack(*pair) for pair in pairs))

    def mkdir(
        self, parent: int, name: bytes, mode: int = 0o755, *, umask: int = 0, uid: int = 0, gid: int = 0,
        ext: bytes = b"",
    ) -> Entry:  # fmt: skip
        args = abi.MKDIR_IN.pack(mode, umask) + name + b"\0"
        return wire.parse_entry(self.body("MKDIR", parent, args, uid=uid, gid=gid, ext=ext))

    def mknod(
        self, parent: int, name: bytes, mode: int, device: int = 0, *, umask: int = 0, uid: int = 0,
        gid: int = 0, ext: bytes = b"",
    ) -> Entry:  # fmt: skip
        args = abi.MKNOD_IN.pack(mode, wire.encode_dev(device), umask, 0) + name + b"\0"
        return wire.parse_entry(self.body("MKNOD", parent, args, uid=uid, gid=gid, ext=ext))

    def symlink(
        self, parent: int, name: bytes, target: bytes, *, uid: int = 0, gid: int = 0, ext: bytes = b""
    ) -> Entry:
        args = name + b"\0" + target + b"\0"
        return wire.parse_entry(self.body("SYMLINK", parent, args, uid=uid, gid=gid, ext=ext))

    def readlink(self, nodeid: int) -> bytes:
        return self.body("READLINK", nodeid, pages=4095)

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        return wire.parse_entry(self.body("LINK", parent, abi.LINK_IN.pack(nodeid) + name + b"\0"))

    def unlink(self, parent: int, name: bytes) -> None:
        self.body("UNLINK", parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        self.body("RMDIR", parent, name + b"\0")

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        self.body("RENAME", parent, abi.RENAME_IN.pack(new_parent) + name + b"\0" + new_name + b"\0")

    def rename2(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        head = abi.RENAME2_IN.pack(new_parent, flags, 0)
        self.body("RENAME2", parent, head + name + b"\0" + new_name + b"\0")

    # ---- attributes

    def getattr(self, nodeid: int, fh: int | None = None) -> Attr:
        args = wire.GETATTR_IN.pack(fh is not None, 0, fh or 0)
        return wire.parse_attr(self.body("GETATTR", nodeid, args))

    def statx(
        self, nodeid: int, mask: int = 0xFFF, *, fh: int | None = None, flags: int = 0
    ) -> wire.Statx:
        args = abi.STATX_IN.pack(fh is not None, 0, fh or 0, flags, mask)
        return wire.parse_statx(self.body("STATX", nodeid, args))

    def access(self, nodeid: int, mask: int, *, uid: int = 0, gid: int = 0) -> None:
        self.body("ACCESS", nodeid, abi.ACCESS_IN.pack(mask, 0), uid=uid, gid=gid)

    def setattr(
        self, nodeid: int, valid: int, *, fh: int = 0, size: int = 0, atime: int = 0, atime_ns: int = 0,
        mtime: int = 0, mtime_ns: int = 0, mode: int = 0, uid: int = 0, gid: int = 0,
    ) -> Attr:  # fmt: skip
        args = abi.SETATTR_IN.pack(
            valid, 0, fh, size, 0, atime, mtime, 0, atime_ns, mtime_ns, 0, mode, 0, uid, gid, 0
        )
        return wire.parse_attr(self.body("SETATTR", nodeid, args))

    def truncate(self, nodeid: int, size: int, fh: int | None = None) -> Attr:
        valid = Fattr.SIZE | (Fattr.FH if fh is not None else 0)
        return self.setattr(nodeid, valid, size=size, fh=fh or 0)

    def setxattr(
        self, nodeid: int, name: bytes, value: bytes, flags: int = 0, *, setxattr_flags: int | None = None
    ) -> None:
        """setxattr_flags: of the form with FUSE_SETXATTR_EXT."""
        head = abi.SETXATTR_IN.pack(len(value), flags)
        if setxattr_flags is not None:
            head = abi.SETXATTR_IN_EXT.pack(len(value), flags, setxattr_flags, 0)
        self.body("SETXATTR", nodeid, head + name + b"\0" + value)

    def getxattr(self, nodeid: int, name: bytes, size: int = 256) -> bytes:
        args = abi.GETXATTR_IN.pack(size, 0) + name + b"\0"
        return self.body("GETXATTR", nodeid, args, out=size or abi.GETXATTR_OUT.size)

    def listxattr(self, nodeid: int, size: int = 256) -> bytes:
        args = abi.GETXATTR_IN.pack(size, 0)
        return self.body("LISTXATTR", nodeid, args, out=size or abi.GETXATTR_OUT.size)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        self.body("REMOVEXATTR", nodeid, name + b"\0")

    # ---- files

    def open(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> int:
        return self.opened(self.body("OPEN", nodeid, abi.OPEN_IN.pack(flags, open_flags)))

    def opened(self, body: bytes) -> int:
        """fh of an open_out"""
        fh, _flags, backing = wire.OPEN_OUT.unpack(body)
        assert backing == 0
        return int(fh)

    def create(
        self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644, *, umask: int = 0,
        open_flags: int = 0, uid: int = 0, gid: int = 0, ext: bytes = b"",
    ) -> tuple[Entry, int]:  # fmt: skip
        args = abi.CREATE_IN.pack(flags | os.O_CREAT, mode, umask, open_flags) + name + b"\0"
        body = self.body("CREATE", parent, args, uid=uid, gid=gid, ext=ext)
        return wire.parse_entry(body), self.opened(body[wire.ENTRY_SIZE :])

    def tmpfile(
        self, parent: int, flags: int = os.O_RDWR, mode: int = 0o600, *, umask: int = 0, uid: int = 0,
        gid: int = 0, ext: bytes = b"",
    ) -> tuple[Entry, int]:  # fmt: skip
        args = abi.CREATE_IN.pack(flags | os.O_TMPFILE, mode, umask, 0) + b"/\0"
        body = self.body("TMPFILE", parent, args, uid=uid, gid=gid, ext=ext)
        return wire.parse_entry(body), self.opened(body[wire.ENTRY_SIZE :])

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> bytes:
        data = self.body("READ", nodeid, wire.read_in(fh, offset, size), pages=size)
        assert len(data) <= size
        return data

    def write(
        self, nodeid: int, fh: int, offset: int, data: bytes, *, flags: int = 0, write_flags: int = 0
    ) -> int:
        args = wire.WRITE_IN.pack(fh, offset, len(data), write_flags, 0, flags, 0)
        size, padding = wire.WRITE_OUT.unpack(self.body("WRITE", nodeid, args, data=data))
        assert padding == 0 and size <= len(data)
        return int(size)

    def release(self, nodeid: int, fh: int, op: str = "RELEASE") -> None:
        self.body(op, nodeid, abi.RELEASE_IN.pack(fh, 0, 0, 0))

    def flush(self, nodeid: int, fh: int) -> None:
        self.body("FLUSH", nodeid, abi.FLUSH_IN.pack(fh, 0, 0, 0))

    def fsync(self, nodeid: int, fh: int, flags: int = 0, op: str = "FSYNC") -> None:
        self.body(op, nodeid, abi.FSYNC_IN.pack(fh, flags, 0))

    def fallocate(
        self, nodeid: int, fh: int, offset: int, length: int, mode: int = 0, *, uid: int = 0
    ) -> None:
        self.body("FALLOCATE", nodeid, abi.FALLOCATE_IN.pack(fh, offset, length, mode, 0), uid=uid)

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        body = self.body("LSEEK", nodeid, abi.LSEEK_IN.pack(fh, offset, whence, 0))
        return int(abi.LSEEK_OUT.unpack(body)[0])

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, to: int, to_fh: int, to_offset: int, length: int, *,
        flags: int = 0, uid: int = 0, op: str = "COPY_FILE_RANGE_64",
    ) -> int:  # fmt: skip
        args = abi.COPY_FILE_RANGE_IN.pack(fh, offset, to, to_fh, to_offset, length, flags)
        return int.from_bytes(self.body(op, nodeid, args, uid=uid), "little")

    def ioctl(
        self, nodeid: int, fh: int, command: int, data: bytes = b"", out_size: int = 0, *, flags: int = 0,
        in_size: int | None = None, pages: int | None = None, uid: int = 0, gid: int = 0,
    ) -> bytes:  # fmt: skip
        """in_size, pages: what is said to come, and the room there is, if they are to lie."""
        size = len(data) if in_size is None else in_size
        args = abi.IOCTL_IN.pack(fh, flags, command, 0, size, out_size)
        body = self.body(
            "IOCTL", nodeid, args, data=data, out=abi.IOCTL_OUT.size,
            pages=out_size if pages is None else pages, uid=uid, gid=gid,
        )  # fmt: skip
        assert abi.IOCTL_OUT.unpack_from(body) == (0, 0, 0, 0)
        return body[abi.IOCTL_OUT.size :]

    def syncfs(self, nodeid: int = ROOT) -> None:
        self.body("SYNCFS", nodeid, abi.SYNCFS_IN.pack(0))

    # ---- directories

    def opendir(self, nodeid: int) -> int:
        return self.opened(self.body("OPENDIR", nodeid, abi.OPEN_IN.pack(os.O_DIRECTORY, 0)))

    def readdir(
        self, nodeid: int, fh: int, offset: int = 0, size: int = wire.PAGE, *, plus: bool = False
    ) -> list[Dirent]:
        args = wire.read_in(fh, offset, size)
        body = self.body("READDIRPLUS" if plus else "READDIR", nodeid, args, pages=size)
        assert len(body) <= size
        return list(wire.parse_dirents(body, plus))

    def listing(self, nodeid: int, *, size: int = wire.PAGE, plus: bool = False) -> list[Dirent]:
        """A whole directory, in as many requests as it takes; without `.` and `..`."""
        fh = self.opendir(nodeid)
        found: list[Dirent] = []
        offset = 0
        while part := self.readdir(nodeid, fh, offset, size, plus=plus):
            found += part
            offset = part[-1].off
        self.release(nodeid, fh, "RELEASEDIR")
        return [dirent for dirent in found if dirent.name not in (b".", b"..")]
