"""File systems mounted below the share: announced to the guest, each inode its own."""

import contextlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from errno import EACCES, EBUSY, ESTALE, EXDEV
from pathlib import Path
from typing import NamedTuple

import pytest
from fuse.fixtures import guests_of
from fuse.ops import LINUX_FLAGS, refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon

from vfsd.sandbox import landlock

from .test_by_name import mounted

SUBMOUNTS = 1 << 27
ATTR_SUBMOUNT = 1

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MountHost = Callable[..., None]


@pytest.fixture
def mount_host(tmp_path: Path) -> Iterator[MountHost]:
    """mount(8) with these arguments; all of them are gone after the test."""
    made: list[Path] = []

    def mount(*arguments: str, at: Path) -> None:
        if not at.exists():
            at.mkdir()
        done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, timeout=20)
        if done.returncode:
            pytest.skip(f"the machine does not let us mount: {done.stderr}")
        made.append(at)

    yield mount
    for path in reversed(made):
        subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True, timeout=20)


@pytest.fixture
def places(tmp_path: Path, mount_host: MountHost) -> Path:
    """A share with one and two, the same file system twice; three, another; plain, none.

    What is mounted later shows in a server's mount namespace if the share's mount is a shared one, as all are
    where systemd runs.
    """
    share = tmp_path / "share"
    mount_host("-t", "tmpfs", "vfsd-test", at=share)
    mount_host("--make-shared", at=share)
    (share / "plain").mkdir()
    mount_host("-t", "tmpfs", "vfsd-test", at=share / "one")
    (share / "one" / "file").write_bytes(b"first")
    (share / "one" / "dir").mkdir()
    mount_host("--bind", str(share / "one"), at=share / "two")
    mount_host("-t", "tmpfs", "vfsd-test", at=share / "three")
    (share / "three" / "dir").mkdir()
    mount_host("--bind", str(share / "plain"), at=share / "bound")
    (share / "bound file").touch()
    mount_host("--bind", str(share / "one" / "file"), at=share / "bound file")
    return share


@pytest.fixture
def served(places: Path, daemon: StartDaemon) -> Daemon:
    """one and two have one st_dev on the host, bound has that of the share."""
    assert (places / "one").stat().st_dev == (places / "two").stat().st_dev
    assert (places / "bound").stat().st_dev == places.stat().st_dev
    return daemon(places)


@contextlib.contextmanager
def guest_of(daemon: Daemon, flags: int = LINUX_FLAGS) -> Iterator[Guest]:
    with guests_of(daemon) as start:
        guest = start()
        assert bool(guest.init(flags=flags).flags & SUBMOUNTS) == bool(flags & SUBMOUNTS)
        yield guest


def marked(guest: Guest, parent: int = ROOT) -> set[bytes]:
    """The names whose entries are marked, in a listing and by LOOKUP alike."""
    listed, looked_up = set(), set()
    for dirent in guest.listing(parent, plus=True):
        assert dirent.entry is not None
        entry = guest.lookup(parent, dirent.name)
        assert entry.nodeid == dirent.entry.nodeid and entry.attr.ino == dirent.entry.attr.ino
        listed |= {dirent.name} if dirent.entry.attr.flags & ATTR_SUBMOUNT else set()
        looked_up |= {dirent.name} if entry.attr.flags & ATTR_SUBMOUNT else set()
    assert listed == looked_up
    return listed


def test_directories_that_are_mounts_are_marked(served: Daemon) -> None:
    with guest_of(served) as guest:
        assert marked(guest) == {b"one", b"two", b"three", b"bound"}
        assert marked(guest, guest.walk("one")) == marked(guest, guest.walk("plain")) == set()
        assert guest.getattr(guest.walk("one")).flags == 0


def test_every_place_has_inodes_of_its_own(served: Daemon) -> None:
    with guest_of(served) as guest:
        paths = ["plain", "bound", "one", "two", "one/file", "two/file", "bound file", "one/dir", "three/dir"]
        found = {path: guest.walk(path) for path in paths}
        assert len(set(found.values())) == len(paths)
        for path, nodeid in found.items():
            assert guest.getattr(nodeid).ino == (served.shared / path).stat().st_ino
            assert guest.walk(path) == nodeid


def test_nothing_is_said_to_a_guest_that_knows_none(served: Daemon) -> None:
    with guest_of(served, LINUX_FLAGS & ~SUBMOUNTS) as guest:
        assert marked(guest) == set()
        assert guest.walk("one/file") != guest.walk("two/file")


@pytest.mark.parametrize("option", ["--no-announce-submounts", "-ono_announce_submounts"])
def test_not_announced(places: Path, daemon: StartDaemon, option: str) -> None:
    with guests_of(daemon(places, options=[option])) as start:
        guest = start()
        assert not guest.init().flags & SUBMOUNTS
        assert marked(guest) == set()
        assert guest.getattr(guest.walk("one/file")).ino == (places / "one" / "file").stat().st_ino


def test_mounts_come_and_go(served: Daemon, mount_host: MountHost) -> None:
    plain = served.shared / "plain"
    (plain / "covered").touch()
    with guest_of(served) as guest:
        before = guest.lookup(ROOT, b"plain")
        assert not before.attr.flags & ATTR_SUBMOUNT
        mount_host("-t", "tmpfs", "vfsd-test", at=plain)
        (plain / "inside").write_bytes(b"new")
        during = guest.lookup(ROOT, b"plain")
        assert during.attr.flags & ATTR_SUBMOUNT and during.nodeid != before.nodeid
        assert during.attr.ino == plain.stat().st_ino
        assert [d.name for d in guest.listing(during.nodeid)] == [b"inside"]
        assert [d.name for d in guest.listing(before.nodeid)] == [b"covered"], "what the guest holds"
        inside = guest.lookup(during.nodeid, b"inside").nodeid
        subprocess.run(["umount", "--lazy", plain], check=True)
        after = guest.lookup(ROOT, b"plain")
        assert after.nodeid == before.nodeid and not after.attr.flags & ATTR_SUBMOUNT
        assert guest.getattr(inside).size == 3, "a lazy unmount leaves what is in use"


class Below(NamedTuple):
    """What a guest knows of a mount."""

    top: int
    file: int
    directory: int


# What opens, makes, removes or moves something there.
OPENING: dict[str, Callable[[Guest, Below], object]] = {
    "OPEN": lambda guest, at: guest.open(at.file),
    "OPEN for writing": lambda guest, at: guest.open(at.file, os.O_WRONLY),
    "OPENDIR": lambda guest, at: guest.opendir(at.directory),
    "SETATTR": lambda guest, at: guest.truncate(at.file, 0),
    "CREATE": lambda guest, at: guest.create(at.directory, b"created"),
    "MKDIR": lambda guest, at: guest.mkdir(at.directory, b"made"),
    "MKNOD": lambda guest, at: guest.mknod(at.directory, b"fifo", stat.S_IFIFO | 0o600),
    "SYMLINK": lambda guest, at: guest.symlink(at.directory, b"link", b"target"),
    "LINK": lambda guest, at: guest.link(at.file, at.directory, b"other"),
    "RENAME": lambda guest, at: guest.rename(at.top, b"moved", at.directory, b"moved"),
    "UNLINK": lambda guest, at: guest.unlink(at.top, b"removed"),
    "RMDIR": lambda guest, at: guest.rmdir(at.top, b"empty"),
}


@pytest.fixture
def left(places: Path) -> Path:
    for name in ("file", "moved", "removed"):
        (places / "three" / name).write_bytes(b"three")
    (places / "three" / "empty").mkdir()
    return places


def below_what_is_taken_away(guest: Guest, share: Path) -> Below:
    below = Below(guest.walk("three"), guest.walk("three/file"), guest.walk("three/dir"))
    subprocess.run(["umount", "--lazy", share / "three"], check=True)
    return below


@pytest.mark.skipif(not landlock.available(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("sandbox", ["namespace", "none"])
def test_below_a_mount_that_was_taken_away_the_path_is_looked_up_again(
    left: Path, daemon: StartDaemon, sandbox: str
) -> None:
    """Landlock refuses what is not beneath the share any more; at its path there may be something else."""
    with guest_of(daemon(left, options=["--sandbox", sandbox])) as guest:
        below = below_what_is_taken_away(guest, left)
        for operation in OPENING.values():
            with refused(ESTALE):
                operation(guest, below)
            with refused(EACCES, ESTALE):  # who has no path to look up
                operation(guest, below)
        assert guest.getattr(below.file).size == 5


def test_linux_finds_what_was_below_a_mount_that_was_taken_away(
    places: Path, daemon: StartDaemon, mount_host: MountHost, tmp_path: Path
) -> None:
    """With names that it would keep for a day."""
    covered = places / "plain"
    for name in ("read", "written"):
        (covered / name).write_text("covered")
    mount_host("-t", "tmpfs", "vfsd-test", at=covered)
    for name in ("read", "written", "gone"):
        (covered / name).write_text("mounted")
    with mounted(daemon(places, cache="always"), tmp_path / "mnt") as mnt:
        seen = mnt / "plain"
        for name in ("read", "written", "gone"):
            assert (seen / name).stat().st_size == len("mounted")
        subprocess.run(["umount", "--lazy", covered], check=True)
        assert (seen / "read").read_text() == "covered"
        (seen / "written").write_text("by the guest")
        (seen / "made").mkdir()
        with pytest.raises(FileNotFoundError):
            (seen / "gone").read_text()
    assert sorted(os.listdir(covered)) == ["made", "read", "written"]
    assert (covered / "written").read_text() == "by the guest"


def test_below_a_mount_that_was_taken_away_all_works_where_there_is_no_landlock(
    left: Path, daemon: StartDaemon
) -> None:
    """As on the host, for who has it open."""
    with guest_of(daemon(left, options=["--inode-file-handles=prefer"])) as guest:
        below = below_what_is_taken_away(guest, left)
        for operation in OPENING.values():
            operation(guest, below)


def test_a_mount_nobody_holds_can_be_unmounted(served: Daemon) -> None:
    with guest_of(served) as guest:
        entry = guest.lookup(ROOT, b"three")
        assert subprocess.run(["umount", served.shared / "three"], capture_output=True).returncode != 0
        guest.forget(entry.nodeid)
        guest.statfs()  # hiprio is another queue, FORGET went before on this one
        subprocess.run(["umount", served.shared / "three"], check=True)


@pytest.mark.parametrize("handles", ["never", "prefer"])
def test_what_was_evicted_does_not_hold_a_mount(places: Path, daemon: StartDaemon, handles: str) -> None:
    for i in range(300):
        (places / "three" / f"file {i}").write_bytes(b"%d" % i)
    served = daemon(places, options=["--fd-budget", "64", "--inode-file-handles", handles])
    with guest_of(served) as guest:
        three = guest.walk("three")
        found = {d.name: d.entry.nodeid for d in guest.listing(three, plus=True) if d.entry is not None}
        for i in range(300):
            assert guest.getattr(found[b"file %d" % i]).size == len(str(i))
        guest.batch_forget((three, 1), *((nodeid, 1) for nodeid in found.values()))
        guest.statfs()
        subprocess.run(["umount", places / "three"], check=True)


def test_rename_and_link_do_not_cross(served: Daemon) -> None:
    with guest_of(served) as guest:
        one, two, file = guest.walk("one"), guest.walk("two"), guest.walk("one/file")
        with refused(EXDEV):
            guest.rename(one, b"file", two, b"other")
        with refused(EXDEV):
            guest.link(file, ROOT, b"link")
        with refused(EBUSY):
            guest.rmdir(ROOT, b"one")
        assert stat.S_ISDIR(guest.getattr(one).mode)
        assert guest.statfs(one) != guest.statfs(ROOT)
