"""Requests that lie: an errno for the guest, nothing for the host."""

import os
import socket
import stat
from collections.abc import Callable
from errno import (
    EBADF,
    EFBIG,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    ENXIO,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
    ESPIPE,
    ESTALE,
)  # fmt: skip
from functools import partial
from pathlib import Path

import pytest
from guests import Daemon

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr
from vfsd.fuse.opcodes import NUMBER

from . import wire
from .fixtures import held
from .ops import FORGET_MAX, refused
from .rawguest import NEXT, WRITE, Guest
from .requests import BY_HANDLE, BY_NAME, BY_NODEID, Held, hold, request_for, snapshot
from .wire import IN_SIZE, OUT_SIZE, ROOT

U64 = 2**64
UNKNOWN_NODEIDS = (0, 2, 3, 2**31, 2**32, 2**32 + 1, 2**32 + 2, U64 - 1, 1 << 63)
UNKNOWN_HANDLES = (0, 1, 2, 2**20, 2**32, 2**32 + 1, U64 - 1, 1 << 63)
OUTSIDE_NAMES = (b"/etc/passwd", b"../outside/secret", b"a/b", b"/", b"dir/", b"./x")
BAD_NAMES = (b"", b".", b"..", *OUTSIDE_NAMES)
LONG_NAMES = (b"n" * 256, b"n" * 4096, b"n" * 70_000)
CALLS = [name for name in wire.SERVED if name not in ("INIT", "DESTROY", "FORGET", "BATCH_FORGET")]


@pytest.fixture
def things(guest: Guest, share: Path) -> Held:
    return hold(guest, share)


@pytest.fixture
def secrets(outside: Path) -> Path:
    """What lies beside the share."""
    if not (outside / "secret").exists():
        (outside / "secret").write_bytes(b"secret")
        (outside / "dir").mkdir()
        (outside / "dir" / "deep").write_bytes(b"deep")
        os.utime(outside / "secret", (1, 1))
    return outside


# Headers


@pytest.mark.parametrize("size", range(IN_SIZE))
def test_cut_header(guest: Guest, size: int) -> None:
    header = wire.in_header(NUMBER["GETATTR"], 2, ROOT, 0)
    token = guest.queue.submit_bytes(header[:size], [size] if size else [], [16, 104])
    assert guest.queue.wait(token).used_len == 0
    guest.getattr(ROOT)


@pytest.mark.parametrize("room", range(OUT_SIZE))
@pytest.mark.parametrize("name", ["LOOKUP", "STATFS", "READ", "MKDIR", "DESTROY"])
def test_no_room_for_the_out_header(guest: Guest, share: Path, name: str, room: int) -> None:
    body = b"name\0" if name == "LOOKUP" else bytes(8) + b"made\0"
    request = wire.in_header(NUMBER[name], 2, ROOT, len(body)) + body
    token = guest.queue.submit_bytes(request, [IN_SIZE, len(body)], [room] if room else [])
    assert guest.queue.wait(token).used_len == 0
    assert os.listdir(share) == []
    guest.getattr(ROOT)


def test_a_header_length_that_lies(guest: Guest, share: Path) -> None:
    (share / "name").touch()
    ask = guest.queue.ask
    for length in (*range(IN_SIZE), 46, 47, 4096, 2**31, 2**32 - 1):
        assert ask("LOOKUP", ROOT, b"name\0", length=length).error == EINVAL, length
    for length in range(IN_SIZE, 45):  # what is behind it is not there
        assert ask("LOOKUP", ROOT, b"name\0", length=length).error == EINVAL, length
    assert ask("LOOKUP", ROOT, b"name\0and more", length=45).error == 0
    for name in CALLS:
        assert ask(name, ROOT, bytes(64), length=IN_SIZE + 65).error == EINVAL, name


# Bodies


@pytest.mark.parametrize("name", CALLS)
def test_cut_body(guest: Guest, share: Path, things: Held, name: str) -> None:
    """Cut anywhere, a request is refused and has done nothing. Whole, it is one that works."""
    whole = request_for(name, things)
    before = snapshot(share)
    for size in range(len(whole.body)):
        reply = guest.queue.ask(name, whole.nodeid, whole.body[:size], out=whole.out)
        assert reply.error == EINVAL, f"{size} of {len(whole.body)} bytes"
    assert snapshot(share) == before
    assert guest.queue.ask(name, whole.nodeid, whole.body, out=whole.out).error == 0


@pytest.mark.parametrize("name", CALLS)
def test_little_room(guest: Guest, served: Daemon, share: Path, things: Held, name: str) -> None:
    """A reply that does not fit is refused before anything has been done or opened for it."""
    whole = request_for(name, things)
    before, held_before = snapshot(share), held(served)
    rooms = range(wire.FIXED.get(NUMBER[name], 0))
    for room in rooms:
        assert guest.queue.ask(name, whole.nodeid, whole.body, out=room).error == EINVAL, room
    if rooms:
        assert snapshot(share) == before
        assert held(served) == held_before
    reply = guest.queue.ask(name, whole.nodeid, whole.body, out=whole.out)
    assert reply.error == 0


@pytest.mark.parametrize("size", [1, 100, 4096, 2**31 - 1, 2**31, 2**32 - 1])
def test_sizes_that_lie(guest: Guest, things: Held, size: int) -> None:
    fh, nodeid = things.fh, things.file
    for out in (0, min(size - 1, 4095)):
        assert guest.queue.ask("READ", nodeid, wire.read_in(fh, 0, size), out=out).error == EINVAL
    args = wire.WRITE_IN.pack(fh, 0, size, 0, 0, 0, 0)
    assert guest.queue.ask("WRITE", nodeid, args, data=bytes(min(size - 1, 4095))).error == EINVAL
    assert guest.queue.ask("WRITE", nodeid, args).error == EINVAL
    assert guest.read(nodeid, fh, 0, 100) == b"content"


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_more_than_was_agreed_on(guest: Guest, things: Held, op: str) -> None:
    """One buffer can be named so often that a request has gigabytes."""
    queue, fh = guest.queue, things.fh
    big, n = 4 << 20, 100
    room = queue.arena + (1 << 19)
    read = op == "READ"
    args = wire.read_in(fh, 0, n * big) if read else wire.WRITE_IN.pack(fh, 0, n * big, 0, 0, 0, 0)
    header = wire.in_header(NUMBER[op], 2, things.file, len(args) + (0 if read else n * big))
    guest.memory.write(queue.arena, header + args)
    buffers = [(room, big, WRITE if read else 0)] * n
    out = (queue.arena + 4096, OUT_SIZE + (0 if read else 8), WRITE)
    parts = [(queue.arena, len(header + args), 0), *([out, *buffers] if read else [*buffers, out])]
    flags = [flag | NEXT for _, _, flag in parts[:-1]] + [parts[-1][2]]
    queue.table(
        queue.desc, [(*part[:2], flag, i) for i, (part, flag) in enumerate(zip(parts, flags, strict=True), 1)]
    )
    used = queue.used_idx
    queue.offer(0)
    queue.wait_used(used + 1)
    assert int.from_bytes(guest.memory.read(out[0] + 4, 4), "little", signed=True) == -EINVAL
    queue.restart()
    guest.getattr(ROOT)


def test_less_data_than_there_is(guest: Guest, share: Path, things: Held) -> None:
    args = wire.WRITE_IN.pack(things.fh, 0, 2, 0, 0, 0, 0)
    reply = guest.queue.ask("WRITE", things.file, args, data=b"CONTENT")
    assert (reply.error, reply.body) == (0, wire.WRITE_OUT.pack(2, 0))
    assert (share / "file").read_bytes() == b"COntent"


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**63 + 1, U64 - 4096, U64 - 1])
def test_far_offsets(guest: Guest, share: Path, things: Held, offset: int) -> None:
    fh, nodeid = things.fh, things.file
    reply = guest.queue.ask("READ", nodeid, wire.read_in(fh, offset, 4096), pages=4096)
    assert reply.error in (EINVAL, EOVERFLOW, EFBIG) or reply.body == b""
    with refused(EINVAL, EFBIG, EOVERFLOW):
        guest.write(nodeid, fh, offset, b"xy")
    with refused(EINVAL, EFBIG, EOVERFLOW):
        guest.fallocate(nodeid, fh, offset, 2)
    with refused(EINVAL, EFBIG, EOVERFLOW):
        guest.fallocate(nodeid, fh, 0, offset)
    with refused(EINVAL, EOVERFLOW, ENXIO):
        guest.lseek(nodeid, fh, offset, abi.SeekWhence.DATA)
    with refused(EINVAL, EFBIG, EOVERFLOW):
        guest.truncate(nodeid, offset)
    with refused(EINVAL, EFBIG, EOVERFLOW):
        guest.truncate(nodeid, offset, fh)
    for plus in (False, True):
        for fd in (fh, things.dir_fh):
            args = wire.read_in(fd, offset, 4096)
            guest.queue.ask("READDIRPLUS" if plus else "READDIR", things.dir, args, pages=4096)
    assert (share / "file").read_bytes() == b"content"


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_numbers_larger_than_an_int(guest: Guest, share: Path, things: Held, number: int) -> None:
    """Every 32-bit field: some answer, and no exception of ours."""
    entries = set(os.listdir(share))
    fh, nodeid = things.fh, things.file
    ask = guest.queue.ask
    ask("MKNOD", ROOT, abi.MKNOD_IN.pack(number, number, number, number) + b"n\0")
    ask("MKNOD", ROOT, abi.MKNOD_IN.pack(stat.S_IFCHR, number, number, number) + b"o\0")
    ask("MKDIR", ROOT, abi.MKDIR_IN.pack(number, number) + b"d\0")
    ask("CREATE", ROOT, abi.CREATE_IN.pack(number & ~os.O_EXCL, number, number, number) + b"c\0")
    ask("OPEN", nodeid, abi.OPEN_IN.pack(number & ~os.O_TRUNC, number))
    ask("OPENDIR", things.dir, abi.OPEN_IN.pack(number, number))
    ask("FALLOCATE", nodeid, abi.FALLOCATE_IN.pack(fh, 0, 1, number, number))
    ask("LSEEK", nodeid, abi.LSEEK_IN.pack(fh, 0, number, number))
    ask("FSYNC", nodeid, abi.FSYNC_IN.pack(fh, number, number))
    ask("FLUSH", nodeid, abi.FLUSH_IN.pack(fh, number, number, U64 - 1))
    ask("RENAME2", ROOT, abi.RENAME2_IN.pack(things.dir, number, number) + b"file\0new\0")
    ask("SETXATTR", nodeid, abi.SETXATTR_IN.pack(number, number) + b"user.x\0v")
    ask("GETXATTR", nodeid, abi.GETXATTR_IN.pack(number, number) + b"user.x\0", out=64)
    ask("LISTXATTR", nodeid, abi.GETXATTR_IN.pack(number, number), out=64)
    ask("GETATTR", nodeid, wire.GETATTR_IN.pack(number, number, fh))
    ask("READDIR", things.dir, abi.READ_IN.pack(things.dir_fh, 0, number, number, 1, 2, 3), out=256)
    for valid in (Fattr.UID, Fattr.GID, Fattr.MODE, Fattr.ATIME, Fattr.MTIME, 2**32 - 1):
        args = abi.SETATTR_IN.pack(
            valid, number, fh, number, 0, 2**63 - 1, -(2**63), -1, number, number, number, number, 0, number,
            number, 0,
        )  # fmt: skip
        ask("SETATTR", nodeid, args)
    assert entries <= set(os.listdir(share)) | {"file"}
    guest.lookup(ROOT, b"dir")


def test_a_body_of_400_kb(guest: Guest, share: Path, things: Held) -> None:
    before = snapshot(share)
    for name in CALLS:
        if name in ("WRITE", "SETATTR"):  # they have all they need
            continue
        reply = guest.queue.ask(name, ROOT, b"n" * 400_000)
        assert reply.error > 0 or name not in (*BY_NAME, "RENAME", "RENAME2", "SETXATTR"), name
    assert snapshot(share) == before


# Names


@pytest.mark.parametrize("name", [*BAD_NAMES, *LONG_NAMES], ids=lambda name: name[:20].decode())
def test_bad_names(guest: Guest, share: Path, things: Held, secrets: Path, name: bytes) -> None:
    before, outside_before = snapshot(share), snapshot(secrets)
    wanted = (ENAMETOOLONG, 7) if name in LONG_NAMES else (EINVAL,)
    for op, make in BY_NAME.items():
        reply = guest.queue.ask(op, ROOT, make(things, name + b"\0"))
        assert reply.error in wanted, op
    for old, new in ((name, b"new"), (b"file", name)):
        for op in ("RENAME", "RENAME2"):
            head = abi.RENAME_IN.pack(ROOT) if op == "RENAME" else abi.RENAME2_IN.pack(ROOT, 0, 0)
            assert guest.queue.ask(op, ROOT, head + old + b"\0" + new + b"\0").error in wanted, op
    assert snapshot(share) == before
    assert snapshot(secrets) == outside_before


def test_names_with_a_nul(guest: Guest, share: Path) -> None:
    (share / "a").touch()
    for name in (b"a\0b", b"\0", b"a\0", b"\0a"):
        with refused(EINVAL):
            guest.lookup(ROOT, name)
    for name in (b"a", b"a\0b", b""):
        assert guest.queue.ask("LOOKUP", ROOT, name).error == EINVAL


# Numbers the guest was never given


def test_unknown_nodeids(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"content")
    before = snapshot(share)
    for nodeid in UNKNOWN_NODEIDS:
        for op, make in BY_NODEID.items():
            assert guest.queue.ask(op, nodeid, make(b"file\0")).error == ESTALE, (op, nodeid)
        with refused(ESTALE):
            guest.link(nodeid, ROOT, b"new")
        with refused(ESTALE):
            guest.rename(ROOT, b"file", nodeid, b"new")
        with refused(ESTALE):
            guest.rename2(ROOT, b"file", nodeid, b"new", 1)
    assert snapshot(share) == before


def test_unknown_handles(guest: Guest, share: Path) -> None:
    (share / "file").write_bytes(b"content")
    nodeid = guest.walk("file")
    for fh in UNKNOWN_HANDLES:
        for op, make in BY_HANDLE.items():
            assert guest.queue.ask(op, nodeid, make(fh), data=b"x" * (op == "WRITE")).error == EBADF, (op, fh)
    assert (share / "file").read_bytes() == b"content"


def test_released_handles(guest: Guest, share: Path) -> None:
    """Also when the number's place has been given to another file."""
    (share / "file").write_bytes(b"content")
    (share / "other").write_bytes(b"other")
    nodeid, other = guest.walk("file"), guest.walk("other")
    for _ in range(5):
        fh = guest.open(nodeid, os.O_RDWR)
        guest.release(nodeid, fh)
        new = guest.open(other, os.O_RDWR)
        for op, make in BY_HANDLE.items():
            assert guest.queue.ask(op, nodeid, make(fh), data=b"x" * (op == "WRITE")).error == EBADF, op
        assert guest.read(other, new, 0, 10) == b"other"


def test_forgotten_nodeids(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    (share / "other").write_bytes(b"other")
    for _ in range(5):
        nodeid = guest.walk("file")
        guest.forget(nodeid)
        other = guest.walk("other")
        for op, make in BY_NODEID.items():
            assert guest.queue.ask(op, nodeid, make(b"file\0")).error == ESTALE, op
        assert guest.getattr(other).size == 5
        guest.forget(other)


def test_forget_of_what_is_not_there_to_forget(guest: Guest, share: Path, things: Held) -> None:
    for nodeid in (ROOT, *UNKNOWN_NODEIDS[:1], 99, 2**32 + ROOT, U64 - 1):
        for n in (0, 1, FORGET_MAX):
            guest.forget(nodeid, n)
            guest.batch_forget((nodeid, n), (nodeid, n))
    guest.forget(things.file, 0)
    guest.getattr(ROOT).check(os.stat(share))
    assert guest.getattr(things.file).size == 7
    guest.batch_forget((things.file, FORGET_MAX), (things.file, FORGET_MAX))
    with refused(ESTALE):
        guest.getattr(things.file)
    assert guest.read(things.file, things.fh, 0, 10) == b"content"


def test_batch_forget_with_a_count_that_lies(guest: Guest, share: Path, things: Held) -> None:
    pairs = ((things.file, 1), (things.dir, 1))
    guest.batch_forget(*pairs, count=0)
    guest.getattr(things.file)
    guest.batch_forget(*pairs, count=1)
    with refused(ESTALE):
        guest.getattr(things.file)
    guest.getattr(things.dir)
    guest.batch_forget((things.dir, 0), count=2**32 - 1)
    guest.batch_forget(count=2**32 - 1)
    guest.getattr(things.dir)
    for size in range(8):
        assert guest.queue.ask("BATCH_FORGET", 0, bytes(size)).used_len == 0
        assert guest.queue.ask("FORGET", things.dir, bytes(size)).used_len == 0
    guest.getattr(things.dir)


def test_forget_with_room_for_a_reply_gets_none(guest: Guest, things: Held) -> None:
    request = wire.in_header(NUMBER["FORGET"], 8, things.file, 8) + wire.FORGET_IN.pack(1)
    assert guest.queue.wait(guest.queue.submit_bytes(request, [48], [16, 128])).used_len == 0
    with refused(ESTALE):
        guest.getattr(things.file)


# The wrong kind


def test_files_as_directories(guest: Guest, things: Held) -> None:
    for plus in (False, True):
        with refused(ENOTDIR):
            guest.readdir(things.file, things.fh, plus=plus)
    for nodeid in (things.file, things.link):
        with refused(ENOTDIR):
            guest.lookup(nodeid, b"below")
        with refused(ENOTDIR):
            guest.mkdir(nodeid, b"below")
        with refused(ENOTDIR):
            guest.create(nodeid, b"below")
        with refused(ENOTDIR):
            guest.unlink(nodeid, b"below")
        with refused(ENOTDIR):
            guest.rename(ROOT, b"file", nodeid, b"below")


def test_directories_as_files(guest: Guest, things: Held) -> None:
    with refused(EISDIR, EBADF):
        guest.read(things.dir, things.dir_fh, 0, 100)
    with refused(EISDIR, EBADF):
        guest.write(things.dir, things.dir_fh, 0, b"x")
    with refused(EISDIR, EBADF, EOPNOTSUPP, EINVAL, 19):
        guest.fallocate(things.dir, things.dir_fh, 0, 100)
    with refused(EISDIR, EBADF, EINVAL):
        guest.truncate(things.dir, 0, things.dir_fh)
    assert guest.queue.ask("LSEEK", things.dir, abi.LSEEK_IN.pack(things.dir_fh, 0, 3, 0)).error < 200


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC])
def test_special_files_are_not_opened(guest: Guest, share: Path, flags: int) -> None:
    """None of the host's devices is worked by opening it, and no fifo's other end woken."""
    os.mkfifo(share / "fifo")
    os.mknod(share / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(share / "loop", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    (share / "target").write_bytes(b"target")
    (share / "link").symlink_to("target")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(share / "socket"))
    reader = os.open(share / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in (b"fifo", b"null", b"loop", b"socket", b"link"):
            nodeid = guest.lookup(ROOT, name).nodeid
            with refused(EBADF, ELOOP, ENXIO, EPERM, EINVAL):
                guest.open(nodeid, flags)
            with refused(ESTALE):
                guest.create(ROOT, name, flags)
            with refused(ENOTDIR, EBADF, ELOOP):
                guest.opendir(nodeid)
            with refused(EBADF, ELOOP, EINVAL):
                guest.truncate(nodeid, 0)
    finally:
        os.close(reader)
    assert (share / "target").read_bytes() == b"target"


def test_no_link_is_followed(guest: Guest, share: Path, secrets: Path) -> None:
    (share / "file").symlink_to(secrets / "secret")
    (share / "dir").symlink_to(secrets)
    (share / "up").symlink_to("../outside/dir")
    (share / "plain").write_bytes(b"plain")
    plain = guest.walk("plain")
    before = snapshot(secrets)
    for name in (b"file", b"dir", b"up"):
        nodeid = guest.lookup(ROOT, name).nodeid
        calls: list[Callable[[], object]] = [
            partial(guest.open, nodeid),
            partial(guest.open, nodeid, os.O_RDWR | os.O_TRUNC),
            partial(guest.opendir, nodeid),
            partial(guest.create, ROOT, name, os.O_RDWR | os.O_TRUNC),
            partial(guest.truncate, nodeid, 0),
            partial(guest.setattr, nodeid, Fattr.MODE, mode=0o777),
            partial(guest.setxattr, nodeid, b"user.x", b"y"),
            partial(guest.mkdir, ROOT, name),
            partial(guest.mknod, ROOT, name, stat.S_IFREG | 0o600),
        ]
        for below in (b"secret", b"deep", b"dir"):
            calls += [
                partial(guest.lookup, nodeid, below),
                partial(guest.unlink, nodeid, below),
                partial(guest.rmdir, nodeid, below),
                partial(guest.create, nodeid, below, os.O_RDWR | os.O_TRUNC),
                partial(guest.create, nodeid, below + b"new"),
                partial(guest.symlink, nodeid, below + b"new", b"x"),
                partial(guest.rename, nodeid, below, ROOT, b"stolen"),
                partial(guest.rename, ROOT, b"plain", nodeid, below),
                partial(guest.link, plain, nodeid, below + b"new"),
            ]
        for call in calls:
            with pytest.raises(OSError):
                call()
        # These act on the link itself.
        guest.setattr(nodeid, Fattr.ATIME | Fattr.MTIME, atime=5, mtime=5)
        guest.setattr(nodeid, Fattr.UID | Fattr.GID, uid=os.getuid(), gid=os.getgid())
        guest.statfs(nodeid)
        again = guest.link(nodeid, ROOT, name + b" again")
        assert stat.S_ISLNK(again.attr.mode)
    assert snapshot(secrets) == before
    assert (share / "plain").read_bytes() == b"plain"


def test_a_directory_that_becomes_a_link(guest: Guest, share: Path, secrets: Path) -> None:
    """The host swaps a known name: what the guest holds stays what it was."""
    (share / "d").mkdir()
    (share / "d" / "secret").write_bytes(b"mine")
    nodeid = guest.walk("d")
    below = guest.walk("d/secret")
    before = snapshot(secrets)
    os.rename(share / "d", share / "moved")
    (share / "d").symlink_to(secrets)
    assert guest.read(below, guest.open(below), 0, 100) == b"mine"
    assert guest.lookup(nodeid, b"secret").nodeid == below
    guest.unlink(nodeid, b"secret")
    with refused(ENOENT):
        guest.lookup(nodeid, b"secret")
    assert os.listdir(share / "moved") == []
    assert snapshot(secrets) == before


def test_positions_of_a_directory_that_never_were(guest: Guest, things: Held) -> None:
    for offset in (1, 12345, 2**31, 2**62, 2**63 - 2, U64 - 2):
        for plus in (False, True):
            args = wire.read_in(things.dir_fh, offset, 4096)
            reply = guest.queue.ask("READDIRPLUS" if plus else "READDIR", things.dir, args, pages=4096)
            assert reply.error in (0, EINVAL, ESPIPE)
            list(wire.parse_dirents(reply.body, plus))
