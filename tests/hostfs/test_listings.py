"""Directories of file systems with names and positions as no local one has them, by a real mount of each."""

import os
from collections.abc import Iterator
from errno import EINVAL, ENAMETOOLONG
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon

from . import listfs
from .test_by_name import mounted

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse"),
]

FILES = 1500  # more than one getdents64(2) of the daemon's returns
TOP = 1 << 63
SLOTS = 256  # LISTINGS of _slots.pxd: so many open directories have what is left of their last reading
LONG = [20, 256, 255, 300, 20, 1000, 1000, 700, 20, 512]


def short_names() -> list[bytes]:
    return listfs.names_of([20] * FILES)


@pytest.fixture
def far(daemon: StartDaemon, tmp_path: Path) -> Iterator[Daemon]:
    """Its share's positions are of 2^63 and more."""
    with listfs.served(tmp_path / "share", [20] * FILES, TOP, 7919):
        yield daemon(tmp_path / "share")


@pytest.fixture
def long(daemon: StartDaemon, tmp_path: Path) -> Iterator[Daemon]:
    with listfs.served(tmp_path / "share", LONG):
        yield daemon(tmp_path / "share")


@pytest.mark.parametrize("plus", [False, True], ids=["READDIR", "READDIRPLUS"])
def test_positions_beyond_those_of_lseek(far: Daemon, plus: bool) -> None:
    with guests_of(far) as start:
        guest = start()
        guest.init()
        assert [dirent.name for dirent in guest.listing(ROOT, plus=plus)] == short_names()
        fh = guest.opendir(ROOT)
        found = guest.readdir(ROOT, fh, plus=plus)
        assert found[0].off == TOP
        # Back to a position of before, and to the end twice.
        again = guest.readdir(ROOT, fh, found[9].off, plus=plus)
        assert [dirent.name for dirent in again[:3]] == short_names()[10:13]
        last = TOP + (FILES - 1) * 7919
        assert guest.readdir(ROOT, fh, last, plus=plus) == guest.readdir(ROOT, fh, last, plus=plus) == []
        assert guest.readdir(ROOT, fh, last - 7919, plus=plus)[0].name == short_names()[-1]
        with refused(EINVAL):
            guest.readdir(ROOT, fh, last + 1, plus=plus)


def test_more_open_directories_than_are_remembered(far: Daemon) -> None:
    """Two share a place: each has to find its own way back."""
    with guests_of(far) as start:
        guest = start()
        guest.init()
        handles = [guest.opendir(ROOT) for _ in range(SLOTS + 1)]
        first, second = handles[0], handles[-1]
        found: dict[int, list[bytes]] = {first: [], second: []}
        offsets = {first: 0, second: 0}
        for _ in range(15):
            for fh in (first, second):
                part = guest.readdir(ROOT, fh, offsets[fh])
                found[fh] += [dirent.name for dirent in part]
                offsets[fh] = part[-1].off
        assert found[first] == found[second] == short_names()[: len(found[first])]


def test_positions_beyond_those_of_lseek_in_a_mount(far: Daemon, tmp_path: Path) -> None:
    with mounted(far, tmp_path / "mnt") as mnt:
        assert sorted(os.listdir(mnt)) == sorted(os.fsdecode(name) for name in short_names())


@pytest.mark.parametrize("plus", [False, True], ids=["READDIR", "READDIRPLUS"])
def test_names_that_are_too_long_are_left_out(long: Daemon, plus: bool) -> None:
    names = listfs.names_of(LONG)
    fitting = [name for name in names if len(name) <= 255]
    assert os.listdir(long.shared) == [os.fsdecode(name) for name in names]
    with guests_of(long) as start:
        guest = start()
        guest.init()
        for size in (700, 4096):  # some, and all in one reply
            assert [dirent.name for dirent in guest.listing(ROOT, plus=plus, size=size)] == fitting
        for name in names:
            if name in fitting:
                assert guest.lookup(ROOT, name).attr.mode & 0o777 == 0o644
            else:
                with refused(ENAMETOOLONG):
                    guest.lookup(ROOT, name)
    left_out = len(names) - len(fitting)
    assert f", {2 * left_out} times a name too long for a guest was left out" in long.log


def test_only_names_that_are_too_long(daemon: StartDaemon, tmp_path: Path) -> None:
    with listfs.served(tmp_path / "share", [1000] * 200), guests_of(daemon(tmp_path / "share")) as start:
        guest: Guest = start()
        guest.init()
        assert guest.listing(ROOT) == []
