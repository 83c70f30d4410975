"""What depends on the host behind the share: its disk after a sync, and a share that is one file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guests import Daemon, UmlGuest, disk

pytestmark = pytest.mark.uml

MIB = 1 << 20


@pytest.mark.skipif(disk.missing() is not None, reason=str(disk.missing()))
def test_sync_in_the_guest_reaches_the_hosts_disk(tmp_path: Path) -> None:
    """Seen on the block device itself, past every cache of the file system on it."""
    image, point = tmp_path / "image", tmp_path / "point"
    with (
        disk.loop_mount(image, point, 64),
        Daemon(point) as daemon,
        UmlGuest(daemon.socket, memory=192) as guest,
    ):
        guest.mount()
        marks = [os.urandom(16).hex() for _ in range(3)]
        for command, mark in zip(
            ("sync", f"sync -f {guest.share}", f"sync {guest.share}/f2"), marks, strict=True
        ):
            name = f"{guest.share}/f{marks.index(mark)}"
            guest.check(f"yes {mark} | head -c {4 * MIB} >{name}")
            found = image.read_bytes().count(mark.encode())
            whole = 4 * MIB // 33
            assert found < whole, "it was written without a sync"
            guest.check(command)
            found = image.read_bytes().count(mark.encode())
            # A mark that lies across two blocks may be torn.
            assert found >= whole - 4 * MIB // 4096, command


def test_linux_takes_every_root_for_a_directory(tmp_path: Path) -> None:
    """A share that is one file: not on a file; on a directory it is mounted, and all that is asked is EIO."""
    shared = tmp_path / "shared"
    shared.write_bytes(b"content")
    with Daemon(shared) as daemon, UmlGuest(daemon.socket, memory=128) as guest:
        found = guest.run(f"touch /tmp/file && mount -t virtiofs {guest.tag} /tmp/file")
        assert found.status != 0 and "not a directory" in found.output
        guest.mount()
        found = guest.run(f"cat {guest.share}")
        assert found.status != 0 and "Input/output error" in found.output
    assert shared.read_bytes() == b"content"
