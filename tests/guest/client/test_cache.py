"""What the guest keeps and for how long, as each daemon's replies make it (A13 of the kernel's rules)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.fuse.abi import Init
from vfsd.guest import Filesystem
from vfsd.guest.client import objects
from vfsd.guest.client.pages import PagePool

from .conftest import Clock, StartPeer, requests
from .peers import Peer

Mounted = Callable[..., Filesystem]
PAGE = 4096


@pytest.fixture(params=["vfsd", "qemu-virtiofsd"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rewrite(path: Path, data: bytes) -> None:
    """Change a file on the host, its mtime certainly too."""
    path.write_bytes(data)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


# ---- names


@pytest.mark.parametrize(("cache", "lookups"), [("never", 3), ("auto", 1), ("always", 1)])
def test_a_name_is_kept_for_its_timeout(
    kind: str, mounted: Mounted, shared: Path, cache: str, lookups: int
) -> None:
    (shared / "file").touch()
    fs = mounted(kind, cache=cache)
    since = requests(fs)
    for _ in range(3):
        fs.stat("/file")
    assert since("LOOKUP") == lookups


@pytest.mark.parametrize(
    ("cache", "seconds", "lookups"), [("auto", 1.5, 1), ("auto", 0.5, 0), ("always", 3600, 0)]
)
def test_a_name_is_looked_up_again_after_its_timeout(
    kind: str, mounted: Mounted, shared: Path, clock: Clock, cache: str, seconds: float, lookups: int
) -> None:
    (shared / "file").touch()
    fs = mounted(kind, cache=cache)
    fs.stat("/file")
    clock.advance(seconds)
    since = requests(fs)
    fs.stat("/file")
    assert since("LOOKUP") == lookups


def test_without_a_timeout_names_are_forgotten_at_once(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").touch()
    fs = mounted(kind, cache="never")
    since = requests(fs)
    fs.stat("/file")
    assert since("LOOKUP") == since("FORGET") == 1
    assert objects.alive()["dentries"] == objects.alive()["inodes"] == 1  # the root


def test_a_name_the_host_gives_to_another_file_is_noticed(
    kind: str, mounted: Mounted, shared: Path, clock: Clock
) -> None:
    (shared / "file").write_bytes(b"old")
    fs = mounted(kind)
    assert fs.read_bytes("/file") == b"old"
    (shared / "new").write_bytes(b"newer")
    os.rename(shared / "new", shared / "file")
    assert fs.stat("/file").st_size == 3  # not yet
    clock.advance(2)
    assert fs.read_bytes("/file") == b"newer"
    os.unlink(shared / "file")
    (shared / "file").mkdir()
    clock.advance(2)
    assert fs.listdir("/file") == []


def test_a_directory_the_host_renames_keeps_its_inode(
    kind: str, mounted: Mounted, shared: Path, clock: Clock
) -> None:
    (shared / "one" / "below").mkdir(parents=True)
    (shared / "two").mkdir()
    fs = mounted(kind)
    with fs.open("/one/below", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.rename(shared / "one" / "below", shared / "two" / "moved")
        clock.advance(2)
        before = objects.alive()["inodes"]
        assert fs.stat("/two/moved").st_ino == fs.fstat(directory).st_ino
        assert objects.alive()["inodes"] == before + 1  # two
        assert directory.file.dentry.path() == b"/two/moved"


def test_removed_names_are_gone_at_once(kind: str, mounted: Mounted) -> None:
    fs = mounted(kind, cache="always")
    fs.makedirs("/dir/sub")
    fs.write_bytes("/file", b"")
    fs.unlink("/file")
    fs.rmdir("/dir/sub")
    for path in ("/file", "/dir/sub"):
        with pytest.raises(FileNotFoundError):
            fs.stat(path)
    fs.mkdir("/file")
    assert fs.listdir("/file") == []


# ---- attributes


@pytest.mark.parametrize(("cache", "getattrs"), [("never", 3), ("auto", 0), ("always", 0)])
def test_attributes_are_kept_for_their_timeout(
    kind: str, mounted: Mounted, shared: Path, cache: str, getattrs: int
) -> None:
    (shared / "file").touch()
    fs = mounted(kind, cache=cache)
    with fs.open("/file") as file:
        fs.fstat(file)
        since = requests(fs)
        for _ in range(3):
            fs.fstat(file)
        assert since("GETATTR") == getattrs


def test_changed_attributes_are_seen_after_their_timeout(
    kind: str, mounted: Mounted, shared: Path, clock: Clock
) -> None:
    (shared / "file").touch(0o600)
    fs = mounted(kind)
    assert fs.stat("/file").st_mode & 0o777 == 0o600
    os.chmod(shared / "file", 0o755)
    assert fs.stat("/file").st_mode & 0o777 == 0o600
    clock.advance(2)
    assert fs.stat("/file").st_mode & 0o777 == 0o755


def test_the_guest_s_own_write_is_seen_at_once(kind: str, mounted: Mounted, shared: Path) -> None:
    fs = mounted(kind, cache="always")
    with fs.open("/file", "w") as file:
        before = fs.fstat(file)
        file.write(b"x" * 10_000)
        since = requests(fs)
        after = fs.fstat(file)
        assert since("GETATTR") == 1
        assert (after.st_size, after.st_blocks) == (10_000, (shared / "file").stat().st_blocks)
        assert after.st_mtime_ns >= before.st_mtime_ns


def test_a_directory_s_change_invalidates_its_attributes(kind: str, mounted: Mounted) -> None:
    fs = mounted(kind, cache="always")
    assert fs.stat("/").st_nlink == 2
    fs.mkdir("/dir")
    assert fs.stat("/").st_nlink == 3


def test_permission_is_asked_for_again_before_it_is_denied(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").touch(0o600)
    fs = mounted(kind, cache="always")
    os.chmod(shared, 0o755)
    fs.stat("/file")
    os.chmod(shared / "file", 0o644)
    with fs.as_user(1000, 1000):
        since = requests(fs)
        fs.open("/file").close()
        assert since("GETATTR") == 1


def test_statx_is_sent_only_for_the_birth_time(kind: str, mounted: Mounted, shared: Path) -> None:
    fs = mounted(kind)
    fs.write_bytes("/file", b"")
    since = requests(fs)
    fs.stat("/file")
    assert since("STATX") == 0
    birth = fs.birthtime_ns("/file")
    assert since("STATX") == 1
    assert birth is None or abs(birth - time.time_ns()) < 60 * 10**9


# ---- data


def test_data_is_kept_while_a_file_is_open(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 10_000)
    fs = mounted(kind)
    with fs.open("/file") as file:
        assert file.pread(10_000, 0) == b"a" * 10_000
        rewrite(shared / "file", b"b" * 10_000)
        since = requests(fs)
        assert file.pread(10_000, 0) == b"a" * 10_000
        assert since("READ") == 0


def test_auto_inval_notices_a_changed_mtime(kind: str, mounted: Mounted, shared: Path, clock: Clock) -> None:
    (shared / "file").write_bytes(b"a" * 10_000)
    fs = mounted(kind)
    assert fs.stat("/").st_ino and fs.conn.has(Init.AUTO_INVAL_DATA)
    with fs.open("/file") as file:
        file.pread(10_000, 0)
        rewrite(shared / "file", b"b" * 10_000)
        clock.advance(2)
        assert file.pread(10_000, 0) == b"b" * 10_000


def test_close_to_open_drops_the_data(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 100)
    fs = mounted(kind)
    assert fs.read_bytes("/file") == b"a" * 100
    stat = (shared / "file").stat()
    (shared / "file").write_bytes(b"b" * 100)
    os.utime(shared / "file", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fs.read_bytes("/file") == b"b" * 100


def test_keep_cache_keeps_the_data(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 100)
    fs = mounted(kind, cache="always")
    with fs.open("/file") as file:
        assert file.pread(100, 0) == b"a" * 100
    (shared / "file").write_bytes(b"b" * 100)
    since = requests(fs)
    with fs.open("/file") as file:
        assert file.pread(100, 0) == b"a" * 100
        assert since("READ") == 0
        # stat(2) asks for the atime that the READ changed, and learns of the new mtime by it.
        fs.fstat(file)
        assert file.pread(100, 0) == b"b" * 100


def test_direct_io_keeps_nothing(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 100)
    fs = mounted(kind, cache="never")
    with fs.open("/file", "r+") as file:
        assert file.file.direct
        assert file.pread(100, 0) == b"a" * 100
        (shared / "file").write_bytes(b"b" * 50)
        assert file.pread(100, 0) == b"b" * 50
        file.pwrite(b"c", 0)
        assert len(file.file.inode.pages) == 0
    assert (shared / "file").read_bytes() == b"c" + b"b" * 49


def test_data_is_sent_before_write_returns(kind: str, mounted: Mounted, shared: Path) -> None:
    fs = mounted(kind)
    with fs.open("/file", "w+") as file:
        data = os.urandom(3 * PAGE)
        file.write(data)
        assert (shared / "file").read_bytes() == data
        assert len(file.file.inode.pages) == 3
        since = requests(fs)
        assert file.pread(3 * PAGE, 0) == data
        # AUTO_INVAL_DATA takes the mtime of the guest's own write for another's, in Linux too.
        assert since("GETATTR") == since("READ") == 1
        assert file.pread(3 * PAGE, 0) == data
        assert since("READ") == 1
        file.pwrite(b"x", 5)
        assert file.pread(10, 0) == data[:5] + b"x" + data[6:10]


def test_a_file_the_host_cuts_off_is_cut_off(kind: str, mounted: Mounted, shared: Path, clock: Clock) -> None:
    (shared / "file").write_bytes(b"a" * 3 * PAGE)
    fs = mounted(kind)
    with fs.open("/file") as file:
        file.pread(PAGE, 0)
        os.truncate(shared / "file", 100)
        clock.advance(2)
        assert file.pread(3 * PAGE, 0) == b"a" * 100
        os.truncate(shared / "file", 200)
        clock.advance(2)
        assert file.pread(3 * PAGE, 0) == b"a" * 100 + bytes(100)


def test_a_short_read_ends_the_file(kind: str, mounted: Mounted, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 3 * PAGE)
    fs = mounted(kind)
    with fs.open("/file") as file:
        os.truncate(shared / "file", 100)
        assert file.pread(3 * PAGE, 0) == b"a" * 100
        assert file.file.inode.size == 100


def test_large_reads_and_writes_are_cut_into_requests(kind: str, mounted: Mounted, shared: Path) -> None:
    fs = mounted(kind, queue_size=64)
    data = os.urandom(60 * PAGE * 3 + 100)
    since = requests(fs)
    with fs.open("/file", "w") as file:
        assert file.write(data) == len(data)
    assert since("WRITE") == 4
    fs.drop_caches()
    assert fs.read_bytes("/file") == data
    assert since("READ") == 4
    fs.drop_caches()
    with fs.open("/file", os.O_RDONLY | os.O_DIRECT) as file:
        before = since("READ")
        assert file.pread(len(data), 0) == data
        assert since("READ") - before == 4


def test_sequential_reads_are_read_ahead(kind: str, mounted: Mounted, shared: Path) -> None:
    data = os.urandom(64 * PAGE)
    (shared / "file").write_bytes(data)
    fs = mounted(kind)
    since = requests(fs)
    with fs.open("/file") as file:
        assert b"".join(file.read(PAGE) for _ in range(64)) == data
    assert since("READ") == 2  # 128 KiB each
    fs.drop_caches()
    with fs.open("/file") as file:
        before = since("READ")
        for page in (50, 3, 40):
            assert file.pread(10, page * PAGE) == data[page * PAGE : page * PAGE + 10]
        assert since("READ") - before == 3
        assert len(file.file.inode.pages) == 3


def test_the_page_cache_is_bounded(kind: str, mounted: Mounted, shared: Path) -> None:
    data = os.urandom(20 * PAGE)
    for number in range(10):
        (shared / str(number)).write_bytes(data)
    (shared / "large").write_bytes(data * 10)
    fs = mounted(kind, cache="always")
    fs.conn.pool = PagePool(50)
    opened = [fs.open(f"/{number}") for number in range(10)]
    for file in opened:
        assert file.pread(len(data), 0) == data
    assert [len(file.file.inode.pages) for file in opened] == [0] * 8 + [20, 20]
    with fs.open("/large") as large:
        assert b"".join(large.read(PAGE) for _ in range(200)) == data * 10
        assert len(large.file.inode.pages) <= 50
    assert opened[0].pread(10, 0) == data[:10]


@pytest.mark.parametrize("option", ["killpriv_v2", "no_killpriv_v2"])
def test_set_id_bits_go_with_a_user_s_write(mounted: Mounted, shared: Path, option: str) -> None:
    fs = mounted("qemu-virtiofsd", daemon=(option,))
    (shared / "file").write_bytes(b"12345678")
    changes = {"write": lambda file: file.write(b"x"), "truncate": lambda file: file.truncate(3)}
    for name, change in changes.items():
        os.chmod(shared / "file", 0o6777)
        fs.drop_caches()
        since = requests(fs)
        with fs.as_user(1000, 1000), fs.open("/file", "r+") as file:
            change(file)
        assert (shared / "file").stat().st_mode & 0o7777 == 0o777
        extra = int(option == "no_killpriv_v2")  # else the daemon does it by itself
        assert since("SETATTR") == extra + (name == "truncate")


# ---- listings


def test_readdirplus_answers_the_stats_that_follow(kind: str, mounted: Mounted, shared: Path) -> None:
    for number in range(50):
        (shared / str(number)).touch()
    fs = mounted(kind)
    since = requests(fs)
    for name in fs.listdir("/"):
        fs.stat(f"/{name}")
    assert since("READDIRPLUS") > 0
    assert since("LOOKUP") == since("GETATTR") - 1 == 0  # the root's own


def test_readdirplus_is_left_when_nobody_wants_attributes(kind: str, mounted: Mounted, shared: Path) -> None:
    for number in range(2000):
        (shared / f"{number:0100}").touch()
    fs = mounted(kind)
    since = requests(fs)
    fs.listdir("/")
    assert since("READDIRPLUS") == 1
    assert since("READDIR") > 2


@pytest.mark.parametrize(("cache", "again"), [("never", True), ("auto", True), ("always", False)])
def test_a_listing_is_kept_with_cache_dir(
    mounted: Mounted, shared: Path, cache: str, again: bool
) -> None:
    for name in "abc":
        (shared / name).touch()
    fs = mounted("vfsd", cache=cache)
    assert sorted(fs.listdir("/")) == ["a", "b", "c"]
    since = requests(fs)
    assert sorted(fs.listdir("/")) == ["a", "b", "c"]
    assert (since("READDIR", "READDIRPLUS") > 0) == again
    fs.mkdir("/d")
    assert sorted(fs.listdir("/")) == ["a", "b", "c", "d"]


# ---- lookup counts


@pytest.mark.parametrize("cache", ["never", "auto", "always"])
def test_lookup_counts_balance(start: StartPeer, kind: str, shared: Path, cache: str, clock: Clock) -> None:
    """After the guest has dropped its caches the daemon holds what it held before."""
    from vfsd.guest import mount

    for number in range(30):
        (shared / f"dir{number}").mkdir()
        (shared / f"dir{number}" / "file").write_bytes(b"x")
    peer = start(kind, cache=cache)
    with mount(peer.socket, clock=clock) as fs:
        exercise(fs, clock)
        settle(fs)
        before = peer.descriptors()
        for _ in range(3):
            exercise(fs, clock)
        settle(fs)
        assert objects.alive()["inodes"] == objects.alive()["dentries"] == 1
        assert settled(peer, before)


def exercise(fs: Filesystem, clock: Clock) -> None:
    for _ in fs.walk("/"):
        pass
    for number in range(30):
        fs.read_bytes(f"/dir{number}/file")
        fs.link(f"/dir{number}/file", f"/dir{number}/second")
        fs.rename(f"/dir{number}/second", f"/dir{number}/third")
        fs.symlink("file", f"/dir{number}/link")
        fs.mkdir(f"/dir{number}/sub")
        fs.write_bytes(f"/dir{number}/sub/new", b"new")
        clock.advance(2)
        assert fs.read_bytes(f"/dir{number}/link") == b"x"
        for path in ("sub/new", "link", "third"):
            fs.unlink(f"/dir{number}/{path}")
        fs.rmdir(f"/dir{number}/sub")
        with pytest.raises(FileNotFoundError):
            fs.stat(f"/dir{number}/sub")


def settle(fs: Filesystem) -> None:
    fs.drop_caches()
    fs.device.transport.drain()


def settled(peer: Peer, descriptors: int) -> bool:
    """A daemon may give back a forget's buffer before it has closed the descriptor."""
    deadline = time.monotonic() + 10
    while peer.descriptors() > descriptors and time.monotonic() < deadline:
        os.sched_yield()
    return peer.descriptors() <= descriptors


# ---- writeback


@pytest.fixture(params=["vfsd", "qemu-virtiofsd"])
def writeback(mounted: Mounted, request: pytest.FixtureRequest) -> Filesystem:
    fs = mounted(request.param, daemon=("writeback",), cache="always")
    assert fs.stat("/").st_ino and fs.conn.has(Init.WRITEBACK_CACHE)
    return fs


def test_writeback_sends_data_later_and_together(writeback: Filesystem, shared: Path) -> None:
    fs = writeback
    since = requests(fs)
    with fs.open("/file", "w") as file:
        for number in range(200):
            file.write(bytes([number]) * 50)
        assert since("WRITE") == 0
        assert (shared / "file").stat().st_size == 0
        assert fs.fstat(file).st_size == 10_000  # the guest's own
        fs.fsync(file)
        assert since("WRITE") == 1
    assert (shared / "file").read_bytes() == b"".join(bytes([number]) * 50 for number in range(200))


def test_writeback_reads_what_a_partial_write_needs(writeback: Filesystem, shared: Path) -> None:
    (shared / "file").write_bytes(b"a" * 10_000)
    with writeback.open("/file", "r+") as file:
        file.pwrite(b"b", 5000)
        file.pwrite(b"c" * 10, 20_000)
        assert file.pread(3, 4999) == b"aba"
    expected = b"a" * 5000 + b"b" + b"a" * 4999 + bytes(10_000) + b"c" * 10
    assert (shared / "file").read_bytes() == expected


def test_writeback_keeps_size_and_times_of_its_own(writeback: Filesystem, shared: Path, clock: Clock) -> None:
    fs = writeback
    with fs.open("/file", "w") as file:
        file.write(b"x" * 100)
        clock.advance(10**6)
        written = fs.fstat(file)
        assert written.st_size == 100
    assert (shared / "file").stat().st_mtime_ns == written.st_mtime_ns
    with fs.open("/file", "r+") as file:
        file.write(b"y" * 50)
        file.truncate(20)
    assert (shared / "file").read_bytes() == b"y" * 20


def test_writeback_is_flushed_before_others_look(writeback: Filesystem, shared: Path) -> None:
    fs = writeback
    with fs.open("/file", "w+") as file:
        file.write(b"x" * 5000)
        with fs.open("/copy", "w") as copy:
            assert fs.copy_file_range(file, copy, 5000, 0) == 5000
        assert (shared / "file").read_bytes() == b"x" * 5000
        file.pwrite(b"y", 0)
        fs.sync()
        assert (shared / "file").read_bytes()[:1] == b"y"
        file.pwrite(b"z", 0)
        with fs.open("/file", os.O_RDONLY | os.O_DIRECT) as direct:
            assert direct.pread(1, 0) == b"z"


def test_writeback_tells_fsync_what_went_wrong(writeback: Filesystem) -> None:
    with writeback.open("/file", "w") as file:
        assert file.pwrite(b"x", 2**62) == 1
        with pytest.raises(OSError) as caught:
            writeback.fsync(file)
        assert caught.value.errno == errno.EFBIG


def test_an_error_of_writing_back_is_told_to_who_wrote(writeback: Filesystem) -> None:
    """Also when another program's look at the file has met it first."""
    with writeback.open("/file", "w") as file, writeback.open("/file") as other:
        file.pwrite(b"x", 2**62)
        with pytest.raises(OSError):
            other.seek(0, os.SEEK_DATA)
        assert writeback.stat("/file").st_size == 2**62 + 1
        with pytest.raises(OSError) as caught:
            writeback.fsync(file)
        assert caught.value.errno == errno.EFBIG
        writeback.fsync(file)


def test_dirty_data_is_no_hole(writeback: Filesystem, shared: Path) -> None:
    """A daemon that can't know what a guest with writeback holds takes all for data."""
    fs = writeback
    with fs.open("/file", "w+") as file:
        file.truncate(1 << 20)
        for position in (500_000, 900_000):
            file.pwrite(b"x" * 10_000, position)
            start = position // 4096 * 4096
            assert file.seek(position - 100_000, os.SEEK_DATA) in (start, position - 100_000)
            assert file.seek(start, os.SEEK_HOLE) >= position + 10_000
    with fs.open("/new", "w+") as file:
        file.write(b"x" * 200_000)
        assert fs.fstat(file).st_blocks * 512 >= 200_000
        file.write(b"x" * 200_000)
        assert fs.stat("/new").st_blocks * 512 >= 400_000
        with fs.open("/copy", "w") as copy:
            file.write(b"y" * 1000)
            assert fs.copy_file_range(file, copy, (1 << 20), 0, 0) == 401_000
    assert (shared / "copy").read_bytes() == b"x" * 400_000 + b"y" * 1000
