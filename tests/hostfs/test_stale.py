"""Inodes of which the host's file system says ESTALE: once, or for ever as its server has other ones now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from errno import ESTALE
from pathlib import Path
from typing import NamedTuple

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon

from . import stalefs

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
)

Use = Callable[[Guest, int], object]

# Of a nodeid of the file or directory that it is for, each by way of the inode's own descriptor.
OF_FILE: dict[str, Use] = {
    "OPEN": lambda guest, file: guest.open(file),
    "GETATTR": lambda guest, file: guest.getattr(file),
    "SETATTR": lambda guest, file: guest.truncate(file, 0),
    "LINK": lambda guest, file: guest.link(file, ROOT, b"new"),
}
OF_DIRECTORY: dict[str, Use] = {
    "LOOKUP": lambda guest, directory: guest.lookup(directory, b"below"),
    "OPENDIR": lambda guest, directory: guest.opendir(directory),
    "RENAME from": lambda guest, directory: guest.rename(directory, b"below", ROOT, b"new"),
    "RENAME to": lambda guest, directory: guest.rename(ROOT, b"file", directory, b"new"),
}


class Place(NamedTuple):
    mount: stalefs.Mounted
    guest: Guest


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with (
        stalefs.mounted(tmp_path / "share") as mount,
        Daemon(tmp_path / "share") as daemon,
        guests_of(daemon) as start,
    ):
        guest = start()
        guest.init()
        yield Place(mount, guest)


@pytest.mark.parametrize("use", OF_FILE)
def test_a_file_that_the_server_has_replaced_is_found_again(place: Place, use: str) -> None:
    """Linux looks the path up again upon ESTALE, once: by then its number must lead to what has it now."""
    old = place.guest.walk("file")
    place.mount.order("replace")
    with refused(ESTALE):
        OF_FILE[use](place.guest, old)
    new = place.guest.walk("file")
    assert new != old
    assert place.guest.getattr(new).ino == stalefs.FILE
    assert place.guest.read(new, place.guest.open(new), 0, 10) == b"1"
    assert place.guest.walk("file") == new


@pytest.mark.parametrize("use", OF_DIRECTORY)
def test_a_directory_that_the_server_has_replaced_is_found_again(place: Place, use: str) -> None:
    old = place.guest.walk("dir")
    place.mount.order("replace")
    with refused(ESTALE):
        OF_DIRECTORY[use](place.guest, old)
    new = place.guest.walk("dir")
    assert new != old
    assert place.guest.getattr(place.guest.lookup(new, b"below").nodeid).ino == stalefs.BELOW


def test_what_is_stale_once_stays_what_it_is(place: Place) -> None:
    file = place.guest.walk("file")
    place.mount.order("GETATTR")
    with refused(ESTALE):
        place.guest.getattr(file)
    assert place.guest.walk("file") == file
    assert place.guest.getattr(file).ino == stalefs.FILE


def test_the_host_walks_a_path_again_by_itself(place: Place) -> None:
    """retry_estale() of fs/namei.c: nothing of that is for a guest to see, nor for the daemon to do."""
    file = place.guest.walk("file")
    for operation in ("LOOKUP", "OPEN"):
        place.mount.order(operation)
        assert place.guest.lookup(ROOT, b"file").nodeid == file
        assert place.guest.read(file, place.guest.open(file), 0, 10) == b"0"
    place.mount.order("LOOKUP")
    directory = place.guest.walk("dir")
    assert place.guest.lookup(directory, b"below").attr.ino == stalefs.BELOW
