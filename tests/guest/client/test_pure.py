"""The guest's tables without a daemon: pages, locks, names and inodes."""

from __future__ import annotations

import errno
import fcntl
import stat
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsd.fuse import abi
from vfsd.fuse.abi import PAGE_SIZE, Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest import Filesystem, mount_device
from vfsd.guest.client import objects
from vfsd.guest.client.locks import LocalLocks, Range
from vfsd.guest.client.pages import Pages
from vfsd.guest.client.sync import SharedLock

from .conftest import Clock
from .stub import FLAGS, StubDevice, attr, entry, init_out

DIRECTORY = stat.S_IFDIR | 0o755


@pytest.fixture
def stub() -> StubDevice:
    return StubDevice()


def mounted(device: StubDevice, clock: Clock | None = None) -> Filesystem:
    return mount_device(device, clock=clock or Clock())  # type: ignore[arg-type]


# ---- names and inodes


def test_a_negative_entry_is_kept_for_its_timeout(stub: StubDevice, clock: Clock) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(0, valid=10)
    with mounted(stub, clock) as fs:
        for _ in range(3):
            assert not fs.exists("/none")
        assert fs.conn.requests[Opcode.LOOKUP] == 1
        assert fs.conn.hits["negative names"] == 2
        clock.advance(11)
        assert not fs.exists("/none")
        assert fs.conn.requests[Opcode.LOOKUP] == 2
    assert stub.transport.forgets == []


def test_enoent_is_a_negative_entry_that_is_not_kept(stub: StubDevice) -> None:
    def lookup(_nodeid: int, _args: bytes) -> bytes:
        raise OSError(errno.ENOENT, "")

    stub.transport.answers[Opcode.LOOKUP] = lookup
    with mounted(stub) as fs:
        for _ in range(3):
            assert not fs.exists("/none")
        assert fs.conn.requests[Opcode.LOOKUP] == 3
        assert objects.alive()["dentries"] == 1


def test_creation_asks_even_if_the_name_is_known_not_to_be(stub: StubDevice) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(0, valid=10)
    stub.transport.answers[Opcode.MKDIR] = lambda nodeid, args: entry(2, valid=10, mode=DIRECTORY)
    with mounted(stub) as fs:
        assert not fs.exists("/dir")
        fs.mkdir("/dir")
        assert fs.conn.requests[Opcode.LOOKUP] == 2
        assert fs.exists("/dir")
        assert fs.conn.requests[Opcode.LOOKUP] == 2


def test_revalidation_counts_each_lookup_and_forgets_them_together(stub: StubDevice, clock: Clock) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(9, valid=1, attr_valid=100)
    with mounted(stub, clock) as fs:
        for _ in range(5):
            fs.stat("/file")
            clock.advance(2)
        assert fs.conn.requests[Opcode.LOOKUP] == 5
        fs.drop_caches()
        assert stub.transport.forgets == [(9, 5)]


def test_a_name_that_now_means_another_node_is_dropped(stub: StubDevice, clock: Clock) -> None:
    nodes = iter([7, 8, 8])
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(next(nodes), valid=1, attr_valid=100)
    with mounted(stub, clock) as fs:
        assert fs.stat("/file").st_ino == 7
        clock.advance(2)
        assert fs.stat("/file").st_ino == 8
        assert sorted(stub.transport.forgets) == [(7, 1), (8, 1)]  # 8 was asked for twice
        fs.drop_caches()
        assert sorted(stub.transport.forgets) == [(7, 1), (8, 1), (8, 1)]


@pytest.mark.parametrize(
    "change", [{"generation": 1}, {"mode": DIRECTORY}], ids=["generation", "type"]
)
def test_a_node_that_has_become_another_file_is_bad_for_ever(
    stub: StubDevice, clock: Clock, change: dict[str, int]
) -> None:
    replies = [entry(7, valid=1, attr_valid=100)]
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: replies[0]
    with mounted(stub, clock) as fs:
        file = fs.open("/file")
        replies[0] = entry(7, valid=1, attr_valid=100, **change)
        clock.advance(2)
        fs.stat("/file")
        for call in (lambda: file.pread(1, 0), lambda: fs.fstat(file)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError) as caught:
            file.close()
        assert caught.value.errno == errno.EIO
        fs.drop_caches()
        assert sum(count for nodeid, count in stub.transport.forgets) == 3
    assert objects.alive()["inodes"] == 0


def test_a_reply_that_can_t_be_is_eio(stub: StubDevice) -> None:
    replies = {
        b"type\0": entry(5, mode=0o644),
        b"size\0": entry(5, size=1 << 63),
        b"root\0": entry(1, mode=DIRECTORY),
    }
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: replies[args]
    with mounted(stub) as fs:
        for name in ("type", "size", "root"):
            with pytest.raises(OSError) as caught:
                fs.stat(f"/{name}")
            assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("reply", [entry(0), entry(1), entry(5)], ids=["nothing", "the root", "a file"])
def test_a_creation_that_made_something_else_is_eio(stub: StubDevice, reply: bytes) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(0)
    stub.transport.answers[Opcode.MKDIR] = lambda nodeid, args: reply
    with mounted(stub) as fs:
        with pytest.raises(OSError) as caught:
            fs.mkdir("/dir")
        assert caught.value.errno == errno.EIO
    assert stub.transport.forgets in ([], [(5, 1)])


@pytest.mark.parametrize("name", [b"", b"a/b", b"n" * 4096])
def test_a_listing_with_a_name_that_can_t_be_is_eio(stub: StubDevice, name: bytes) -> None:
    record = abi.DIRENT.pack(3, 1, len(name), 0) + name
    stub.transport.answers[Opcode.READDIR] = lambda nodeid, args: record.ljust(4128, b"\0")
    with mounted(stub) as fs:
        with pytest.raises(OSError) as caught:
            fs.listdir("/")
        assert caught.value.errno == errno.EIO


def test_an_older_reply_does_not_undo_a_newer_change(stub: StubDevice, clock: Clock) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(4, valid=100, attr_valid=1, size=10)
    stub.transport.answers[Opcode.OPEN] = lambda nodeid, args: bytes(16)
    stub.transport.answers[Opcode.WRITE] = lambda nodeid, args: args[16:20] + bytes(4)
    with mounted(stub, clock) as fs, fs.open("/file", "r+") as file:

        def getattr_(nodeid: int, _args: bytes) -> bytes:
            file.pwrite(b"x" * 20, 0)  # while the reply is on its way
            return bytes(16) + attr(nodeid, stat.S_IFREG | 0o644, 10)

        stub.transport.answers[Opcode.GETATTR] = getattr_
        clock.advance(2)
        assert fs.fstat(file).st_size == 20


def test_a_write_that_took_more_than_it_was_given_is_eio(stub: StubDevice) -> None:
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(4, valid=100)
    stub.transport.answers[Opcode.WRITE] = lambda nodeid, args: (9).to_bytes(8, "little")
    with mounted(stub) as fs, fs.open("/file", "r+") as file, pytest.raises(OSError) as caught:
        file.write(b"12345678")
    assert caught.value.errno == errno.EIO


def test_without_dont_mask_the_guest_applies_the_umask(stub: StubDevice) -> None:
    sent: list[int] = []
    stub.transport.answers[Opcode.LOOKUP] = lambda nodeid, args: entry(0)

    def mkdir(_nodeid: int, args: bytes) -> bytes:
        sent.append(int.from_bytes(args[:4], "little"))
        return entry(5, mode=DIRECTORY)

    stub.transport.answers[Opcode.MKDIR] = mkdir
    for flags in (FLAGS, FLAGS | Init.DONT_MASK):
        stub.transport.answers[Opcode.INIT] = lambda nodeid, args, flags=flags: init_out(flags=flags)
        with mounted(stub) as fs:
            fs.stat("/")
            fs.umask = 0o077
            fs.mkdir("/dir", 0o755)
    assert sent == [0o700, 0o755]


# ---- pages


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 5 * PAGE_SIZE), st.binary(min_size=1, max_size=9000)),
            st.tuples(st.just("truncate"), st.integers(0, 5 * PAGE_SIZE), st.just(b"")),
            st.tuples(st.just("clear"), st.just(0), st.just(b"")),
        ),
        max_size=20,
    )
)
def test_pages_hold_what_the_file_holds_or_nothing(steps: list[tuple[str, int, bytes]]) -> None:
    pages, file = Pages(), bytearray()
    for what, position, data in steps:
        if what == "write":
            file.extend(bytes(max(0, position + len(data) - len(file))))
            file[position : position + len(data)] = data
            pages.write(position, memoryview(data), dirty=False)
        elif what == "truncate":
            del file[position:]
            file.extend(bytes(position - len(file)))
            pages.truncate(position)
        else:
            pages.clear()
        for index in range(-(-len(file) // PAGE_SIZE)):
            start = index * PAGE_SIZE
            into = bytearray(min(PAGE_SIZE, len(file) - start))
            if pages.has(index):
                assert pages.read(start, memoryview(into)) == len(into)
                assert into == file[start : start + len(into)]


def test_a_read_that_a_write_overtook_puts_nothing_in() -> None:
    pages = Pages()
    version = pages.version
    pages.write(0, memoryview(b"x" * PAGE_SIZE), dirty=False)
    pages.fill(0, b"o" * 2 * PAGE_SIZE, version)
    assert not pages.has(1)


def test_dirty_pages_come_in_runs() -> None:
    pages = Pages()
    for index in (0, 1, 2, 5, 6):
        pages.write(index * PAGE_SIZE, memoryview(bytes([index]) * PAGE_SIZE), dirty=True)
    pages.clear()
    runs = [(first, len(data) // PAGE_SIZE) for first, data in pages.take_dirty(2)]
    assert runs == [(0, 2), (2, 1), (5, 2)]
    assert pages.dirty == 0


# ---- locks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(
    st.integers(0, 9), st.integers(1, 5), st.sampled_from([fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK]),
    st.integers(1, 3),
), max_size=30))  # fmt: skip
def test_range_locks_agree_with_a_byte_by_byte_model(steps: list[tuple[int, int, int, int]]) -> None:
    locks = LocalLocks()
    model: list[dict[int, int]] = [{} for _ in range(20)]  # by byte: owner to kind
    for start, length, kind, owner in steps:
        span = range(start, start + length)
        allowed = kind == fcntl.F_UNLCK or all(
            other == owner or fcntl.F_WRLCK not in (held, kind)
            for byte in span for other, held in model[byte].items()
        )  # fmt: skip
        wanted = Range(start, start + length - 1, kind, owner)
        if not allowed:
            with pytest.raises(BlockingIOError):
                locks.lock(wanted, False)
            continue
        locks.lock(wanted, False)
        for byte in span:
            model[byte].pop(owner, None)
            if kind != fcntl.F_UNLCK:
                model[byte][owner] = kind


def test_a_shared_lock_is_had_alone_or_by_many() -> None:
    lock, inside = SharedLock(), threading.Barrier(3)

    def share() -> None:
        with lock.shared():
            inside.wait(10)

    threads = [threading.Thread(target=share) for _ in range(2)]
    for thread in threads:
        thread.start()
    with lock.shared():
        inside.wait(10)
    for thread in threads:
        thread.join(10)
    alone: list[int] = []

    def count() -> None:
        for _ in range(500):
            with lock.alone():
                value = len(alone)
                alone.append(value)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert alone == list(range(2000))
