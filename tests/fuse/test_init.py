"""INIT: what is agreed on, and what the end of a session takes away."""

import os
from errno import EBADF, EINVAL, EIO, ENOSYS, EPROTO, ESTALE
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.vhost.orders import ORDERS

from . import wire
from .fixtures import LEFT, StartGuest, held
from .ops import LINUX_FLAGS, refused
from .rawguest import Guest
from .wire import ROOT

INIT_EXT = 1 << 30
MAX_PAGES = 1 << 22
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
# PASSTHROUGH, OVER_IO_URING, REQUEST_TIMEOUT, HAS_IO_URING_BUFPOOL
NEVER = 1 << 37 | 1 << 41 | 1 << 42 | 1 << 43


@pytest.fixture
def fresh(start_guest: StartGuest) -> Guest:
    """A guest that has not said INIT."""
    return start_guest()


@pytest.mark.parametrize("minor", range(27, 47))
def test_minor(fresh: Guest, minor: int) -> None:
    out = fresh.init(minor=minor)
    assert (out.major, out.minor) == (7, min(minor, 45))
    assert out.time_gran == 1
    assert out.map_alignment == out.max_stack_depth == out.request_timeout == 0
    assert not any(out.unused)
    fresh.statfs()


def test_what_linux_gets(fresh: Guest) -> None:
    out = fresh.init()
    assert out.max_pages == 124 and out.max_write == 124 * 4096
    assert out.max_background >= 64
    assert 0 < out.congestion_threshold <= out.max_background
    wanted = (0, 3, 5, 12, 13, 14, 15, 18, 22, 30)
    assert [bit for bit in wanted if not out.flags >> bit & 1] == []


@pytest.mark.parametrize("readahead", [0, 4096, 131072, 2**32 - 1])
def test_readahead_is_not_raised(fresh: Guest, readahead: int) -> None:
    assert fresh.init(readahead=readahead).max_readahead <= readahead


def test_a_flag_that_was_not_offered_is_not_returned(fresh: Guest) -> None:
    for bit in range(64):
        offered = 1 << bit | INIT_EXT
        assert fresh.init(flags=offered).flags & ~offered == 0, f"bit {bit}"
        without = fresh.init(flags=LINUX_FLAGS & ~(1 << bit)).flags
        assert not without >> bit & 1, f"bit {bit}"
    assert fresh.init(flags=0).flags == 0


def test_flags2_only_with_init_ext(fresh: Guest) -> None:
    out = fresh.init(flags=0xFFFFFFFF << 32 | LINUX_FLAGS & 0xFFFFFFFF & ~INIT_EXT)
    assert out.flags >> 32 == 0
    assert not out.flags & INIT_EXT


@pytest.mark.parametrize("flags", [2**64 - 1, NEVER | INIT_EXT, LINUX_FLAGS | NEVER])
def test_what_is_never_returned(fresh: Guest, flags: int) -> None:
    out = fresh.init(flags=flags)
    assert out.flags & NEVER == 0
    assert out.request_timeout == out.max_stack_depth == 0
    assert not any(out.unused)


def test_short_init_of_before_7_36(fresh: Guest) -> None:
    out = fresh.init(minor=31, flags=LINUX_FLAGS & ~INIT_EXT & 0xFFFFFFFF, short=True)
    assert (out.major, out.minor) == (7, 31)
    fresh.statfs()


@pytest.mark.parametrize("major", [8, 9, 2**32 - 1])
def test_newer_major_asks_again(fresh: Guest, major: int) -> None:
    out = fresh.init(major=major, minor=0)
    assert (out.major, out.minor, out.flags) == (7, 45, 0)
    with refused(EIO):
        fresh.statfs()
    assert fresh.init().major == 7
    fresh.statfs()


@pytest.mark.parametrize(
    ("major", "minor"), [(7, 26), (7, 0), (6, 46), (0, 0), (6, 2**32 - 1)]
)
def test_too_old(fresh: Guest, major: int, minor: int) -> None:
    with refused(EPROTO):
        fresh.init(major=major, minor=minor)
    with refused(EIO):
        fresh.statfs()
    fresh.init()


def test_cut_init(fresh: Guest) -> None:
    whole = abi.INIT_IN_MIN.pack(7, 46, 0, INIT_EXT) + bytes(48)
    for size in range(20):
        assert fresh.queue.ask("INIT", 0, whole[:size]).error == EINVAL, size
        with refused(EIO):
            fresh.statfs()
    assert fresh.queue.ask("INIT", 0, whole[:20]).error == 0


def test_no_room_for_init(fresh: Guest) -> None:
    args = abi.INIT_IN_MIN.pack(7, 46, 0, 0)
    for room in range(64):
        assert fresh.queue.ask("INIT", 0, args, out=room).error == EINVAL


@pytest.mark.parametrize("num", [8, 16, 64, 128, 256, 512, 1024, 2048])
def test_max_pages_fits_the_queue(start_guest: StartGuest, num: int) -> None:
    guest = start_guest(num=num)
    out = guest.init()
    assert out.flags & MAX_PAGES
    assert out.max_pages == min(1024, num - 4)
    assert out.max_write == out.max_pages * 4096
    # The largest request there can be, element by element.
    entry, fh = guest.create(ROOT, b"large")
    data = os.urandom(out.max_write)
    assert guest.write(entry.nodeid, fh, 0, data) == len(data)
    assert guest.read(entry.nodeid, fh, 0, len(data)) == data


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_front_ends(start_guest: StartGuest, share: Path, order: str) -> None:
    guest = start_guest(order=order, request_queues=3)
    guest.init()
    for index in range(4):
        on = guest.on(index)
        entry, fh = on.create(ROOT, b"by queue %d" % index)
        assert on.write(entry.nodeid, fh, 0, b"x") == 1
        guest.on(0).forget(entry.nodeid)
    assert len(os.listdir(share)) == 4


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_ring_features(start_guest: StartGuest, event_idx: bool, indirect: bool) -> None:
    guest = start_guest(event_idx=event_idx, indirect=indirect, num=16)
    guest.init()
    entry, fh = guest.create(ROOT, b"f")
    for i in range(100):  # more than a ring full
        assert guest.write(entry.nodeid, fh, 4 * i, b"%04d" % i) == 4
    assert guest.read(entry.nodeid, fh, 0, 4096) == b"".join(b"%04d" % i for i in range(100))


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_ring_full_of_requests(start_guest: StartGuest, event_idx: bool) -> None:
    """Every one is answered, and the guest is called, however kicks and calls fall."""
    guest = start_guest(event_idx=event_idx, num=64)
    guest.init()
    queue = guest.queue
    for burst in [*range(1, 65), 64, 64, 1]:
        tokens = [
            queue.submit("STATFS" if i % 3 else "GETATTR", ROOT, b"" if i % 3 else bytes(16), kick=i % 5 == 0)
            for i in range(burst)
        ]
        queue.kick()
        for token in reversed(tokens):
            assert queue.wait(token).error == 0


def test_requests_before_init(fresh: Guest) -> None:
    for op, number in wire.SERVED.items():
        if op == "INIT" or number in wire.NO_REPLY:
            continue
        for queue in fresh.queues:
            assert queue.ask(number, ROOT, bytes(128), pages=4096).error == EIO, op
    assert fresh.queue.ask(63, ROOT).error in (EIO, ENOSYS)
    fresh.forget(ROOT)
    fresh.batch_forget((ROOT, 1))
    fresh.init()
    fresh.getattr(ROOT)


def hold(guest: Guest) -> tuple[int, int, int]:
    """nodeid, fh and directory fh of things that exist."""
    entry, fh = guest.create(ROOT, b"held")
    return entry.nodeid, fh, guest.opendir(guest.mkdir(ROOT, b"dir").nodeid)


def check_gone(guest: Guest, nodeid: int, fh: int, dir_fh: int) -> None:
    with refused(ESTALE):
        guest.getattr(nodeid)
    with refused(ESTALE):
        guest.open(nodeid)
    with refused(EBADF):
        guest.read(nodeid, fh, 0, 1)
    with refused(EBADF):
        guest.getattr(ROOT, fh)
    with refused(EBADF):
        guest.readdir(ROOT, dir_fh)
    with refused(EBADF):
        guest.release(nodeid, fh)
    assert guest.lookup(ROOT, b"held").nodeid != nodeid


def test_destroy(fresh: Guest, served: Daemon) -> None:
    fresh.init()
    kept = hold(fresh)
    assert held(served) == ["dir", "dir", "held", "held"]
    fresh.destroy()
    assert held(served) == []
    for op in ("STATFS", "DESTROY", "OPENDIR", "LOOKUP"):
        assert fresh.queue.ask(op, ROOT, b"held\0\0\0\0").error == EIO
    fresh.init()
    check_gone(fresh, *kept)


def test_init_again_drops_everything(fresh: Guest, served: Daemon) -> None:
    fresh.init()
    kept = hold(fresh)
    fresh.init()
    assert held(served) == []
    check_gone(fresh, *kept)


@pytest.mark.parametrize("args", [b"", abi.INIT_IN_MIN.pack(8, 0, 0, 0), abi.INIT_IN_MIN.pack(6, 9, 0, 0)])
def test_an_init_that_fails_ends_the_session_too(fresh: Guest, args: bytes) -> None:
    fresh.init()
    kept = hold(fresh)
    fresh.queue.ask("INIT", 0, args)
    with refused(EIO):
        fresh.statfs()
    fresh.init()
    check_gone(fresh, *kept)


def test_reset_ends_the_session(fresh: Guest, served: Daemon) -> None:
    """A guest that is rebooted sends no DESTROY."""
    fresh.init()
    kept = hold(fresh)
    fresh.frontend.stop(fresh.order, fresh.setup)
    for queue in fresh.queues:
        queue.make_ring()
    fresh.frontend.start(fresh.order, fresh.setup)
    assert held(served) == []
    with refused(EIO):
        fresh.statfs()
    fresh.init()
    check_gone(fresh, *kept)


def test_a_stopped_queue_keeps_the_session(fresh: Guest) -> None:
    fresh.init()
    nodeid, fh, _ = hold(fresh)
    for queue in fresh.queues:
        queue.restart()
    assert fresh.read(nodeid, fh, 0, 1) == b""
    assert fresh.getattr(nodeid).size == 0


def test_a_queue_goes_on_where_it_stopped(fresh: Guest) -> None:
    fresh.init()
    queue = fresh.queue
    for _ in range(5):
        fresh.statfs()
    base = fresh.frontend.get_vring_base(queue.index)
    assert base == queue.avail_idx == 6
    waiting = queue.submit("STATFS", ROOT)
    queue.start(base)
    assert queue.wait(waiting).error == 0


def test_two_guests_share_nothing(start_guest: StartGuest) -> None:
    first, second = start_guest(), start_guest()
    first.init()
    with refused(EIO):
        second.statfs()
    second.init()
    nodeid, fh, dir_fh = hold(first)
    with refused(ESTALE):
        second.getattr(nodeid)
    with refused(EBADF):
        second.read(nodeid, fh, 0, 1)
    with refused(EBADF):
        second.readdir(ROOT, dir_fh)
    second.destroy()
    assert first.getattr(nodeid).size == 0


def test_a_guest_that_has_left_leaves_nothing(daemon: StartDaemon, tmp_path: Path) -> None:
    """Neither descriptors nor the address space of its tables; not only when a collector comes by."""
    started = daemon(tmp_path)
    sizes: list[tuple[int, int]] = []
    for _ in range(6):
        with Guest(started.socket, request_queues=8) as guest:
            guest.init()
            hold(guest)
        assert eventually(lambda: started.log.count(LEFT) == len(sizes) + 1)
        (tmp_path / "held").unlink()
        (tmp_path / "dir").rmdir()
        sizes.append((len(started.descriptors()), virtual_mib(started)))
    assert sizes[-1][0] == sizes[0][0], f"descriptors after each guest: {[n for n, _ in sizes]}"
    assert sizes[-1][1] < sizes[0][1] + 512, f"MiB after each guest: {[n for _, n in sizes]}"


def virtual_mib(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.split("VmSize:")[1].split()[0]) >> 10
