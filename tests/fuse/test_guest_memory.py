"""Guest memory as the daemon maps it: a large buffer that is written for the first time, all at once."""

import mmap
import os
from pathlib import Path

import pytest
from guests import Daemon

from vfsd.fuse.opcodes import NUMBER

from . import wire
from .fixtures import StartGuest
from .rawguest import NEXT, WRITE, Guest, single
from .wire import ROOT

SIZE = 1 << 20  # bytes of a large buffer
AROUND = 64  # KiB that one fault may map
PLUGGED, HUGE = 0x3_0000_0000, 64 << 20  # a region of its own: gpa, bytes


@pytest.fixture
def guest(start_guest: StartGuest) -> Guest:
    """Its buffers are of one element each."""
    guest = start_guest(framing=single)
    guest.init()
    return guest


def test_a_large_buffer_is_mapped_before_it_is_filled(guest: Guest, served: Daemon) -> None:
    """A READ at the end of a file writes a header, so nothing else would map more than its page."""
    entry, fh = guest.create(ROOT, b"file")
    before = served.resident()["Shmem"]
    assert guest.read(entry.nodeid, fh, 0, SIZE) == b""
    mapped = served.resident()["Shmem"] - before
    assert SIZE // 1024 - AROUND <= mapped <= SIZE // 1024 + 2 * AROUND


def test_a_page_that_is_gone_again_is_written_to(guest: Guest, share: Path) -> None:
    """As by a balloon: the daemon has mapped it once, and may not count on that."""
    data = os.urandom(SIZE)
    (share / "file").write_bytes(data)
    entry = guest.lookup(ROOT, b"file")
    fh = guest.open(entry.nodeid)
    assert guest.read(entry.nodeid, fh, 0, SIZE) == data
    memory = guest.regions[0]
    with mmap.mmap(memory.fd, memory.region.size) as mapped:
        mapped.madvise(mmap.MADV_REMOVE, guest.queue.arena - memory.region.gpa, SIZE)
    assert guest.read(entry.nodeid, fh, 0, SIZE) == data


@pytest.mark.parametrize(
    ("opcode", "room"),
    [
        pytest.param(NUMBER["STATFS"], HUGE, id="no-reply-is-so-large"),
        pytest.param(NUMBER["SYNCFS"], SIZE, id="not-done-by-the-queue"),
        pytest.param(4000, SIZE, id="refused"),
    ],
)
def test_room_that_is_not_filled_is_not_mapped(
    guest: Guest, served: Daemon, opcode: int, room: int
) -> None:
    """It would keep the queue, and the host's memory, busy for nothing."""
    guest.add_region(PLUGGED, HUGE)
    queue = guest.queue
    header = wire.in_header(opcode, 2, ROOT, 0, 0, 0, None, 0)
    guest.memory.write(queue.arena, header)
    queue.table(queue.desc, [(queue.arena, len(header), NEXT, 1), (PLUGGED, room, WRITE, 0)])
    before, used = served.resident()["Shmem"], queue.used_idx
    queue.offer(0)
    queue.wait_used(used + 1)
    assert served.resident()["Shmem"] - before <= 2 * AROUND
