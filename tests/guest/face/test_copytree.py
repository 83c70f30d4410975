"""vfsd guest cp: trees between the host and a share, and within a share, as cp -a copies them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import Daemon, StartDaemon

from vfsd.guest import Filesystem, mount
from vfsd.guest.face.copytree import CHUNK, Files, TreeCopy
from vfsd.guest.face.hostfiles import HostFiles

from . import oddtree

DIRECTIONS = ["to the share", "from the share", "within the share"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


@pytest.fixture
def served(daemon: StartDaemon, shared: Path) -> Daemon:
    return daemon(shared, options=("--xattr", "--posix-acl"))


@pytest.fixture
def fs(served: Daemon) -> Iterator[Filesystem]:
    with mount(served.socket) as mounted:
        yield mounted


class Sides:
    """A copy in one direction, and the host's view of both of its ends."""

    def __init__(self, direction: str, fs: Filesystem, tmp_path: Path) -> None:
        host, share = HostFiles(), tmp_path / "shared"
        outside = tmp_path / "outside"
        outside.mkdir()
        self.told: list[tuple[str, str]] = []
        source: Files = host if direction == "to the share" else fs
        target: Files = host if direction == "from the share" else fs
        self.source_dir = outside if source is host else share
        self.target_dir = outside if target is host else share
        self._prefix = {id(host): str(outside), id(fs): ""}
        self.source = source
        self.target = target
        self.in_between = lambda _count: None

    def copy(self, source: str, target: str) -> None:
        told = lambda path, why: self.told.append((path, why))  # noqa: E731
        copy = TreeCopy(self.source, self.target, told, lambda count: self.in_between(count))
        copy.copy(f"{self._prefix[id(self.source)]}/{source}", f"{self._prefix[id(self.target)]}/{target}")


@pytest.fixture(params=DIRECTIONS)
def sides(request: pytest.FixtureRequest, fs: Filesystem, tmp_path: Path) -> Sides:
    return Sides(request.param, fs, tmp_path)


def test_a_copy_is_what_cp_a_makes(sides: Sides, tmp_path: Path) -> None:
    source = sides.source_dir / "tree"
    oddtree.make(source)
    sides.copy("tree", "copy")
    subprocess.run(["cp", "-a", source, tmp_path / "expected"], check=True)
    assert oddtree.describe(sides.target_dir / "copy") == oddtree.describe(tmp_path / "expected")
    assert sides.told == []
    # Once more, over what is there.
    sides.copy("tree", "copy")
    assert oddtree.describe(sides.target_dir / "copy") == oddtree.describe(tmp_path / "expected")
    assert sides.told == []


def test_holes_take_no_room(sides: Sides) -> None:
    oddtree.make(sides.source_dir / "tree")
    sides.copy("tree", "copy")
    assert (sides.target_dir / "copy" / "hole").stat().st_blocks * oddtree.BLOCK < 1 << 20


@pytest.mark.parametrize("there", [None, 0o666])
def test_nobody_else_can_read_an_unfinished_copy(sides: Sides, there: int | None) -> None:
    source, target = sides.source_dir / "tree", sides.target_dir / "copy"
    source.mkdir(mode=0o700)
    (source / "key").write_bytes(bytes(range(256)) * (2 * CHUNK // 256))
    (source / "key").chmod(0o644)
    if there is not None:
        target.mkdir()
        target.chmod(0o777)
        (target / "key").write_text("before")
        (target / "key").chmod(there)
    seen = []

    def look(_count: int) -> None:
        seen.append(oct(stat.S_IMODE(target.stat().st_mode)))
        seen.append(oct(stat.S_IMODE((target / "key").stat().st_mode)))

    sides.in_between = look
    sides.copy("tree", "copy")
    assert seen == ["0o700", "0o600"] * (len(seen) // 2)
    assert len(seen) >= 2
    assert stat.S_IMODE((target / "key").stat().st_mode) == 0o644


def test_the_rest_goes_on(sides: Sides) -> None:
    source, target = sides.source_dir / "tree", sides.target_dir / "copy"
    source.mkdir()
    target.mkdir()
    for name in "abcd":
        (source / name).write_text(name)
    (target / "b").mkdir()
    (source / "c").unlink()
    (source / "c").mkdir()
    (target / "c").write_text("a file")
    sides.copy("tree", "copy")
    assert sorted(os.path.basename(path) for path, _ in sides.told) == ["b", "c"]
    assert {"Is a directory", "Not a directory"} == {why for _, why in sides.told}
    assert (target / "a").read_text() + (target / "d").read_text() == "ad"
    assert (target / "c").read_text() == "a file"


def test_a_symlink_in_the_way_is_never_followed(sides: Sides, tmp_path: Path) -> None:
    source, target = sides.source_dir / "tree", sides.target_dir / "copy"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "file").write_text("new")
    (source / "file").write_text("new")
    victim = sides.target_dir / "victim"
    victim.mkdir()
    (victim / "file").write_text("untouched")
    target.mkdir()
    (target / "file").symlink_to("../victim/file")
    (target / "dir").symlink_to("../victim")
    sides.copy("tree", "copy")
    assert (victim / "file").read_text() == "untouched"
    assert (target / "file").read_text() == "new" and not (target / "file").is_symlink()
    assert [why for _, why in sides.told] == ["Not a directory"]


def test_an_inherited_acl_does_not_stay(sides: Sides) -> None:
    (sides.source_dir / "tree").mkdir(mode=0o755)
    (sides.source_dir / "tree" / "file").write_text("x")
    subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", sides.target_dir], check=True)
    sides.copy("tree", "copy")
    assert oddtree.ACL not in os.listxattr(sides.target_dir / "copy" / "file")
    assert os.listxattr(sides.target_dir / "copy") == []


def test_a_file_is_not_copied_onto_itself_nor_a_tree_into_itself(fs: Filesystem, tmp_path: Path) -> None:
    sides = Sides("within the share", fs, tmp_path)
    (sides.source_dir / "file").write_text("kept")
    (sides.source_dir / "dir").mkdir()
    (sides.source_dir / "dir" / "inside").write_text("x")
    sides.copy("file", "file")
    assert "same file" in sides.told[0][1]
    sides.copy("dir", "dir/copy")
    assert (sides.source_dir / "file").read_text() == "kept"
    assert (sides.source_dir / "dir" / "copy" / "inside").read_text() == "x"
    assert not (sides.source_dir / "dir" / "copy" / "copy").exists()
    (sides.source_dir / "dir" / "later").write_text("x")
    sides.copy("dir", "dir/copy")  # which is found in the listing now
    assert sides.told[-1][1] == "is what is being copied to"
    assert (sides.source_dir / "dir" / "copy" / "later").exists()


def test_within_a_share_the_daemon_copies(fs: Filesystem, tmp_path: Path) -> None:
    sides = Sides("within the share", fs, tmp_path)
    (sides.source_dir / "file").write_bytes(os.urandom(3 * CHUNK))
    sides.copy("file", "copy")
    requests = fs.stats()["requests"]
    assert requests["COPY_FILE_RANGE_64"] and "READ" not in requests and "WRITE" not in requests
    assert (sides.source_dir / "copy").read_bytes() == (sides.source_dir / "file").read_bytes()


def test_a_lack_of_xattrs_is_told_once(daemon: StartDaemon, shared: Path, tmp_path: Path) -> None:
    served = daemon(shared)
    outside = tmp_path / "outside"
    oddtree.make(outside)
    told: list[tuple[str, str]] = []
    with mount(served.socket) as fs:
        TreeCopy(HostFiles(), fs, lambda *what: told.append(what), lambda _count: None).copy(
            str(outside), "/copy"
        )
    expected = oddtree.describe(outside, xattrs=False)
    # Without its ACL the file has what the ACL allowed at most to its group.
    assert oddtree.describe(shared / "copy", xattrs=False).keys() == expected.keys()
    assert len(told) == 1 and "user.colour" in told[0][1]


def test_a_daemon_that_goes_ends_the_copy(shared: Path, tmp_path: Path) -> None:
    served = Daemon(shared)
    (shared / "tree").mkdir()
    for number in range(50):
        (shared / "tree" / str(number)).write_bytes(bytes(2 * CHUNK))
    with mount(served.socket) as fs:
        sides = Sides("from the share", fs, tmp_path)
        sides.in_between = lambda _count: served.kill()
        with pytest.raises(OSError):
            sides.copy("tree", "copy")
        assert sides.told == []
