"""Requests that vfsd lets its guest leave out, each by its switch, and what is seen all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.guest import Filesystem

from .conftest import Clock, requests

Mounted = Callable[..., Filesystem]
MIB = 1 << 20


@pytest.mark.parametrize(("options", "flushes"), [((), 0), (("always-flush",), 2)])
def test_a_close_is_told_only_where_it_matters(
    mounted: Mounted, options: tuple[str, ...], flushes: int
) -> None:
    fs = mounted(daemon=options)
    since = requests(fs)
    fs.write_bytes("/file", b"data")
    assert fs.read_bytes("/file") == b"data"
    assert since("FLUSH") == flushes
    assert since("RELEASE") == 2


def test_a_missing_name_is_kept_as_missing_for_its_timeout(
    mounted: Mounted, shared: Path, clock: Clock
) -> None:
    fs = mounted(daemon=("negative-timeout=2.5",))
    since = requests(fs)
    for _ in range(3):
        assert not fs.exists("/late")
    assert since("LOOKUP") == 1
    (shared / "late").write_bytes(b"host")
    clock.advance(2.4)
    assert not fs.exists("/late")
    clock.advance(0.2)
    assert fs.read_bytes("/late") == b"host"


def test_a_missing_name_is_asked_for_each_time_without_a_timeout(mounted: Mounted, shared: Path) -> None:
    fs = mounted(cache="always", daemon=("negative-timeout=0",))
    assert not fs.exists("/late")
    (shared / "late").touch()
    assert fs.exists("/late")


def test_what_the_guest_makes_of_a_missing_name_is_there_at_once(mounted: Mounted, shared: Path) -> None:
    fs = mounted(daemon=("negative-timeout=60",))
    for name in ("file", "dir", "link", "hard", "moved"):
        assert not fs.exists(f"/{name}")
    fs.write_bytes("/file", b"1")
    fs.mkdir("/dir")
    fs.symlink("file", "/link")
    fs.link("/file", "/hard")
    fs.rename("/hard", "/moved")
    assert fs.read_bytes("/file") == fs.read_bytes("/link") == fs.read_bytes("/moved") == b"1"
    assert sorted(fs.listdir("/")) == ["dir", "file", "link", "moved"] == sorted(os.listdir(shared))
    assert not fs.exists("/hard")


@pytest.mark.parametrize(
    ("cache", "options", "asked"),
    [("auto", (), 3), ("auto", ("symlink-cache=always",), 1), ("metadata", (), 1)],
)
def test_a_symlinks_target_is_kept(
    mounted: Mounted, shared: Path, clock: Clock, cache: str, options: tuple[str, ...], asked: int
) -> None:
    (shared / "link").symlink_to("one")
    fs = mounted(cache=cache, daemon=options)
    since = requests(fs)
    assert [fs.readlink("/link") for _ in range(3)] == ["one"] * 3
    assert since("READLINK") == asked
    (shared / "link").unlink()
    (shared / "link").symlink_to("two")
    clock.advance(100_000)
    assert fs.readlink("/link") == "two"  # another symlink, once the name is looked up again


def test_names_and_attributes_have_timeouts_of_their_own(
    mounted: Mounted, shared: Path, clock: Clock
) -> None:
    (shared / "file").touch()
    fs = mounted(daemon=("entry-timeout=10", "attr-timeout=0.25"))
    fs.stat("/file")
    clock.advance(0.2)
    since = requests(fs)
    fs.stat("/file")
    assert since("LOOKUP", "GETATTR") == 0
    clock.advance(0.1)
    fs.stat("/file")
    assert (since("LOOKUP"), since("GETATTR") > 0) == (0, True)
    clock.advance(10)
    fs.stat("/file")
    assert since("LOOKUP") == 1


def test_files_are_opened_without_a_request(mounted: Mounted, shared: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may let guests go without opening")
    (shared / "old").write_bytes(b"from the host")
    fs = mounted(cache="always", daemon=("zero-message-open",))
    since = requests(fs)
    for _ in range(3):
        assert fs.read_bytes("/old") == b"from the host"
    assert (since("OPEN"), since("READ"), since("RELEASE")) == (1, 1, 0)
    fs.write_bytes("/new", b"long enough")
    fs.write_bytes("/new", b"short")
    assert (shared / "new").read_bytes() == fs.read_bytes("/new") == b"short"
    with fs.open("/new", os.O_RDWR) as file:
        fs.unlink("/new")
        file.pwrite(b"and goes on", 5)
        assert file.pread(100, 0) == b"shortand goes on"
        fs.fsync(file)
    assert (since("OPEN"), since("FLUSH"), since("RELEASE")) == (1, 1, 0)


def test_what_is_written_back_waits_for_its_time(mounted: Mounted, shared: Path) -> None:
    fs = mounted(daemon=("writeback",))
    (shared / "old").write_bytes(b"o" * 10000)
    since = requests(fs)
    with fs.open("/new", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        for number in range(50):
            file.write(b"%04d\n" % number)
        assert since("WRITE") == 0
        assert fs.stat("/new").st_size == 250
    assert since("WRITE") == 1
    assert (shared / "new").read_bytes() == b"".join(b"%04d\n" % number for number in range(50))
    assert (shared / "new").stat().st_mtime_ns == fs.stat("/new").st_mtime_ns
    with fs.open("/old", os.O_WRONLY) as file:
        file.pwrite(b"new", 5000)
    assert (shared / "old").read_bytes() == b"o" * 5000 + b"new" + b"o" * 4997


@pytest.mark.parametrize(("queue_size", "requests_of_8_mib"), [(1024, 3), (2048, 2)])
def test_requests_are_as_large_as_the_queue_allows(
    mounted: Mounted, shared: Path, queue_size: int, requests_of_8_mib: int
) -> None:
    data = os.urandom(8 * MIB)
    fs = mounted(cache="never", queue_size=queue_size, max_pages_limit=65535, slots=16)
    since = requests(fs)
    fs.write_bytes("/large", data)
    assert (shared / "large").read_bytes() == data
    with fs.open("/large") as file:
        assert file.pread(8 * MIB, 0) == data
    assert (since("WRITE"), since("READ")) == (requests_of_8_mib, requests_of_8_mib)
