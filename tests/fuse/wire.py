"""FUSE as a Linux guest reads it: layouts, and the checks of fs/fuse/virtio_fs.c (7.3) on a reply.

Written from linux/fuse.h, apart from vfsd's own structures, so that the two can disagree.
"""

import os
import struct
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from vfsd.fuse.opcodes import NAME, NUMBER, OPERATIONS

IN_HEADER = Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, extlen, padding
OUT_HEADER = Struct("=IiQ")  # len, error, unique
ATTR = Struct("=QQQqqqIIIIIIIIII")
ENTRY_HEAD = Struct("=QQQQII")  # nodeid, generation, entry and attr seconds, their nanoseconds
ATTR_HEAD = Struct("=QI4x")  # attr seconds, nanoseconds
DIRENT = Struct("=QQII")  # ino, off, namelen, type
INIT_OUT = Struct("=IIIIHHIIHHIIH22s")
OPEN_OUT = Struct("=QIi")
GETATTR_IN = Struct("=IIQ")  # flags, dummy, fh
READ_IN = Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = Struct("=QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding
WRITE_OUT = Struct("=II")
FORGET_IN = Struct("=Q")
BATCH_FORGET_IN = Struct("=II")  # count, dummy
FORGET_ONE = Struct("=QQ")  # nodeid, nlookup

ENTRY_SIZE = 128
IN_SIZE = 40
OUT_SIZE = 16
PAGE = 4096
ROOT = 1
ERRNO_MAX = 512

assert (IN_HEADER.size, OUT_HEADER.size, ATTR.size) == (IN_SIZE, OUT_SIZE, 88)
assert ENTRY_HEAD.size + ATTR.size == ENTRY_SIZE and INIT_OUT.size == 64

# Bytes of the body of a reply without error; the others vary.
FIXED = {
    NUMBER[name]: size
    for size, names in (
        (128, "LOOKUP SYMLINK MKNOD MKDIR LINK"),
        (104, "GETATTR SETATTR"),
        (16, "OPEN OPENDIR"),
        (288, "STATX"),
        (8, "WRITE LSEEK COPY_FILE_RANGE COPY_FILE_RANGE_64"),
        (80, "STATFS"),
        (24, "GETLK"),
        (144, "CREATE TMPFILE"),
        (64, "INIT"),
        (0, "UNLINK RMDIR RENAME RENAME2 RELEASE RELEASEDIR FSYNC FSYNCDIR FLUSH SETXATTR"),
        (0, "REMOVEXATTR DESTROY FALLOCATE ACCESS SYNCFS SETLK SETLKW INTERRUPT"),
        (0, "SETUPMAPPING REMOVEMAPPING"),
    )
    for name in names.split()
}
# Without a DAX window, as the raw guest is: tests/dax has one.
SERVED = {op.name: NUMBER[op.name] for op in OPERATIONS if op.module != "hostfs.ops.mappings"}
NO_REPLY = (NUMBER["FORGET"], NUMBER["BATCH_FORGET"])


class Reply(NamedTuple):
    """A chain that came back. error: 0 or a positive errno. used_len 0: it was not answered."""

    used_len: int
    error: int
    body: bytes


class Attr(NamedTuple):
    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @property
    def atime_ns(self) -> int:
        return self.atime * 10**9 + self.atimensec

    @property
    def mtime_ns(self) -> int:
        return self.mtime * 10**9 + self.mtimensec

    def check(self, st: os.stat_result) -> None:
        """Every field is what the host says."""
        assert self == Attr(
            st.st_ino, st.st_size, st.st_blocks,
            st.st_atime_ns // 10**9, st.st_mtime_ns // 10**9, st.st_ctime_ns // 10**9,
            st.st_atime_ns % 10**9, st.st_mtime_ns % 10**9, st.st_ctime_ns % 10**9,
            st.st_mode, st.st_nlink, st.st_uid, st.st_gid, encode_dev(st.st_rdev), st.st_blksize, 0,
        )  # fmt: skip


class Statx(NamedTuple):
    """statx_out, without what is spare."""

    attr_s: int
    attr_ns: int
    flags: int
    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: int
    atime_ns: int
    btime: int
    btime_ns: int
    ctime: int
    ctime_ns: int
    mtime: int
    mtime_ns: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int


class Entry(NamedTuple):
    nodeid: int
    generation: int
    entry_ns: int
    attr_ns: int
    attr: Attr


class Dirent(NamedTuple):
    name: bytes
    ino: int
    off: int
    type: int
    entry: Entry | None  # READDIRPLUS


class InitOut(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int  # both words
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    max_stack_depth: int
    request_timeout: int
    unused: bytes


def encode_dev(device: int) -> int:
    """new_encode_dev() of linux/kdev_t.h"""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def in_header(
    opcode: int, unique: int, nodeid: int, body_len: int, uid: int = 0, gid: int = 0,
    length: int | None = None, extlen: int = 0, pid: int | None = None,
) -> bytes:  # fmt: skip
    """length: the header's, if it is to lie. extlen: of the extensions, in units of 8 bytes. pid: or ours."""
    total = IN_SIZE + body_len if length is None else length
    pid = os.getpid() if pid is None else pid
    return IN_HEADER.pack(total, opcode, unique, nodeid, uid, gid, pid, extlen, 0)


def read_in(fh: int, offset: int, size: int) -> bytes:
    """Of READ, READDIR and READDIRPLUS."""
    return READ_IN.pack(fh, offset, size, 0, 0, 0, 0)


def parse_attr(body: bytes) -> Attr:
    """attr_out"""
    assert len(body) == ATTR_HEAD.size + ATTR.size
    return Attr(*ATTR.unpack_from(body, ATTR_HEAD.size))


def parse_statx(body: bytes) -> Statx:
    """statx_out, as linux/fuse.h lays it out"""
    head, rest = struct.unpack_from("=QII16x", body), body[32:]
    fields = struct.unpack("=IIQIIIHHQQQQqIiqIiqIiqIiIIII14Q", rest)
    assert not any(fields[at] for at in (7, 14, 17, 20, 23)) and not any(fields[28:]), "spare is not zero"
    return Statx(*head, *(value for at, value in enumerate(fields[:28]) if at not in (7, 14, 17, 20, 23)))


def parse_entry(body: bytes, at: int = 0) -> Entry:
    """entry_out"""
    nodeid, generation, entry_s, attr_s, entry_ns, attr_ns = ENTRY_HEAD.unpack_from(body, at)
    attr = Attr(*ATTR.unpack_from(body, at + ENTRY_HEAD.size))
    return Entry(nodeid, generation, entry_s * 10**9 + entry_ns, attr_s * 10**9 + attr_ns, attr)


def parse_dirents(body: bytes, plus: bool) -> Iterator[Dirent]:
    """The records of READDIR or READDIRPLUS, as fs/fuse/readdir.c checks them."""
    at = 0
    while at < len(body):
        entry = None
        start = at
        if plus:
            entry = parse_entry(body, at)
            at += ENTRY_SIZE
        ino, off, namelen, kind = DIRENT.unpack_from(body, at)
        at += DIRENT.size
        name = body[at : at + namelen]
        assert len(name) == namelen > 0 and b"/" not in name and b"\0" not in name
        padded = (at + namelen - start + 7) & ~7
        assert not any(body[at + namelen : start + padded]), "padding is not zero"
        at = start + padded
        assert at <= len(body), "the last record is cut"
        yield Dirent(name, ino, off, kind, entry)


def parse_init(body: bytes) -> InitOut:
    (major, minor, readahead, flags, background, congestion, max_write, time_gran, max_pages, alignment,
     flags2, stack_depth, timeout, unused) = INIT_OUT.unpack(body)  # fmt: skip
    return InitOut(
        major, minor, readahead, flags | flags2 << 32, background, congestion, max_write, time_gran,
        max_pages, alignment, stack_depth, timeout, unused,
    )  # fmt: skip


def check_reply(opcode: int, unique: int, sent: int, room: int, written: int, data: bytes) -> Reply:
    """What Linux 7.3 asks of a reply, and when none may come.

    sent: readable bytes of the chain. written: used.len. data: what is in the writable part.
    """
    what = f"{NAME.get(opcode, opcode)} unique {unique}: used.len {written} of {room}"
    assert written <= room, what
    if written == 0:
        unanswerable = opcode in NO_REPLY or sent < IN_SIZE or room < OUT_SIZE
        assert unanswerable, f"{what}: not answered"
        return Reply(0, 0, b"")
    assert opcode not in NO_REPLY, f"{what}: an answer to what has none"
    assert sent >= IN_SIZE, f"{what}: an answer without a header to answer"
    assert written >= OUT_SIZE, what
    length, error, answered = OUT_HEADER.unpack_from(data)
    what += f", out header {length} {error} {answered}"
    assert length == written, what
    assert answered == unique, what
    assert -ERRNO_MAX < error <= 0, what
    if error:
        assert written == OUT_SIZE, what
    elif opcode in FIXED:
        assert written == OUT_SIZE + FIXED[opcode], what
    return Reply(written, -error, data[OUT_SIZE:written])
