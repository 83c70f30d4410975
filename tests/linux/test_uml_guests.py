"""One daemon, several user-mode Linux guests one after the other, and other kinds of share."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import checks
import pytest
from guests import Daemon, StartDaemon, UmlGuest, eventually
from share import WORKLOADS, Share
from workloads import manifest

pytestmark = pytest.mark.uml

# What an allocator keeps differs by a few pages from run to run.
TOLERANCE_KIB = 256


def guest_is_gone(server: Daemon, idle: list[str]) -> bool:
    """Whether the daemon has heard of a guest's end: its server and its sockets are gone."""
    return eventually(
        lambda: not server.servers()
        and server.descriptors().count("socket") <= idle.count("socket")
    )


def test_ten_guests_one_after_the_other_leave_nothing_behind(
    daemon: StartDaemon, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    manifest.make_tree(shared / "tree", 300)
    expected = manifest.tree_sum(shared / "tree")
    server = daemon(shared)
    idle = server.descriptors()
    after: list[tuple[list[str], dict[str, int]]] = []
    for number in range(10):
        with UmlGuest(server.socket, memory=128, files=WORKLOADS) as guest:
            guest.mount()
            seen = json.loads(guest.workload("manifest.py", f"{guest.share}/tree", "times"))
            guest.check(f"echo {number} >>{guest.share}/log")
        assert seen == expected
        assert guest_is_gone(server, idle), server.descriptors()
        after.append((server.descriptors(), server.resident()))
    assert (shared / "log").read_text() == "".join(f"{number}\n" for number in range(10))
    assert Counter(after[9][0]) == Counter(after[1][0])
    for kind, size in after[9][1].items():
        assert size <= after[1][1][kind] + TOLERANCE_KIB, (kind, [memory for _, memory in after])


def test_guest_that_is_killed_leaves_a_daemon_for_the_next(
    daemon: StartDaemon, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    server = daemon(shared)
    idle = server.descriptors()
    with UmlGuest(server.socket, memory=128) as guest:
        guest.mount()
        guest.check(f"cd {guest.share}; (while :; do echo x >>busy; done) >/dev/null 2>&1 &")
        assert eventually(lambda: (shared / "busy").exists())
        guest.kill()
    assert guest_is_gone(server, idle), server.descriptors()
    with UmlGuest(server.socket, memory=128) as guest:
        guest.mount()
        guest.check(f"echo next >{guest.share}/next")
    assert (shared / "next").read_text() == "next\n"


def test_share_can_be_unmounted_and_mounted_again(daemon: StartDaemon, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    server = daemon(shared)
    with UmlGuest(server.socket, memory=128) as guest:
        for number in range(5):
            guest.mount()
            guest.check(f"mkdir {guest.share}/{number} && umount {guest.share}")
        guest.mount()
        assert guest.check(f"ls {guest.share}").split() == ["0", "1", "2", "3", "4"]


def test_share_on_tmpfs(daemon: StartDaemon) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared, Share(
        Path(shared),
        daemon,
        lambda server: UmlGuest(server.socket, files=WORKLOADS),
    ) as share:
        checks.smoke(share.ready())
