"""Files through the DAX window: our guest against the daemon, in windows of few ranges and of many."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfsd.fuse.abi import Init
from vfsd.fuse.opcodes import Opcode
from vfsd.guest import Filesystem, mount, mount_device
from vfsd.guest.client.dax import RANGE, Dax
from vfsd.guest.driver._window import WindowMemory
from vfsd.vhost.frontend import SharedRegion
from vfsd.vhost.messages import Region

from .conftest import StartPeer, requests
from .stub import FLAGS, StubDevice, init_out

MIB = 1 << 20
STRESS_S = float(os.environ.get("VFSD_DAX_STRESS_S", "10"))
WAYS = ("free", "stolen", "waited")  # how a range is got
THREADS = 32
WAIT_MOST_S = 30.0  # nobody may wait for a range longer
RECORD = 512


def window(ranges: int) -> str:
    """The daemon's option."""
    return f"dax-window={ranges * RANGE}"


def dax_of(fs: Filesystem) -> Dax:
    assert fs.conn.dax is not None
    return fs.conn.dax


MountDax = Callable[..., Filesystem]


@pytest.fixture
def dax(mounted: Callable[..., Filesystem]) -> MountDax:
    """Mounts a share with a window of so many ranges."""

    def mount_dax(ranges: int = 4, options: str = "dax", policy: str = "", **arguments: Any) -> Filesystem:
        daemon = (window(ranges), *((f"dax-policy={policy}",) if policy else ()))
        arguments.setdefault("order", "qemu-generic")
        return mounted(options=options, daemon=daemon, **arguments)

    return mount_dax


@contextmanager
def watchdog(dax: Dax) -> Iterator[None]:
    """Nobody waits for a range for ever: who does gets the stacks of all threads printed."""
    over = threading.Event()
    slow: list[float] = []

    def watch() -> None:
        while not over.wait(0.5):
            if (longest := max(dax.waiting(), default=0)) > WAIT_MOST_S:
                slow.append(longest)
                faulthandler.dump_traceback(all_threads=True)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        assert not slow, f"a caller waits for a range for {slow[0]:.0f} s: {dax.stats()}"


def idle(fs: Filesystem) -> bool:
    """Every name and inode goes; whether every range is free then."""
    fs.drop_caches()
    dax = dax_of(fs)
    dax.settle()
    stats = dax.stats()
    return bool(stats["free ranges"] == stats["ranges"] and not stats["busy"] and not stats["waiting"])


# ---- mount options


def test_dax_always_needs_a_window(mounted: Callable[..., Filesystem]) -> None:
    with pytest.raises(OSError, match="does not support it") as caught:
        mounted(options="dax", order="qemu-generic")
    assert caught.value.errno == errno.EINVAL


def test_a_front_end_that_asks_for_no_window_has_none(dax: MountDax) -> None:
    with pytest.raises(OSError, match="does not support it"):
        dax(order="qemu")


@pytest.mark.parametrize(
    ("options", "policy", "files"),
    [
        ("dax=always", "never", {"big", "small"}),
        ("dax=never", "always", set()),
        ("dax=inode", "always", {"big", "small"}),
        ("", "always", {"big", "small"}),
        ("", "size:65536", {"big"}),
        ("", "never", set()),
    ],
)
def test_which_files_have_dax(
    dax: MountDax, shared: Path, options: str, policy: str, files: set[str]
) -> None:
    for name, size in (("big", 65536), ("small", 4096)):
        (shared / name).write_bytes(bytes(size))
    fs = dax(options=options, policy=policy)
    with fs.open("/big") as big, fs.open("/small") as small:
        assert {name for name, file in (("big", big), ("small", small)) if file.file.inode.dax} == files
    assert fs.options == "rw" + (f",{options}" if options else "")


@pytest.mark.parametrize(("alignment", "works"), [(12, True), (21, True), (22, False)])
def test_an_alignment_over_a_range_ends_the_session(alignment: int, works: bool) -> None:
    device: Any = StubDevice()
    device.window = WindowMemory(4 * RANGE)
    device.transport.answers[Opcode.INIT] = lambda nodeid, args: init_out(
        flags=FLAGS | Init.MAP_ALIGNMENT, map_alignment=alignment
    )
    with mount_device(device, "dax") as fs:
        assert fs.conn.initialized.wait(10)
        if works:
            fs.stat("/")
        else:
            with pytest.raises(ConnectionRefusedError):
                fs.stat("/")
    device.window.close()


# ---- reading and writing


@pytest.mark.parametrize("ranges", [1, 2, 3, 4096])
def test_files_are_the_same_on_both_sides(dax: MountDax, shared: Path, ranges: int) -> None:
    size = 5 * RANGE + 12345
    (shared / "file").write_bytes(random.Random(ranges).randbytes(size))
    expected = bytearray((shared / "file").read_bytes())
    fs = dax(ranges)
    sent = requests(fs)
    assert fs.read_bytes("/file") == expected
    with fs.open("/file", "r+") as file:
        for at in (0, 100, RANGE - 7, 3 * RANGE - 1, size - 5000):
            data = os.urandom(4999)
            assert file.pwrite(data, at) == len(data)
            expected[at : at + len(data)] = data
            assert file.pread(len(data) + 2, at) == expected[at : at + len(data) + 2]
    assert (shared / "file").read_bytes() == expected
    assert sent("READ", "WRITE") == 0
    fs.unlink("/file")
    assert idle(fs)


def test_what_lies_past_the_end_is_one_write(dax: MountDax, shared: Path) -> None:
    fs = dax()
    (shared / "file").write_bytes(b"x" * 5000)
    with fs.open("/file", "r+") as file:
        sent = requests(fs)
        assert file.pwrite(b"a" * 3000, 4000) == 3000
        assert sent("WRITE") == 1 and sent("SETUPMAPPING") == 0
        assert file.pwrite(b"b" * 3000, 4000) == 3000
        assert sent("WRITE") == 1 and sent("SETUPMAPPING") == 1
        assert fs.fstat(file).st_size == 7000
    with fs.open("/file", "a") as file:
        file.write(b"end")
        assert sent("WRITE") == 2
    assert (shared / "file").read_bytes() == b"x" * 4000 + b"b" * 3000 + b"end"


def test_a_range_is_read_first_and_made_writable_later(dax: MountDax, shared: Path) -> None:
    (shared / "file").write_bytes(bytes(MIB))
    fs = dax()
    with fs.open("/file") as reader, fs.open("/file", "r+") as writer:
        reader.pread(10, 0)
        assert not dax_of(fs).table.at(0).writable  # type: ignore[union-attr]
        writer.pwrite(b"new", 0)
        assert dax_of(fs).table.at(0).writable  # type: ignore[union-attr]
        assert reader.pread(3, 0) == b"new"
    assert dax_of(fs).counts["upgraded"] == 1


def test_a_short_file_ends_where_the_host_has_cut_it_off(dax: MountDax, shared: Path) -> None:
    """The guest knows the old size: the page that is not there must end the read, not the process."""
    (shared / "file").write_bytes(b"x" * 3 * MIB)
    fs = dax(cache="always")
    with fs.open("/file", "r+") as file:
        assert len(file.pread(3 * MIB, 0)) == 3 * MIB
        os.truncate(shared / "file", MIB)
        assert len(file.pread(3 * MIB, 0)) == MIB
        assert dax_of(fs).counts["faults"] >= 1
        assert file.pread(10, 2 * MIB) == b""
        os.truncate(shared / "file", 8192)
        assert file.pwrite(b"y" * 100, 8192) == 100  # goes on by request
    assert (shared / "file").stat().st_size == 8292


@pytest.mark.parametrize("ranges", [1, 8])
def test_truncate_punch_and_zero(dax: MountDax, shared: Path, ranges: int) -> None:
    expected = bytearray(os.urandom(2 * RANGE))
    (shared / "file").write_bytes(expected)
    fs = dax(ranges)
    with fs.open("/file", "r+") as file:
        assert file.pread(len(expected), 0) == expected
        fs.fallocate(file, 1 | 2, 4096, 8192)  # KEEP_SIZE | PUNCH_HOLE
        expected[4096:12288] = bytes(8192)
        assert file.pread(len(expected), 0) == expected
        file.truncate(RANGE + 10)
        assert file.pread(len(expected), 0) == expected[: RANGE + 10]
        file.truncate(2 * RANGE)
        expected[RANGE + 10 :] = bytes(RANGE - 10)
        assert file.pread(len(expected), 0) == expected
    with fs.open("/file", os.O_RDWR | os.O_TRUNC) as file:
        assert file.pread(10, 0) == b""
    assert (shared / "file").stat().st_size == 0


# ---- which range


def make_files(shared: Path, names: str, size: int = 1000) -> None:
    for name in names:
        (shared / name).write_bytes(name.encode() * size)


def test_a_free_range_then_one_of_the_same_file_then_waiting(dax: MountDax, shared: Path) -> None:
    fs = dax(2)
    make_files(shared, "a", 3 * RANGE)
    make_files(shared, "b")
    table = dax_of(fs)
    table.background = False
    with fs.open("/a") as a, fs.open("/b") as b:
        assert a.pread(1, 0) + a.pread(1, RANGE) == b"aa"
        assert (table.counts["free"], table.counts["stolen"], table.counts["waited"]) == (2, 0, 0)
        assert a.pread(1, 2 * RANGE) == b"a"
        assert [mapping.foffset for mapping in table.table.of(a.file.inode.dax.key)] == [RANGE, 2 * RANGE]  # type: ignore[union-attr]
        assert (table.counts["free"], table.counts["stolen"], table.counts["waited"]) == (2, 1, 0)
        assert b.pread(1, 0) == b"b"
        assert (table.counts["free"], table.counts["stolen"], table.counts["waited"]) == (2, 1, 1)
        assert table.counts["reclaimed"] >= 1


def test_ranges_are_reclaimed_before_they_run_out(dax: MountDax, shared: Path) -> None:
    fs = dax(20)
    make_files(shared, "a", 17 * RANGE)
    table = dax_of(fs)
    with fs.open("/a") as file:
        for number in range(16):
            file.pread(1, number * RANGE)
        table.settle()
        assert (table.counts["reclaimed"], table.table.n_free) == (0, 4)  # 20 %
        file.pread(1, 16 * RANGE)
        table.settle()
        assert table.counts["reclaimed"] == 10
        left = [mapping.foffset // RANGE for mapping in table.table.mappings()]
        assert left == list(range(10, 17))  # the oldest have gone


def test_mappings_are_removed_before_the_inode_is_forgotten(dax: MountDax, shared: Path) -> None:
    fs = dax()
    make_files(shared, "a", 2 * RANGE)
    fs.read_bytes("/a")
    order: list[str] = []
    call, forget = fs.conn.call, fs.conn.forget

    def seen_call(opcode: Opcode, *args: Any, **more: Any) -> Any:
        order.append(opcode.name)
        return call(opcode, *args, **more)

    def seen_forget(nodeid: int, nlookup: int) -> None:
        order.append("FORGET")
        forget(nodeid, nlookup)

    fs.conn.call, fs.conn.forget = seen_call, seen_forget  # type: ignore[method-assign]
    fs.drop_caches()
    assert order == ["REMOVEMAPPING", "FORGET"]
    assert idle(fs)


def test_a_mapping_that_the_daemon_refuses_is_its_error_and_no_range_is_lost(
    dax: MountDax, shared: Path
) -> None:
    fs = dax(2)
    make_files(shared, "a")
    with fs.open("/a") as file:
        call = fs.conn.call

        def refuse(opcode: Opcode, *args: Any, **more: Any) -> Any:
            if opcode == Opcode.SETUPMAPPING:
                raise OSError(errno.ENOSPC, "")
            return call(opcode, *args, **more)

        fs.conn.call = refuse  # type: ignore[method-assign]
        for _ in range(5):
            with pytest.raises(OSError) as caught:
                file.pread(10, 0)
            assert caught.value.errno == errno.ENOSPC
        fs.conn.call = call  # type: ignore[method-assign]
        assert file.pread(1, 0) == b"a"
    fs.unlink("/a")
    assert idle(fs)


# ---- views


def test_a_view_is_the_file(dax: MountDax, shared: Path) -> None:
    fs = dax()
    (shared / "file").write_bytes(bytes(3 * RANGE))
    with fs.open("/file", "r+") as file:
        view = file.mmap(RANGE - 100, RANGE + 200)  # parts of three ranges
    view[0:5] = b"first"
    view[-4:] = b"last"
    data = (shared / "file").read_bytes()
    assert data[RANGE - 100 :][:5] == b"first" and data[2 * RANGE + 96 :][:4] == b"last"
    os.pwrite(fd := os.open(shared / "file", os.O_WRONLY), b"host", RANGE)
    os.close(fd)
    assert view[100:104] == b"host"
    part = view[100:200]
    view.release()
    with pytest.raises(OSError) as caught:
        fs.umount()
    assert caught.value.errno == errno.EBUSY
    assert dax_of(fs).table.n_busy == 3
    part.release()
    assert part is not None
    dax_of(fs).settle()
    assert dax_of(fs).table.n_busy == 0


def test_a_view_of_a_file_opened_for_reading_is_read_only(dax: MountDax, shared: Path) -> None:
    fs = dax()
    make_files(shared, "a")
    with fs.open("/a") as file, file.mmap(10, 20) as view:
        assert view == b"a" * 20 and view.readonly
    with fs.open("/a", os.O_WRONLY) as file, pytest.raises(PermissionError):
        file.mmap(0, 1)


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 0), (0, 1001), (1000, 1), (999, 2)])
def test_a_view_lies_within_the_file(dax: MountDax, shared: Path, offset: int, length: int) -> None:
    fs = dax()
    make_files(shared, "a")
    with fs.open("/a") as file, pytest.raises(ValueError, match="1000 bytes"):
        file.mmap(offset, length)


def test_views_need_dax(dax: MountDax, shared: Path) -> None:
    fs = dax(options="dax=never")
    make_files(shared, "a")
    with fs.open("/a") as file, pytest.raises(OSError) as caught:
        file.mmap(0, 10)
    assert caught.value.errno == errno.ENODEV


def test_when_views_hold_all_ranges_reads_and_writes_go_by_request(dax: MountDax, shared: Path) -> None:
    fs = dax(1)
    make_files(shared, "ab")
    with fs.open("/a") as a, fs.open("/b", "r+") as b:
        view = a.mmap(0, 10)
        again = a.mmap(500, 500)  # of the same range
        with pytest.raises(OSError) as caught:
            b.mmap(0, 10)
        assert caught.value.errno == errno.ENOMEM
        sent = requests(fs)
        assert b.pread(3, 0) == b"bbb" and b.pwrite(b"xyz", 0) == 3
        assert sent("READ", "WRITE") == 2
        view.release()
        again.release()
        dax_of(fs).settle()
        assert b.pread(4, 0) == b"xyzb"
        assert sent("READ") == 1


def test_a_view_outlives_the_mount(dax: MountDax, shared: Path) -> None:
    make_files(shared, "a")
    with dax() as fs, fs.open("/a", "r+") as file:
        view = file.mmap(0, 10)
    view[:3] = b"new"
    assert (shared / "a").read_bytes()[:4] == b"newa"
    view.release()


CUT_OFF = """
import os, sys
from vfsd.guest import mount
with mount(sys.argv[1], options="dax", order="qemu-generic") as fs, fs.open("/file", "r+") as file:
    view = file.mmap(0, 16384)
    os.truncate(sys.argv[2], 4096)
    print(view[4095], view[4096], view[16383])
    view[8192] = 1  # goes nowhere
    file.truncate(16384)
    print(view[8192], view[12000], file.pread(1, 8192)[0], file.pread(1, 4095)[0])
    view.release()
"""


def test_a_view_that_is_cut_off_reads_as_zeroes(start: StartPeer, shared: Path) -> None:
    (shared / "file").write_bytes(b"x" * 16384)
    socket = start(options=(window(4),)).socket
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", CUT_OFF, socket, shared / "file"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["120 0 0", "1 0 0 120"], done.stderr


def test_a_fault_that_is_not_ours_still_ends_the_process(start: StartPeer, shared: Path) -> None:
    make_files(shared, "a")
    code = (
        "import ctypes, sys; from vfsd.guest import mount\n"
        "with mount(sys.argv[1], options='dax', order='qemu-generic') as fs:\n"
        "    fs.read_bytes('/a'); ctypes.string_at(8)\n"
    )
    socket = start(options=(window(4),)).socket
    done = subprocess.run([sys.executable, "-c", code, socket], capture_output=True, text=True)
    assert done.returncode == -11


def test_windows_of_other_devices_are_no_guest_memory(dax: MountDax, shared: Path, tmp_path: Path) -> None:
    """QEMU tells every device of every mapping; such a file may end before its range does."""
    make_files(shared, "a")
    (tmp_path / "theirs").write_bytes(b"short")
    fs = dax()
    with open(tmp_path / "theirs", "rb") as file:
        region = Region(1 << 40, RANGE, 1 << 40, 0)
        fs.device.frontend.add_mem_reg(SharedRegion(region, file.fileno()), ack=True)
        assert fs.read_bytes("/a") == b"a" * 1000
        fs.device.frontend.rem_mem_reg(region, ack=True)
    assert fs.read_bytes("/a") == b"a" * 1000


# ---- two guests, many threads


def test_two_guests_see_each_other_at_once(start: StartPeer, shared: Path) -> None:
    (shared / "file").write_bytes(bytes(RANGE))
    socket = start(options=(window(4),)).socket
    with (
        mount(socket, options="dax", order="qemu-generic") as one,
        mount(socket, options="dax", order="qemu-generic") as two,
        one.open("/file", "r+") as here,
        two.open("/file", "r+") as there,
        here.mmap(0, RANGE) as ours,
        there.mmap(0, RANGE) as theirs,
    ):
        sent = requests(one), requests(two)
        for number in range(1000):
            ours[number] = number & 0xFF
            assert theirs[number] == number & 0xFF
            theirs[RANGE - 1 - number] = 7
            assert here.pread(1, RANGE - 1 - number) == b"\7"
        assert sent[0]() == sent[1]() == 0


def use_file(
    fs: Filesystem, rng: random.Random, path: str, mine: int, size: int, wrote: dict[int, int]
) -> None:
    """One step on a file of which every THREADS-th record is this thread's alone."""
    slot = rng.randrange(size // (RECORD * THREADS)) * THREADS + mine
    at = slot * RECORD
    with fs.open(path, "r+") as file:
        match rng.randrange(8):
            case 0 | 1 | 2:
                value = rng.randrange(1, 256)
                assert file.pwrite(bytes([value]) * RECORD, at) == RECORD
                wrote[slot] = value
            case 3:
                try:
                    view = file.mmap(at, RECORD)
                except OSError as problem:
                    if problem.errno != errno.ENOMEM:
                        raise
                    return
                with view:
                    value = rng.randrange(1, 256)
                    view[:] = bytes([value]) * RECORD
                    wrote[slot] = value
            case _:
                assert file.pread(RECORD, at) == bytes([wrote.get(slot, 0)]) * RECORD, (path, slot)


@pytest.mark.parametrize("ranges", [1, 3])
def test_threads_on_more_files_than_ranges_lose_nothing(
    start: StartPeer, shared: Path, ranges: int
) -> None:
    files, size = 40, 2 * RANGE
    for number in range(files):
        with open(shared / f"{number}", "wb") as file:
            file.truncate(size)
    wrote: list[dict[str, dict[int, int]]] = [{} for _ in range(THREADS)]
    problems: list[BaseException] = []
    socket = start(options=(window(ranges),)).socket
    with mount(socket, options="dax", order="qemu-generic", queues=2) as fs:
        table = dax_of(fs)
        began = time.monotonic()

        def enough() -> bool:
            """Which ways a range is got depends on who runs when: until all have been seen."""
            lasted = time.monotonic() - began
            seen = all(table.counts[way] for way in WAYS)
            return lasted > STRESS_S / 2 and (seen or lasted > STRESS_S / 2 + 60)

        def work(mine: int) -> None:
            rng = random.Random(mine)
            try:
                while not (enough() or problems):
                    path = f"/{rng.randrange(files)}"
                    use_file(fs, rng, path, mine, size, wrote[mine].setdefault(path, {}))
            except BaseException as problem:
                problems.append(problem)

        with watchdog(table):
            threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(STRESS_S + 120)
                assert not thread.is_alive(), table.stats()
        assert not problems, problems[:3]
        table.settle()
        counts = table.stats()
        print(f"window of {ranges}: {counts}")  # -rP shows it
        assert counts["held"] == counts["busy"] == counts["waiting"] == 0
        assert all(table.counts[way] > 0 for way in WAYS), counts
        assert idle(fs), table.stats()
        assert fs.device.window is not None and fs.device.window.mapped() == []
    for paths in wrote:
        for path, slots in paths.items():
            data = (shared / path.lstrip("/")).read_bytes()
            for slot, value in slots.items():
                assert data[slot * RECORD : (slot + 1) * RECORD] == bytes([value]) * RECORD


def test_the_daemon_going_ends_those_that_wait(start: StartPeer, shared: Path) -> None:
    peer = start(options=(window(1),))
    make_files(shared, "ab")
    failed: list[int | None] = []
    with mount(peer.socket, options="dax", order="qemu-generic") as fs:
        a, b = fs.open("/a"), fs.open("/b")
        view = a.mmap(0, 1)

        def wait() -> None:
            try:
                b.pread(1, 0)
            except OSError as problem:
                failed.append(problem.errno)

        peer.stop()
        view.release()
        thread = threading.Thread(target=wait)
        thread.start()
        peer.kill()
        thread.join(30)
        assert not thread.is_alive()
    assert failed in ([errno.EIO], [errno.ENOTCONN])
