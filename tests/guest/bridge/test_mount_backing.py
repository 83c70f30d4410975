"""Shares that lie on no disk, and daemons that are not root, in front of a real kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from guests import Daemon
from guests.filesystems import CannotMount, file_system
from mounts import MountCommand, force_unmount
from posixcases import QUICK_GROUPS, assert_alike, on_host
from test_mount_conformance import EXCEPTIONS

BUDGET = 64  # the least
USER = 65534
CASES_TAKE_AT_MOST_S = 600
DIRECTORIES, FILES = 12, 25  # in each


@dataclass
class Backing:
    """A share: where the host sees it, and how its daemon is started."""

    share: Path
    before: tuple[str, ...] = ()
    owner: int = -1


@contextlib.contextmanager
def overlay(place: Path, more: str) -> Iterator[Backing]:
    with file_system("overlay", place, more) as share:
        yield Backing(share)


@contextlib.contextmanager
def mounted(daemon: Daemon, at: Path) -> Iterator[Path]:
    at.mkdir()
    command = MountCommand(daemon.socket, at)
    try:
        yield at
    finally:
        # A daemon may have it open still.
        force_unmount(at)
        command.wait()


@contextlib.contextmanager
def fuse(place: Path) -> Iterator[Backing]:
    """What `vfsd mount` shows of another share."""
    (place / "origin").mkdir()
    with Daemon(place / "origin", options=["--xattr"]) as daemon, mounted(daemon, place / "place") as share:
        yield Backing(share)


@contextlib.contextmanager
def namespace(place: Path) -> Iterator[Backing]:
    """A tmpfs that was mounted in a user namespace, as the daemon was started there."""
    share = place / "place"
    share.mkdir()
    script = f'mount -t tmpfs -o mode=755 none {share}; exec "$@"'
    yield Backing(share, ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh"))


@contextlib.contextmanager
def user(place: Path) -> Iterator[Backing]:
    """Of a daemon that is not root: one that may enter any directory, so that it finds Python."""
    share = place / "place"
    share.mkdir()
    os.chown(share, USER, USER)
    words = f"setpriv --reuid={USER} --regid={USER} --clear-groups --inh-caps=+dac_override"
    yield Backing(share, (*words.split(), "--ambient-caps=+dac_override"), USER)


BACKINGS = {
    "overlay": lambda place: overlay(place, "index=off,nfs_export=off"),
    "overlay-nfs_export": lambda place: overlay(place, "index=on,nfs_export=on"),
    "fuse": fuse,
    "namespace": namespace,
    "user": user,
}


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest) -> Iterator[Backing]:
    with tempfile.TemporaryDirectory(prefix="vfsd-backing-") as name:
        os.chmod(name, 0o755)  # for who is not root
        try:
            with BACKINGS[request.param](Path(name)) as backing:
                yield backing
        except CannotMount as problem:
            pytest.skip(str(problem))


@contextlib.contextmanager
def front(backing: Backing, at: Path, *options: str) -> Iterator[tuple[Daemon, Path]]:
    # In a user namespace that is not its own the daemon can't make any for its servers.
    if "unshare" in backing.before:
        options = (*options, "--sandbox", "none")
    daemon = Daemon(backing.share, options=options, before=backing.before, owner=backing.owner)
    with daemon, mounted(daemon, at) as root:
        yield daemon, root


def make_files(root: Path) -> dict[str, str]:
    """Paths and contents."""
    made = {f"d{i}/file {j}": f"{i} {j}" for i in range(DIRECTORIES) for j in range(FILES)}
    for i in range(DIRECTORIES):
        (root / f"d{i}").mkdir()
    for name, content in made.items():
        (root / name).write_text(content)
    return made


def walk(root: Path) -> list[str]:
    """Every file, by a program that asks for each one's attributes."""
    words = ["find", ".", "-type", "f", "-size", "-2", "-printf", "%P\\n"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    return sorted(done.stdout.splitlines())


def test_more_files_than_descriptors(backing: Backing, tmp_path: Path) -> None:
    with front(backing, tmp_path / "mnt", "--fd-budget", str(BUDGET)) as (daemon, root):
        made = make_files(root)
        for _ in range(2):
            assert walk(root) == sorted(made)
            assert {name: (root / name).read_text() for name in made} == made
            held = [path for path in daemon.descriptors() if path.startswith(str(backing.share))]
            assert len(held) <= BUDGET + 16
        # What has moved is the same file still, also once all others have pushed it out.
        numbers = [(root / "d0" / f"file {j}").stat().st_ino for j in range(FILES)]
        for j in range(FILES):
            (root / "d0" / f"file {j}").rename(root / "d1" / f"moved {j}")
        walk(root)
        assert [(root / "d1" / f"moved {j}").stat().st_ino for j in range(FILES)] == numbers
        assert [(root / "d1" / f"moved {j}").read_text() for j in range(FILES)] == [
            f"0 {j}" for j in range(FILES)
        ]
        for i in range(DIRECTORIES):
            shutil.rmtree(root / f"d{i}")
        assert os.listdir(root) == []


@pytest.mark.parametrize("backing", ["overlay-nfs_export", "fuse"], indirect=True)
def test_cases_end_as_on_the_host(
    request: pytest.FixtureRequest, backing: Backing, tmp_path: Path
) -> None:
    every = os.environ.get("VFSD_CONFORMANCE") == "all"
    if "fuse" in request.node.name and not every:
        pytest.skip("one mount upon another takes a minute: VFSD_CONFORMANCE=all")
    groups = QUICK_GROUPS if every else ("files",)
    with front(backing, tmp_path / "mnt", "--xattr") as (_, root):
        (backing.share / "own").mkdir()
        host = on_host(backing.share / "own", groups, CASES_TAKE_AT_MOST_S)
        (root / "x").mkdir()
        assert_alike(host, on_host(root / "x", groups, CASES_TAKE_AT_MOST_S), EXCEPTIONS)
