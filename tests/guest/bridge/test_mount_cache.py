"""Cache switches as the kernel's own FUSE client takes them: direct I/O, mappings, whole data."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import re
import sys
from pathlib import Path

import pytest
from guests import Daemon
from mounts import WORKLOADS, Mounted, mounting

from vfsd.fuse.opcodes import Opcode
from vfsd.guest import mount

PAGE = mmap.PAGESIZE
GUEST_WORKLOADS = Path(__file__).resolve().parents[2] / "linux" / "workloads"
FSX_STEPS = 2000


def fsx(it: Mounted) -> None:
    """Random operations, through mappings too, with a check of each."""
    seed = random.randrange(1 << 32)
    it.run(sys.executable, WORKLOADS / "fsx.py", f"fsx.{seed}", seed, FSX_STEPS)
    found = (it.share / f"fsx.{seed}").read_bytes()
    assert found == (it.share / f"fsx.{seed}.mirror").read_bytes(), f"on the host, seed {seed}"


def test_direct_io_has_the_rules_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "f").write_bytes(bytes(range(256)) * 64)
    try:
        os.close(os.open(tmp_path / "share" / "f", os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the tests has no O_DIRECT")
    with mounting(tmp_path, "vfsd", ("--allow-direct-io",)) as it:
        area = mmap.mmap(-1, 2 * PAGE)
        both = [os.open(place / "f", os.O_RDWR | os.O_DIRECT) for place in (it.root, it.share)]
        with memoryview(area) as view:
            for fd in both:
                assert os.preadv(fd, [view[:PAGE]], PAGE) == PAGE
                assert view[:PAGE] == bytes(range(256)) * 16
                assert os.preadv(fd, [view[:PAGE]], 4 * PAGE) == 0
                for wrong in ((view[1 : PAGE + 1], 1), (view[:100], 0)):
                    for call in (os.preadv, os.pwritev):
                        with pytest.raises(OSError) as found:
                            call(fd, [wrong[0]], wrong[1])
                        assert found.value.errno == errno.EINVAL, fd
        for fd in both:
            os.close(fd)


def test_shared_mappings_without_a_cache_where_they_are_allowed(tmp_path: Path) -> None:
    with mounting(tmp_path, "vfsd", ("--cache", "never")) as it:
        (it.root / "f").write_bytes(bytes(PAGE))
        with (it.root / "f").open("r+b") as file, pytest.raises(OSError) as found:
            mmap.mmap(file.fileno(), PAGE)
        assert found.value.errno == errno.ENODEV
    with mounting(tmp_path, "vfsd", ("--cache", "never", "--allow-mmap")) as it:
        (it.root / "f").write_bytes(bytes(PAGE))
        with (it.root / "f").open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as area:
            area[10:14] = b"data"
            area.flush()
            assert (it.share / "f").read_bytes()[10:14] == b"data"
        fsx(it)


def test_a_writeback_cache_keeps_data_sizes_and_times(tmp_path: Path) -> None:
    with mounting(tmp_path, "vfsd", ("--writeback",)) as it:
        (it.share / "old").write_bytes(b"o" * 10000)
        found = json.loads(it.run(sys.executable, GUEST_WORKLOADS / "writeback.py", "."))
        assert (it.share / "timed").stat().st_mtime_ns == found.pop("timed")
        assert (it.share / "dated").stat().st_mtime_ns == found.pop("dated")
        assert found == dict.fromkeys(found, True)
        fsx(it)


def test_a_close_reaches_a_file_system_that_may_have_something_to_report(tmp_path: Path) -> None:
    """A share on FUSE: each close of its guest's is one there, and so is that of the daemon's descriptor."""
    options = ("--always-flush", "--log-level", "debug")
    with mounting(tmp_path, "vfsd", options) as it, Daemon(it.root) as outer:
        with mount(outer.socket) as fs, fs.open("/file", os.O_WRONLY | os.O_CREAT) as file:
            file.write(b"data")
            asked = fs.conn.requests[Opcode.FLUSH]
        assert asked == 0 and fs.conn.requests[Opcode.FLUSH] == 1
        assert (it.share / "file").read_bytes() == b"data"
    (session,) = re.findall(r"the session had (.*FLUSH.*)", it.daemon.log)
    assert "FLUSH 2," in session


def test_files_without_opens_are_whole(tmp_path: Path) -> None:
    with mounting(tmp_path, "vfsd", ("--cache", "always", "--zero-message-open")) as it:
        fsx(it)
