"""What the daemon lets a guest keep: timeouts, negative entries, and what it says of open files."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from errno import EBADF, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOSYS, ENOTDIR, ESTALE
from pathlib import Path
from threading import Thread

import pytest
from guests import StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr, Fopen, Init

from . import wire
from .fixtures import guests_of, held
from .ops import LINUX_FLAGS, Operations, refused
from .rawguest import Guest
from .wire import ROOT

S = 10**9
DAY = 86400 * S
DIRECT_IO, KEEP_CACHE, CACHE_DIR = 1, 2, 8
NOFLUSH, PARALLEL = 1 << 5, 1 << 6

Served = Callable[..., Guest]


@pytest.fixture
def serve(daemon: StartDaemon, tmp_path: Path) -> Iterator[Served]:
    """Starts a daemon on tmp_path with these options, and a guest that has said INIT."""
    stack = []

    def start(*options: str, cache: str = "auto", flags: int = LINUX_FLAGS, share: Path = tmp_path) -> Guest:
        guests = guests_of(daemon(share, cache=cache, options=options))
        guest = guests.__enter__()()
        stack.append(guests)
        guest.init(flags=flags)
        return guest

    yield start
    for guests in stack:
        guests.__exit__(None, None, None)


def agreed(guest: Guest) -> Init:
    """In a new session; what the guest knew is forgotten."""
    return Init(guest.init().flags)


def open_flags(guest: Guest, nodeid: int, flags: int = os.O_RDONLY, op: str = "OPEN") -> int:
    """FOPEN_* of the reply."""
    _fh, found, _ = wire.OPEN_OUT.unpack(guest.body(op, nodeid, abi.OPEN_IN.pack(flags, 0)))
    return int(found)


# ---- modes


@pytest.mark.parametrize(
    ("cache", "names", "missing", "plus", "opened", "opened_dir", "links"),
    [
        ("never", 0, 0, False, DIRECT_IO, 0, False),
        ("none", 0, 0, False, DIRECT_IO, 0, False),
        ("auto", 1 * S, 0, True, 0, 0, False),
        ("metadata", DAY, 1 * S, True, DIRECT_IO, KEEP_CACHE | CACHE_DIR, True),
        ("always", DAY, 1 * S, True, KEEP_CACHE, KEEP_CACHE | CACHE_DIR, True),
    ],
)
def test_modes(
    serve: Served, tmp_path: Path, cache: str, names: int, missing: int, plus: bool, opened: int,
    opened_dir: int, links: bool,
) -> None:  # fmt: skip
    (tmp_path / "f").touch()
    guest = serve(cache=cache)
    flags = agreed(guest)
    assert bool(flags & Init.DO_READDIRPLUS) == bool(flags & Init.READDIRPLUS_AUTO) == plus
    assert bool(flags & Init.CACHE_SYMLINKS) == links
    assert not flags & (Init.WRITEBACK_CACHE | Init.DIRECT_IO_ALLOW_MMAP)
    entry = guest.lookup(ROOT, b"f")
    assert entry.entry_ns == entry.attr_ns == names
    assert open_flags(guest, entry.nodeid) & ~NOFLUSH == opened
    assert open_flags(guest, ROOT, op="OPENDIR") == opened_dir
    body = guest.body("GETATTR", entry.nodeid, bytes(16))
    assert wire.ATTR_HEAD.unpack_from(body) == (names // S, 0)
    assert absence(guest, b"none") == missing


def absence(guest: Guest, name: bytes, parent: int = ROOT) -> int:
    """Nanoseconds that the guest may take a name for missing; 0: it is told ENOENT."""
    reply = guest.queue.ask("LOOKUP", parent, name + b"\0")
    if reply.error:
        assert reply.error == ENOENT
        return 0
    entry = wire.parse_entry(reply.body)
    assert entry.nodeid == 0 and entry.attr_ns == 0
    assert not any(reply.body[40:]), "attributes of nothing"
    return entry.entry_ns


# ---- timeouts


@pytest.mark.parametrize(
    ("cache", "options", "entry", "attr", "missing"),
    [
        ("auto", ("--entry-timeout", "0.25"), S // 4, S, 0),
        ("auto", ("--attr-timeout", "2.5", "--negative-timeout", ".5"), S, 5 * S // 2, S // 2),
        ("always", ("--timeout", "3", "--attr-timeout", "0"), 3 * S, 0, S),
        ("never", ("--timeout", "7", "--negative-timeout", "1000000000"), 7 * S, 7 * S, S * S),
        ("always", ("--negative-timeout", "0"), DAY, DAY, 0),
        ("auto", ("-o", "timeout=5,entry_timeout=6,negative_timeout=7"), 6 * S, 5 * S, 7 * S),
    ],
)
def test_timeouts_outweigh_the_mode(
    serve: Served, tmp_path: Path, cache: str, options: tuple[str, ...], entry: int, attr: int, missing: int
) -> None:
    (tmp_path / "f").touch()
    guest = serve(*options, cache=cache)
    found = guest.lookup(ROOT, b"f")
    assert (found.entry_ns, found.attr_ns) == (entry, attr)
    body = guest.body("GETATTR", found.nodeid, bytes(16))
    assert wire.ATTR_HEAD.unpack_from(body) == divmod(attr, S)
    assert absence(guest, b"none") == missing
    (listed,) = guest.listing(ROOT, plus=True)
    assert listed.entry is not None and listed.entry.entry_ns == entry


def test_the_daemon_itself_remembers_no_absence(serve: Served, tmp_path: Path) -> None:
    guest = serve("--negative-timeout", "60")
    (tmp_path / "file").touch()
    assert absence(guest, b"late") == 60 * S
    (tmp_path / "late").write_bytes(b"here")
    assert guest.lookup(ROOT, b"late").attr.size == 4
    (tmp_path / "late").unlink()
    assert absence(guest, b"late") == 60 * S


def test_only_a_missing_name_is_kept_as_missing(serve: Served, tmp_path: Path) -> None:
    guest = serve("--negative-timeout", "60")
    (tmp_path / "file").touch()
    file = guest.lookup(ROOT, b"file").nodeid
    with refused(ENOTDIR):
        guest.lookup(file, b"below")
    with refused(ENAMETOOLONG):
        guest.lookup(ROOT, b"x" * 256)
    with refused(EINVAL):
        guest.lookup(ROOT, b"..")
    with refused(ENOENT):
        guest.unlink(ROOT, b"none")
    with refused(ENOENT):
        guest.rename(ROOT, b"none", ROOT, b"other")


def test_create_takes_what_the_host_made_of_a_missing_name(serve: Served, tmp_path: Path) -> None:
    guest = serve("--negative-timeout", "60")
    assert absence(guest, b"f") == 60 * S
    (tmp_path / "f").write_bytes(b"host")
    entry, fh = guest.create(ROOT, b"f", os.O_RDWR)
    assert guest.read(entry.nodeid, fh, 0, 10) == b"host"


# ---- what is negotiated


@pytest.mark.parametrize(
    ("options", "cache", "flag"),
    [
        (("--writeback",), "auto", Init.WRITEBACK_CACHE),
        (("-o", "writeback"), "always", Init.WRITEBACK_CACHE),
        (("--allow-mmap",), "never", Init.DIRECT_IO_ALLOW_MMAP),
        (("--symlink-cache", "always"), "never", Init.CACHE_SYMLINKS),
    ],
)
def test_what_was_allowed_is_agreed_if_the_guest_can(
    serve: Served, options: tuple[str, ...], cache: str, flag: Init
) -> None:
    guest = serve(*options, cache=cache)
    assert agreed(guest) & flag
    assert not guest.init(flags=LINUX_FLAGS & ~flag).flags & flag


def test_what_can_be_turned_off(serve: Served) -> None:
    guest = serve("--no-readdirplus", "--symlink-cache", "never", cache="always")
    off = Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO | Init.CACHE_SYMLINKS
    assert not agreed(guest) & off


# ---- open files


def mounted(kind: str, options: str, place: Path) -> Iterator[Path]:
    """Another file system of this kind, while a test runs."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", kind, "-o", options, "none", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"can't mount {kind}: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    yield from mounted("tmpfs", "size=1m", tmp_path / "tmpfs")


@pytest.fixture
def overlay(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("layers")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    options = ",".join(f"{name}dir={base / name}" for name in ("lower", "upper", "work"))
    yield from mounted("overlay", options, tmp_path / "overlay")


def create_flags(guest: Guest, parent: int, name: bytes, flags: int = os.O_RDWR) -> int:
    """FOPEN_* of the reply to CREATE."""
    args = abi.CREATE_IN.pack(flags | os.O_CREAT, 0o644, 0, 0) + name + b"\0"
    _fh, found, _ = wire.OPEN_OUT.unpack(guest.body("CREATE", parent, args)[wire.ENTRY_SIZE :])
    return int(found)


def test_flush_is_left_out_where_closing_reports_nothing(
    serve: Served, tmp_path: Path, tmpfs: Path, overlay: Path
) -> None:
    """By the file system of each file, not of the share: overlayfs passes a close on to who knows what."""
    kinds = {"": True, "tmpfs": True, "overlay": False}
    guest = serve()
    for place, quiet in kinds.items():
        (tmp_path / place / "f").touch()
        assert bool(open_flags(guest, guest.walk(f"{place}/f".lstrip("/"))) & NOFLUSH) == quiet, place
        parent = guest.walk(place) if place else ROOT
        assert bool(create_flags(guest, parent, b"made") & NOFLUSH) == quiet, place
        fh = guest.open(guest.walk(f"{place}/f".lstrip("/")))
        guest.flush(guest.walk(f"{place}/f".lstrip("/")), fh)
    assert not open_flags(guest, ROOT, op="OPENDIR") & NOFLUSH
    with refused(EBADF):
        guest.flush(guest.walk("f"), 12345)


def test_a_share_on_overlayfs_is_flushed(serve: Served, overlay: Path) -> None:
    guest = serve(share=overlay)
    assert not create_flags(guest, ROOT, b"f") & NOFLUSH


@pytest.mark.parametrize(
    ("option", "quiet"), [("--always-flush", 0), ("--posix-lock", 0), ("--flock", NOFLUSH)]
)
def test_flush_where_it_is_wanted_and_where_it_ends_locks(serve: Served, option: str, quiet: int) -> None:
    guest = serve(option)
    assert create_flags(guest, ROOT, b"f") & NOFLUSH == quiet


@pytest.mark.parametrize(
    ("choice", "plain", "direct"), [("never", 0, 0), ("direct", 0, PARALLEL), ("always", PARALLEL, PARALLEL)]
)
def test_parallel_direct_writes(serve: Served, choice: str, plain: int, direct: int) -> None:
    guest = serve("--parallel-direct-writes", choice)
    assert create_flags(guest, ROOT, b"f") & PARALLEL == plain
    assert create_flags(guest, ROOT, b"g", os.O_RDWR | os.O_DIRECT) & PARALLEL == direct
    assert open_flags(guest, guest.walk("f"), os.O_RDWR) & PARALLEL == plain
    assert open_flags(guest, guest.walk("f"), os.O_RDWR | os.O_DIRECT) & PARALLEL == direct


def test_fopen_is_what_linux_calls_it() -> None:
    assert (Fopen.NOFLUSH, Fopen.PARALLEL_DIRECT_WRITES) == (NOFLUSH, PARALLEL)


@pytest.mark.parametrize("allowed", [False, True])
def test_direct_io_has_the_hosts_rules_if_it_is_allowed(
    serve: Served, tmp_path: Path, allowed: bool
) -> None:
    guest = serve(*(["--allow-direct-io"] if allowed else []))
    (tmp_path / "f").write_bytes(bytes(8192))
    nodeid = guest.walk("f")
    try:
        os.close(os.open(tmp_path / "f", os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the tests has no O_DIRECT")
    fh = guest.open(nodeid, os.O_RDWR | os.O_DIRECT)
    args = wire.READ_IN.pack(fh, 1, 100, 0, 0, os.O_RDWR | os.O_DIRECT, 0)
    assert guest.queue.ask("READ", nodeid, args, pages=100).error == (EINVAL if allowed else 0)
    args = wire.WRITE_IN.pack(fh, 1, 100, 0, 0, os.O_RDWR | os.O_DIRECT, 0)
    assert guest.queue.ask("WRITE", nodeid, args, data=bytes(100)).error == (EINVAL if allowed else 0)


# ---- writeback


@pytest.mark.parametrize("how", ["open", "create"])
def test_writeback_reads_what_was_opened_for_writing(serve: Served, tmp_path: Path, how: str) -> None:
    """Linux fills the rest of a page that is written in part."""
    (tmp_path / "f").write_bytes(b"content")
    for options, readable in (((), False), (("--writeback",), True)):
        guest = serve(*options)
        nodeid = guest.walk("f")
        if how == "open":
            fh = guest.open(nodeid, os.O_WRONLY)
        else:
            entry, fh = guest.create(ROOT, b"new" + bytes(str(readable), "ascii"), os.O_WRONLY)
            nodeid = entry.nodeid
            guest.write(nodeid, fh, 0, b"content")
        if readable:
            assert guest.read(nodeid, fh, 0, 100) == b"content"
        else:
            with refused(EBADF):
                guest.read(nodeid, fh, 0, 100)


def test_writeback_only_counts_once_it_is_agreed(serve: Served, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    guest = serve("--writeback", flags=LINUX_FLAGS & ~Init.WRITEBACK_CACHE)
    nodeid = guest.walk("f")
    with refused(EBADF):
        guest.read(nodeid, guest.open(nodeid, os.O_WRONLY), 0, 100)
    guest.init()
    nodeid = guest.walk("f")
    assert guest.read(nodeid, guest.open(nodeid, os.O_WRONLY), 0, 100) == b"content"


@pytest.mark.parametrize("writeback", [False, True])
def test_who_says_where_an_append_goes(serve: Served, tmp_path: Path, writeback: bool) -> None:
    guest = serve(*(["--writeback"] if writeback else []))
    (tmp_path / "f").write_bytes(b"0123456789")
    nodeid = guest.walk("f")
    fh = guest.open(nodeid, os.O_WRONLY | os.O_APPEND)
    guest.write(nodeid, fh, 4, b"--", flags=os.O_WRONLY | os.O_APPEND)
    assert (tmp_path / "f").read_bytes() == (b"0123--6789" if writeback else b"0123456789--")


def test_writeback_sends_its_times(serve: Served, tmp_path: Path) -> None:
    """fuse_flush_times: the guest's mtime holds; a ctime can't be set and is now."""
    guest = serve("--writeback")
    entry, fh = guest.create(ROOT, b"f", os.O_WRONLY)
    guest.write(entry.nodeid, fh, 0, b"x", write_flags=abi.WRITE_CACHE)
    attr = guest.setattr(
        entry.nodeid, Fattr.MTIME | Fattr.CTIME | Fattr.FH, fh=fh, mtime=1_000_000_000, mtime_ns=123_456_789
    )
    assert (attr.mtime, attr.mtimensec) == (1_000_000_000, 123_456_789)
    assert (tmp_path / "f").stat().st_mtime_ns == 1_000_000_000_123_456_789
    assert attr.ctime > 1_700_000_000


# ---- zero-message opens: fh 0 stands for the file itself


@pytest.fixture
def zero(serve: Served, tmp_path: Path) -> Guest:
    """A guest that need not open files."""
    if os.geteuid() != 0:
        pytest.skip("only root may let guests go without opening")
    return serve("--zero-message-open", cache="always")


def test_opens_are_refused_for_ever(zero: Guest, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert not agreed(zero) & Init.ATOMIC_O_TRUNC  # the open that would tell does not come
    with refused(ENOSYS):
        zero.open(zero.walk("f"))
    with refused(ENOSYS):
        zero.flush(zero.walk("f"), 0)
    zero.release(zero.walk("f"), 0)
    zero.release(ROOT, zero.opendir(ROOT), "RELEASEDIR")


def test_what_linux_does_without_opening(zero: Guest, tmp_path: Path) -> None:
    entry, fh = zero.create(ROOT, b"f", os.O_WRONLY, 0o400)
    assert fh == 0
    nodeid = entry.nodeid
    assert zero.write(nodeid, 0, 3, b"abc") == 3
    assert zero.write(nodeid, 0, 0, b"++", flags=os.O_WRONLY | os.O_APPEND) == 2
    assert zero.write(nodeid, 0, 0, b"s", flags=os.O_WRONLY | os.O_SYNC) == 1
    assert zero.read(nodeid, 0, 0, 100) == b"s\0\0abc++"
    zero.fsync(nodeid, 0)
    zero.fallocate(nodeid, 0, 0, 10000)
    assert zero.getattr(nodeid, 0).size == 10000
    assert zero.truncate(nodeid, 4, 0).size == 4
    assert zero.lseek(nodeid, 0, 1, os.SEEK_HOLE) == 4
    other, _ = zero.create(ROOT, b"copy", os.O_WRONLY, 0o600)
    assert zero.copy_file_range(nodeid, 0, 0, other.nodeid, 0, 0, 100) == 4
    assert zero.read(other.nodeid, 0, 0, 100) == b"s\0\0a"
    assert zero.statx(nodeid, fh=0).size == 4
    nameless, fh = zero.tmpfile(ROOT)
    assert fh == 0
    assert zero.write(nameless.nodeid, 0, 0, b"data") == 4
    zero.link(nameless.nodeid, ROOT, b"named")
    assert (tmp_path / "named").read_bytes() == b"data"
    assert (tmp_path / "f").read_bytes() == b"s\0\0a"
    with refused(EISDIR):
        zero.read(ROOT, 0, 0, 100)


def test_files_in_use_outlive_their_names(zero: Guest, tmp_path: Path) -> None:
    for remove in (
        lambda: zero.unlink(ROOT, b"f"), lambda: zero.rename(ROOT, b"other", ROOT, b"f"),
        lambda: (tmp_path / "f").unlink(),
    ):  # fmt: skip
        (tmp_path / "f").write_bytes(b"old")
        (tmp_path / "other").write_bytes(b"new")
        nodeid = zero.walk("f")
        remove()
        zero.write(nodeid, 0, 1, b"--")
        assert zero.read(nodeid, 0, 0, 10) == b"o--"
        zero.forget(nodeid)


def test_what_is_kept_open_only_reads_and_is_bounded(daemon: StartDaemon, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may let guests go without opening")
    program = tmp_path / "program"
    served = daemon(tmp_path, cache="always", options=("--zero-message-open",))
    with guests_of(served) as start:
        guest = start()
        guest.init()
        entry, _ = guest.create(ROOT, b"program", os.O_RDWR, 0o755)
        guest.write(entry.nodeid, 0, 0, b"#!/bin/sh\nexit 3\n")
        assert guest.read(entry.nodeid, 0, 0, 2) == b"#!"
        # Were a descriptor that writes still open, this would be ETXTBSY.
        assert subprocess.run([program]).returncode == 3
        before = len(served.descriptors())
        for number in range(400):
            (tmp_path / str(number)).write_bytes(b"x")
            assert guest.read(guest.walk(str(number)), 0, 0, 9) == b"x"
        assert len(served.descriptors()) <= before + 400 + 256  # an anchor each, and what is kept open
        for number in range(400):
            guest.forget(guest.walk(str(number)), 2)
        assert eventually(lambda: len(served.descriptors()) <= before)
        assert guest.read(entry.nodeid, 0, 0, 2) == b"#!"


def test_special_and_unknown_files_are_not_opened(zero: Guest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link"):
        nodeid = zero.walk(name)
        with refused(EBADF):
            zero.read(nodeid, 0, 0, 100)
        with refused(EBADF):
            zero.write(nodeid, 0, 0, b"x")
    with refused(ESTALE):
        zero.read(12345, 0, 0, 100)
    with refused(ESTALE):
        zero.copy_file_range(12345, 0, 0, ROOT, 0, 0, 100)


def test_files_are_read_removed_and_forgotten_by_several_queues(daemon: StartDaemon, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may let guests go without opening")
    served = daemon(tmp_path, cache="always", options=("--zero-message-open",))
    wrong: list[object] = []

    def work(guest: Operations, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(300):
            name = b"%d" % choose.randrange(20)
            try:
                entry, _ = guest.create(ROOT, name, os.O_RDWR)
                guest.write(entry.nodeid, 0, 0, name)
                found = guest.read(entry.nodeid, 0, 0, 10)
                if found not in (b"", name):
                    wrong.append((name, found))
                if choose.random() < 0.3:
                    guest.unlink(ROOT, name)
                guest.forget(entry.nodeid, choose.choice((1, 1, 2)))
            except OSError as problem:
                if problem.errno not in (ENOENT, ESTALE):
                    wrong.append(problem)

    with guests_of(served) as start:
        guest = start(request_queues=3)
        guest.init()
        threads = [Thread(target=work, args=(guest.on(1 + n), n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        guest.destroy()
        assert held(served) == []
        guest.init()


def test_a_guest_that_can_only_open_does(serve: Served, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    guest = serve("--zero-message-open", cache="always", flags=LINUX_FLAGS & ~Init.NO_OPEN_SUPPORT)
    nodeid = guest.walk("f")
    assert guest.read(nodeid, guest.open(nodeid), 0, 9) == b"data"
    with refused(EBADF):
        guest.read(nodeid, 0, 0, 9)


def test_files_are_opened_where_closing_may_fail(serve: Served, overlay: Path) -> None:
    (overlay / "f").write_bytes(b"data")
    guest = serve("--zero-message-open", cache="always", share=overlay)
    nodeid = guest.walk("f")
    assert guest.read(nodeid, guest.open(nodeid), 0, 9) == b"data"
