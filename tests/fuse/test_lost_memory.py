"""Guest memory whose file is cut off after it was mapped: the connection ends, the daemon lives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EFAULT
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.opcodes import NUMBER

from . import wire
from .rawguest import NEXT, WRITE, Guest
from .wire import ROOT

LOST, SIZE = 0x3_0000_0000, 1 << 16  # a region of its own, which is cut off
STAYS = 0x10_0000  # in the arena: of memory that stays, and of no other use here
GONE = "broke the protocol: guest memory is gone"
Part = tuple[int, int, bool]  # gpa, bytes, whether the device writes


@pytest.fixture
def served(daemon: StartDaemon, tmp_path: Path) -> Daemon:
    return daemon(tmp_path)


@pytest.fixture
def guest(served: Daemon) -> Iterator[Guest]:
    guest = Guest(served.socket)
    guest.init()
    guest.add_region(LOST, SIZE)
    yield guest
    guest.close()


def cut_off(guest: Guest) -> None:
    os.ftruncate(guest.regions[-1].fd, 0)


def chain(guest: Guest, *parts: Part) -> None:
    """Write one chain of these, from descriptor 0 on."""
    last = len(parts) - 1
    guest.queue.table(
        guest.queue.desc,
        [(gpa, n, WRITE * write | NEXT * (i < last), i + 1) for i, (gpa, n, write) in enumerate(parts)],
    )


def request(
    guest: Guest, op: str, nodeid: int = ROOT, args: bytes = b"", size: int | None = None
) -> list[Part]:
    """A request's header and arguments in memory that stays; size: of the body, if more follows."""
    queue = guest.queue
    body = len(args) if size is None else size
    header = wire.in_header(NUMBER[op], 77, nodeid, body, 0, 0, None, 0)
    guest.memory.write(queue.arena, header + args)
    return [(queue.arena, len(header) + len(args), False)]


def ends(guest: Guest, served: Daemon) -> bool:
    """Whether the daemon has closed the connection for this reason, and serves others."""
    if not eventually(lambda: GONE in served.log):
        return False
    assert guest.sock.recv(1) == b""
    with Guest(served.socket) as other:
        other.init()
        other.statfs()
    return True


@pytest.mark.parametrize("what", ["ring", "header", "arguments", "indirect table", "reply", "later reply"])
def test_touched_by_the_daemon(served: Daemon, guest: Guest, what: str) -> None:
    queue = guest.queue
    reply = (queue.arena + STAYS, 0x1000, True)
    # Where a header would be, so that it is not missing; and a request to answer.
    statfs = wire.in_header(NUMBER["STATFS"], 77, ROOT, 0, 0, 0, None, 0)
    guest.memory.write(LOST, statfs)
    if what == "header":
        chain(guest, (LOST, len(statfs), False), reply)
    elif what == "arguments":
        chain(guest, *request(guest, "INIT", 0, size=64), (LOST, 64, False), reply)  # of a Python operation
    elif what == "indirect table":
        queue.table(queue.desc, [(LOST, 32, 4, 0)])
    elif what == "reply":
        chain(guest, *request(guest, "STATFS"), (LOST, 0x1000, True))
    elif what == "later reply":  # by a thread that waits
        entry, fh = guest.create(ROOT, b"file")
        args = abi.FSYNC_IN.pack(fh, 0, 0)
        chain(guest, *request(guest, "FSYNC", entry.nodeid, args), (LOST, 0x1000, True))
    if what == "ring":
        os.ftruncate(guest.regions[0].fd, 0)
        queue.kick_always()
    else:
        cut_off(guest)
        queue.offer(0)
    assert ends(guest, served)


def test_touched_by_the_kernel_alone(served: Daemon, guest: Guest) -> None:
    """Data is moved by system calls: they fail, and nothing else happens."""
    entry, fh = guest.create(ROOT, b"file")
    assert guest.write(entry.nodeid, fh, 0, b"content") == 7
    cut_off(guest)
    out = (guest.queue.arena + STAYS, wire.OUT_SIZE, True)
    replies = []
    for op, args, data in (
        ("READ", wire.read_in(fh, 0, 4096), (LOST, 4096, True)),
        ("WRITE", wire.WRITE_IN.pack(fh, 0, 4096, 0, 0, 0, 0), (LOST, 4096, False)),
    ):
        parts = request(guest, op, entry.nodeid, args, len(args) + (0 if data[2] else 4096))
        chain(guest, *parts, *((out, data) if data[2] else (data, (out[0], 100, True))))
        before = guest.queue.used_idx
        guest.queue.offer(0)
        guest.queue.wait_used(before + 1)
        replies.append(reply_error(guest, out[0]))
    assert replies == [-EFAULT, -EFAULT]
    assert (served.shared / "file").read_bytes() == b"content"
    guest.queue.restart()
    guest.statfs()
    assert GONE not in served.log


def reply_error(guest: Guest, gpa: int) -> int:
    """error of the fuse_out_header there"""
    return int.from_bytes(guest.memory.read(gpa + 4, 4), "little", signed=True)
