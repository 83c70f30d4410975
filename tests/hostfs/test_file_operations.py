"""Operations on open files and directories: the reply, exactly, and what the host then has."""

import contextlib
import os
import random
import threading
from errno import (
    EACCES,
    EBADF,
    EEXIST,
    EINVAL,
    EISDIR,
    ENOENT,
    ENOTDIR,
    ENXIO,
    EOPNOTSUPP,
    EOVERFLOW,
    ESTALE,
)  # fmt: skip
from pathlib import Path

import pytest
from fuse import wire
from fuse.fixtures import StartGuest, held
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT, Dirent
from guests import Daemon, StartDaemon

from vfsd.fuse.abi import DIRENT, ENTRY_OUT_SIZE, FSYNC_FDATASYNC, Fattr

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
SEEK_DATA, SEEK_HOLE = 3, 4
WRITE_CACHE = 1


@pytest.fixture
def file(guest: Guest, share: Path) -> tuple[int, int]:
    """nodeid and fh, open for both, of `file` with `content` in it."""
    (share / "file").write_bytes(b"content")
    nodeid = guest.walk("file")
    return nodeid, guest.open(nodeid, os.O_RDWR)


# OPEN, CREATE, RELEASE


def test_open_modes(guest: Guest, share: Path) -> None:
    (share / "f").write_bytes(b"content")
    nodeid = guest.walk("f")
    reader, writer = guest.open(nodeid, os.O_RDONLY), guest.open(nodeid, os.O_WRONLY)
    assert reader != writer
    assert guest.read(nodeid, reader, 0, 100) == b"content"
    with refused(EBADF):
        guest.write(nodeid, reader, 0, b"x")
    assert guest.write(nodeid, writer, 0, b"C") == 1
    with refused(EBADF):
        guest.read(nodeid, writer, 0, 100)
    assert guest.read(nodeid, reader, 0, 100) == b"Content"
    with refused(EISDIR):
        guest.open(ROOT)
    with refused(EISDIR):
        guest.open(ROOT, os.O_RDWR)


def test_open_with_o_trunc(guest: Guest, share: Path) -> None:
    (share / "f").write_bytes(b"content")
    nodeid = guest.walk("f")
    guest.open(nodeid, os.O_WRONLY | os.O_TRUNC)
    assert (share / "f").read_bytes() == b""


@pytest.mark.parametrize(
    "flags",
    [os.O_DIRECT, os.O_NOATIME, os.O_APPEND, os.O_NOFOLLOW, os.O_SYNC, os.O_NONBLOCK, os.O_CLOEXEC, 0o40],
)
def test_flags_that_are_the_guests_own_affair(guest: Guest, share: Path, flags: int) -> None:
    """Some would fail on the host, or change what WRITE at an offset means."""
    (share / "f").write_bytes(b"content")
    nodeid = guest.walk("f")
    fh = guest.open(nodeid, os.O_RDWR | flags)
    assert guest.write(nodeid, fh, 1, b"0") == 1
    assert guest.read(nodeid, fh, 0, 3) == b"c0n"


@pytest.mark.parametrize("options", [[], ["--preserve-noatime"]])
def test_a_guests_o_noatime_counts_where_the_operator_wants_it(
    daemon: StartDaemon, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "f").write_bytes(b"content")
    os.utime(tmp_path / "f", (1, 2))  # read before it was written: relatime would note the next time
    with contextlib.closing(Guest(daemon(tmp_path, options=options).socket)) as guest:
        guest.init()
        nodeid = guest.walk("f")
        fh = guest.open(nodeid, os.O_RDONLY | os.O_NOATIME)
        assert guest.read(nodeid, fh, 0, 100) == b"content"
    assert ((tmp_path / "f").stat().st_atime == 1) == bool(options)


def test_create(guest: Guest, share: Path) -> None:
    entry, fh = guest.create(ROOT, b"new", os.O_WRONLY | os.O_EXCL, 0o640)
    entry.attr.check(os.stat(share / "new"))
    assert (entry.attr.mode, entry.attr.size) == (0o100640, 0)
    assert guest.write(entry.nodeid, fh, 0, b"abc") == 3
    with refused(EBADF):
        guest.read(entry.nodeid, fh, 0, 1)
    assert guest.lookup(ROOT, b"new").nodeid == entry.nodeid
    assert (share / "new").read_bytes() == b"abc"


def test_create_may_write_what_its_mode_forbids(guest: Guest, share: Path) -> None:
    entry, fh = guest.create(ROOT, b"new", os.O_RDWR, 0)
    assert guest.write(entry.nodeid, fh, 0, b"abc") == 3
    assert guest.read(entry.nodeid, fh, 0, 3) == b"abc"


def test_create_of_what_the_host_made_meanwhile(guest: Guest, share: Path) -> None:
    (share / "f").write_bytes(b"content")
    (share / "f").chmod(0o604)
    with refused(EEXIST):
        guest.create(ROOT, b"f", os.O_RDWR | os.O_EXCL)
    entry, fh = guest.create(ROOT, b"f", os.O_RDWR, 0o777)
    entry.attr.check(os.stat(share / "f"))
    assert guest.read(entry.nodeid, fh, 0, 100) == b"content"
    entry, fh = guest.create(ROOT, b"f", os.O_RDWR | os.O_TRUNC, 0o777)
    assert (share / "f").read_bytes() == b""
    assert entry.attr.size == 0, "the size is the one before O_TRUNC"
    guest.forget(entry.nodeid, 2)
    with refused(ESTALE):
        guest.getattr(entry.nodeid)


def test_create_of_what_is_no_file(guest: Guest, share: Path, served: Daemon) -> None:
    (share / "dir").mkdir()
    os.mkfifo(share / "fifo")
    (share / "link").symlink_to("target")
    before = held(served)
    # ESTALE has Linux look the name up, and follow the link or open its own fifo.
    for name, error in ((b"dir", EISDIR), (b"fifo", ESTALE), (b"link", ESTALE)):
        with refused(error):
            guest.create(ROOT, name)
    assert sorted(os.listdir(share)) == ["dir", "fifo", "link"]
    assert held(served) == before, "a refused entry is still held"


def test_release(guest: Guest, file: tuple[int, int], served: Daemon) -> None:
    nodeid, fh = file
    before = held(served)
    guest.release(nodeid, fh)
    assert len(held(served)) == len(before) - 1
    for use in (
        lambda: guest.release(nodeid, fh),
        lambda: guest.read(nodeid, fh, 0, 1),
        lambda: guest.write(nodeid, fh, 0, b"x"),
        lambda: guest.flush(nodeid, fh),
        lambda: guest.fsync(nodeid, fh),
    ):
        with refused(EBADF):
            use()
    other = guest.open(nodeid)
    assert other != fh, "the number of a released handle is used again"


def test_flush_and_fsync(guest: Guest, file: tuple[int, int], served: Daemon) -> None:
    nodeid, fh = file
    before = held(served)
    for _ in range(3):
        guest.flush(nodeid, fh)
        guest.fsync(nodeid, fh)
        guest.fsync(nodeid, fh, FSYNC_FDATASYNC)
    dir_fh = guest.opendir(ROOT)
    guest.fsync(ROOT, dir_fh, op="FSYNCDIR")
    guest.release(ROOT, dir_fh, "RELEASEDIR")
    with refused(EBADF):
        guest.fsync(ROOT, dir_fh, op="FSYNCDIR")
    assert held(served) == before


# READ, WRITE


def test_read_at_the_end(guest: Guest, file: tuple[int, int]) -> None:
    nodeid, fh = file
    assert guest.read(nodeid, fh, 0, 7) == b"content"
    assert guest.read(nodeid, fh, 0, 8) == b"content"
    assert guest.read(nodeid, fh, 3, 100_000) == b"tent"
    assert guest.read(nodeid, fh, 6, 1) == b"t"
    for offset in (7, 8, 2**31, 2**40):
        assert guest.read(nodeid, fh, offset, 4096) == b""
    assert guest.read(nodeid, fh, 0, 0) == b""


def test_read_gives_no_more_than_its_size(guest: Guest, file: tuple[int, int]) -> None:
    nodeid, fh = file
    args = wire.read_in(fh, 0, 3)
    reply = guest.queue.ask("READ", nodeid, args, pages=4096)
    assert (reply.error, reply.body) == (0, b"con")


def test_write(guest: Guest, share: Path, file: tuple[int, int]) -> None:
    nodeid, fh = file
    assert guest.write(nodeid, fh, 3, b"X") == 1
    assert (share / "file").read_bytes() == b"conXent"
    assert guest.write(nodeid, fh, 10, b"after a hole") == 12
    assert (share / "file").read_bytes() == b"conXent\0\0\0after a hole"
    assert guest.write(nodeid, fh, 2**33, b"far") == 3
    assert os.stat(share / "file").st_size == 2**33 + 3
    assert guest.read(nodeid, fh, 2**33 - 1, 100) == b"\0far"
    assert guest.write(nodeid, fh, 0, b"") == 0


@pytest.mark.parametrize("num", [16, 128])
def test_data_of_every_size(start_guest: StartGuest, share: Path, num: int) -> None:
    guest = start_guest(num=num)
    out = guest.init()
    entry, fh = guest.create(ROOT, b"f")
    model = bytearray()
    choose = random.Random(num)
    for i in range(40):
        size = choose.choice([1, 4095, 4096, 4097, 8192, choose.randrange(1, out.max_write), out.max_write])
        at = choose.randrange(len(model) + 5000)
        data = choose.randbytes(size)
        assert guest.write(entry.nodeid, fh, at, data) == size, i
        model.extend(bytes(max(0, at + size - len(model))))
        model[at : at + size] = data
        at = choose.randrange(len(model) + 1)
        size = choose.randrange(1, out.max_write)
        assert guest.read(entry.nodeid, fh, at, size) == model[at : at + size], i
    assert (share / "f").read_bytes() == model


def test_append(guest: Guest, share: Path, file: tuple[int, int]) -> None:
    """O_APPEND comes with each write, and goes to the end wherever the guest believes it is."""
    nodeid, fh = file
    assert guest.write(nodeid, fh, 0, b"+1", flags=os.O_APPEND) == 2
    with open(share / "file", "ab") as of_the_host:
        of_the_host.write(b"+host")
    data = b"2" * 9000
    assert guest.write(nodeid, fh, 9, data, flags=os.O_APPEND) == len(data)
    assert (share / "file").read_bytes() == b"content+1+host" + data
    # From the page cache: the guest has put the offset right itself.
    assert guest.write(nodeid, fh, 0, b"C", flags=os.O_APPEND, write_flags=WRITE_CACHE) == 1
    assert (share / "file").read_bytes() == b"Content+1+host" + data


def test_concurrent_appends_lose_nothing(start_guest: StartGuest, share: Path) -> None:
    guest = start_guest(request_queues=2)
    guest.init()
    entry, fh = guest.create(ROOT, b"log")

    def write(index: int) -> None:
        for i in range(300):
            guest.on(index).write(entry.nodeid, fh, 0, b"%d:%05d\n" % (index, i), flags=os.O_APPEND)

    threads = [threading.Thread(target=write, args=(index,)) for index in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (share / "log").read_bytes().splitlines()
    for index in (1, 2):
        assert [line for line in lines if line.startswith(b"%d:" % index)] == [
            b"%d:%05d" % (index, i) for i in range(300)
        ]


def test_writes_take_set_id_bits_away(guest: Guest, share: Path) -> None:
    """Without HANDLE_KILLPRIV the guest does it itself, by SETATTR; the host's root keeps them."""
    entry, fh = guest.create(ROOT, b"f", os.O_RDWR, 0o4755)
    guest.setattr(entry.nodeid, Fattr.MODE, mode=0o755)
    guest.write(entry.nodeid, fh, 0, b"x")
    assert os.stat(share / "f").st_mode & 0o7777 == 0o755


# FALLOCATE, LSEEK


def test_fallocate(guest: Guest, share: Path) -> None:
    path = share / "f"
    entry, fh = guest.create(ROOT, b"f")
    nodeid = entry.nodeid
    guest.fallocate(nodeid, fh, 0, 16384)
    assert os.stat(path).st_size == 16384 and os.stat(path).st_blocks >= 32
    guest.fallocate(nodeid, fh, 16384, 16384, KEEP_SIZE)
    assert os.stat(path).st_size == 16384 and os.stat(path).st_blocks >= 64
    guest.write(nodeid, fh, 0, b"x" * 16384)
    guest.fallocate(nodeid, fh, 4096, 4096, PUNCH_HOLE | KEEP_SIZE)
    guest.fallocate(nodeid, fh, 8192, 100, ZERO_RANGE)
    assert path.read_bytes() == b"x" * 4096 + bytes(4196) + b"x" * 8092
    with refused(EOPNOTSUPP, EINVAL):
        guest.fallocate(nodeid, fh, 0, 4096, PUNCH_HOLE)
    with refused(EINVAL):
        guest.fallocate(nodeid, fh, 0, 0)
    reader = guest.open(nodeid)
    with refused(EBADF):
        guest.fallocate(nodeid, reader, 0, 4096)


@pytest.mark.parametrize("mode", [0x4, 0x8, 0x20, 0x40, 0x80000000])
def test_fallocate_takes_only_the_modes_linux_lets_through(guest: Guest, share: Path, mode: int) -> None:
    content = bytes(range(256)) * 64
    (share / "f").write_bytes(content)
    nodeid = guest.lookup(ROOT, b"f").nodeid
    with refused(EOPNOTSUPP):
        guest.fallocate(nodeid, guest.open(nodeid, os.O_RDWR), 0, 4096, mode)
    assert (share / "f").read_bytes() == content


@pytest.mark.parametrize("plus", [False, True])
def test_the_root_has_nothing_above_it(guest: Guest, share: Path, plus: bool) -> None:
    (share / "d").mkdir()
    inodes = {entry.name: entry.ino for entry in guest.readdir(ROOT, guest.opendir(ROOT), plus=plus)}
    assert inodes[b".."] == inodes[b"."] == share.stat().st_ino
    below = guest.lookup(ROOT, b"d").nodeid
    inodes = {entry.name: entry.ino for entry in guest.readdir(below, guest.opendir(below), plus=plus)}
    assert inodes[b".."] == share.stat().st_ino


def test_lseek(guest: Guest, share: Path) -> None:
    entry, fh = guest.create(ROOT, b"f")
    nodeid = entry.nodeid
    guest.write(nodeid, fh, 65536, b"x" * 4096)
    guest.truncate(nodeid, 2**20)
    for offset, whence in ((0, SEEK_DATA), (0, SEEK_HOLE), (65537, SEEK_DATA), (65537, SEEK_HOLE)):
        with open(share / "f", "rb") as f:
            assert guest.lseek(nodeid, fh, offset, whence) == os.lseek(f.fileno(), offset, whence)
    with refused(ENXIO):
        guest.lseek(nodeid, fh, 100_000, SEEK_DATA)
    with refused(ENXIO):
        guest.lseek(nodeid, fh, 2**20, SEEK_HOLE)
    for whence in (0, 1, 2, 5, 2**32 - 1):
        with refused(EINVAL):
            guest.lseek(nodeid, fh, 0, whence)
    with refused(EOVERFLOW, EINVAL, ENXIO):
        guest.lseek(nodeid, fh, 2**63, SEEK_DATA)


# Directories


def fill(directory: Path, n: int) -> set[bytes]:
    names = {b"%d-" % i + b"n" * (i * 7 % 250) for i in range(n)}
    for name in names:
        (directory / name.decode()).touch()
    return names


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [512, 4096, 65536])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_every_name_once(guest: Guest, share: Path, n: int, size: int, plus: bool) -> None:
    (share / "d").mkdir()
    names = fill(share / "d", n)
    found = guest.listing(guest.walk("d"), size=size, plus=plus)
    assert sorted(dirent.name for dirent in found) == sorted(names)
    for dirent in found:
        check_dirent(guest, share / "d" / dirent.name.decode(), dirent, plus)


def check_dirent(guest: Guest, path: Path, dirent: Dirent, plus: bool) -> None:
    st = os.lstat(path)
    assert (dirent.ino, dirent.type) == (st.st_ino, st.st_mode >> 12)
    assert (dirent.entry is not None) == plus
    if dirent.entry is not None:
        dirent.entry.attr.check(st)
        assert dirent.entry.entry_ns == 10**9
        assert guest.getattr(dirent.entry.nodeid) == dirent.entry.attr


def test_types_and_dots(guest: Guest, share: Path) -> None:
    (share / "dir").mkdir()
    (share / "file").touch()
    (share / "link").symlink_to("nowhere")
    os.mkfifo(share / "fifo")
    for plus in (False, True):
        fh = guest.opendir(ROOT)
        found = {d.name: d for d in guest.readdir(ROOT, fh, plus=plus)}
        assert {name: dirent.type for name, dirent in found.items()} == {
            b".": 4, b"..": 4, b"dir": 4, b"fifo": 1, b"file": 8, b"link": 10,
        }  # fmt: skip
        if plus:
            for dot in (b".", b".."):
                entry = found[dot].entry
                assert entry is not None and entry.nodeid == 0
        guest.release(ROOT, fh, "RELEASEDIR")


def test_what_fits_is_what_is_sent(guest: Guest, share: Path) -> None:
    """No record is cut, none that fits is left for later, and a lookup is counted for no other."""
    fill(share, 40)
    nodeids: set[int] = set()
    fh = guest.opendir(ROOT)
    offset = 0
    for size in range(ENTRY_OUT_SIZE + DIRENT.size + 256, 4096, 8):
        found = guest.readdir(ROOT, fh, offset, size, plus=True)
        if not found:
            break
        offset = found[-1].off
        nodeids |= {d.entry.nodeid for d in found if d.entry is not None and d.entry.nodeid}
    else:
        pytest.fail("the listing does not end")
    assert len(nodeids) == 40
    for nodeid in nodeids:
        guest.forget(nodeid, 1)
        with refused(ESTALE):
            guest.getattr(nodeid)


def test_readdirplus_counts_lookups(guest: Guest, share: Path) -> None:
    names = fill(share, 20)
    for _ in range(3):
        found = guest.listing(ROOT, plus=True)
    looked_up = guest.lookup(ROOT, min(names)).nodeid
    for dirent in found:
        assert dirent.entry is not None
        nodeid = dirent.entry.nodeid
        guest.forget(nodeid, 2 + (nodeid == looked_up))
        guest.getattr(nodeid)
        guest.forget(nodeid, 1)
        with refused(ESTALE):
            guest.getattr(nodeid)
    guest.listing(ROOT, plus=False)
    fresh = guest.lookup(ROOT, min(names)).nodeid
    guest.forget(fresh, 1)
    with refused(ESTALE):
        guest.getattr(fresh)


def test_any_position_can_be_gone_back_to(guest: Guest, share: Path) -> None:
    fill(share, 100)
    fh = guest.opendir(ROOT)
    whole = guest.readdir(ROOT, fh, 0, 65536)
    for i in random.Random(1).sample(range(len(whole)), 30):
        rest = guest.readdir(ROOT, fh, whole[i].off, 65536)
        assert [d.name for d in rest] == [d.name for d in whole[i + 1 :]]


def test_a_listing_while_names_come_and_go(guest: Guest, share: Path) -> None:
    """Those that stay are listed once each."""
    stay = fill(share, 150)
    goes = [share / f"goes {i}" for i in range(150)]
    for path in goes:
        path.touch()
    fh = guest.opendir(ROOT)
    offset, found = 0, []
    while part := guest.readdir(ROOT, fh, offset, 2048, plus=True):
        found += [d.name for d in part]
        offset = part[-1].off
        for path in goes[:10]:
            path.unlink()
        del goes[:10]
        (share / f"comes {len(found)}").touch()
    assert sorted(name for name in found if name in stay) == sorted(stay)


def test_a_directory_that_is_removed_while_open(guest: Guest, share: Path) -> None:
    (share / "d").mkdir()
    (share / "d" / "f").touch()
    nodeid = guest.walk("d")
    fh = guest.opendir(nodeid)
    (share / "d" / "f").unlink()
    (share / "d").rmdir()
    with refused(ENOENT):
        guest.lookup(nodeid, b"f")
    try:
        assert guest.readdir(nodeid, fh) == []
    except OSError as problem:
        assert problem.errno == ENOENT
    guest.release(nodeid, fh, "RELEASEDIR")


def test_opendir_of_what_is_none(guest: Guest, share: Path) -> None:
    (share / "file").touch()
    os.mkfifo(share / "fifo")
    (share / "link").symlink_to(".")
    for name in ("file", "fifo", "link"):
        with refused(ENOTDIR, EBADF, EACCES):
            guest.opendir(guest.walk(name))
