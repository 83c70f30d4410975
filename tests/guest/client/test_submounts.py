"""Submounts, announced by vfsd and by QEMU's virtiofsd: each place a superblock of its own."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfsd.guest import Device, Filesystem, mount_device
from vfsd.guest.client import objects
from vfsd.guest.client.files import sync_filesystem
from vfsd.guest.client.instances import SUBMOUNT_STEPS

from .conftest import StartPeer, requests

OPTIONS = {"vfsd": (), "qemu-virtiofsd": ("announce_submounts",)}
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def places(shared: Path, tmp_path: Path) -> Iterator[Path]:
    """In the share: one and two, the same file system mounted twice; three, another one."""
    made: list[Path] = []

    def mount_host(*arguments: str, at: Path) -> None:
        at.mkdir()
        subprocess.run(["mount", *arguments, str(at)], check=True, timeout=20)
        made.append(at)

    try:
        mount_host("-t", "tmpfs", "vfsd-test", at=shared / "one")
        (shared / "one" / "file").write_bytes(b"first")
        mount_host("--bind", str(shared / "one"), at=shared / "two")
        mount_host("-t", "tmpfs", "vfsd-test", at=shared / "three")
        (shared / "three" / "dir").mkdir()
        yield shared
    except subprocess.CalledProcessError as problem:
        pytest.skip(f"the machine does not let us mount: {problem}")
    finally:
        for path in reversed(made):
            subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=20)


@pytest.fixture(params=OPTIONS)
def device(request: pytest.FixtureRequest, places: Path, start: StartPeer) -> Iterator[Device]:
    found = Device.connect(start(request.param, options=OPTIONS[request.param]).socket)
    yield found
    found.remove()


@pytest.fixture
def fs(device: Device) -> Iterator[Filesystem]:
    with mount_device(device) as mounted:
        yield mounted


def test_a_submount_is_mounted_when_somebody_goes_there(fs: Filesystem) -> None:
    assert objects.alive()["superblocks"] == 1
    assert fs.read_bytes("/one/file") == b"first"
    assert objects.alive()["superblocks"] == objects.alive()["mounts"] == 2
    assert objects.alive()["connections"] == 1


def test_stat_alone_mounts_nothing(fs: Filesystem) -> None:
    assert fs.stat("/one").st_dev == fs.stat("/").st_dev
    fs.listdir("/one")
    assert fs.stat("/one").st_dev != fs.stat("/").st_dev


def test_each_submount_has_its_own_st_dev(fs: Filesystem) -> None:
    for name in ("one", "two", "three"):
        fs.listdir(f"/{name}")
    devices = [fs.stat(path).st_dev for path in ("/", "/one", "/two", "/three")]
    assert len(set(devices)) == 4
    assert fs.stat("/one/file").st_dev == devices[1]
    assert fs.stat("/three/..").st_dev == devices[0]


def test_the_same_file_system_twice_gives_two_st_dev_and_the_same_ino(fs: Filesystem, places: Path) -> None:
    assert fs.listdir("/one") == fs.listdir("/two") == ["file"]
    one, two = fs.stat("/one/file"), fs.stat("/two/file")
    assert one.st_dev != two.st_dev
    assert one.st_ino == two.st_ino == (places / "one" / "file").stat().st_ino


def test_the_same_nodeid_can_be_in_two_superblocks(fs: Filesystem) -> None:
    fs.listdir("/one")
    outside = fs.root.walk()[0].sb.root.children[b"one"].inode
    inside = fs.root.walk()[1].sb.root.inode
    assert outside is not inside
    assert outside.nodeid == inside.nodeid
    assert fs.sb.tree.by_nodeid.get(outside.nodeid) is not outside


def test_rename_and_link_do_not_cross_a_submount(fs: Filesystem) -> None:
    fs.write_bytes("/file", b"x")
    for call in (fs.rename, fs.link):
        with pytest.raises(OSError) as caught:
            call("/file", "/one/other")
        assert caught.value.errno == errno.EXDEV
    with pytest.raises(OSError) as caught:
        fs.rmdir("/one")
    assert caught.value.errno == errno.EBUSY


def test_copies_between_submounts_go_through_the_guest(fs: Filesystem) -> None:
    since = requests(fs)
    with fs.open("/one/file") as source, fs.open("/three/copy", "w") as target:
        assert fs.copy_file_range(source, target, 100) == 5
    assert since("COPY_FILE_RANGE", "COPY_FILE_RANGE_64") == 0
    assert fs.read_bytes("/three/copy") == b"first"


def test_syncfs_is_sent_for_the_root_and_for_every_submount(fs: Filesystem) -> None:
    for name in ("one", "two", "three"):
        fs.listdir(f"/{name}")
    since = requests(fs)
    fs.sync()
    if fs.conn.sync_fs:
        assert since("SYNCFS") == 4
    else:
        assert since("SYNCFS") == 1  # ENOSYS, remembered as success
    with fs.open("/one/file") as file:
        fs.syncfs(file)
    assert since("SYNCFS") == (5 if fs.conn.sync_fs else 1)


def test_syncfs_is_skipped_without_wait(fs: Filesystem) -> None:
    fs.listdir("/one")
    since = requests(fs)
    for mount in fs.root.walk():
        sync_filesystem(mount.sb, wait=False)
    assert since("SYNCFS") == 0


def test_the_last_user_forgets_a_submount_s_root(fs: Filesystem) -> None:
    since = requests(fs)
    fs.read_bytes("/one/file")
    nodeid = fs.root.walk()[1].sb.root.inode.nodeid
    forgotten = watch_forgets(fs)
    fs.umount("/one")
    inside = [entry for entry in forgotten if entry[0] != nodeid]
    assert inside and not [entry for entry in forgotten if entry[0] == nodeid]
    fs.drop_caches()  # the automount place goes
    assert [entry for entry in forgotten if entry[0] == nodeid] == [(nodeid, 1)]
    assert since("DESTROY") == 0
    assert fs.read_bytes("/one/file") == b"first"


def watch_forgets(fs: Filesystem) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    forget = fs.conn.forget

    def watched(nodeid: int, nlookup: int) -> None:
        seen.append((nodeid, nlookup))
        forget(nodeid, nlookup)

    fs.conn.forget = watched  # type: ignore[method-assign]
    return seen


def test_a_mounted_submount_keeps_its_parent_busy(fs: Filesystem) -> None:
    with fs.open("/one/file"):
        for arguments in ({"path": "/one"}, {}):
            with pytest.raises(OSError) as caught:
                fs.umount(**arguments)
            assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError):
        fs.umount()
    fs.umount("/one")
    assert objects.alive()["superblocks"] == 1


def test_two_mounts_of_a_device_automount_on_their_own(device: Device, fs: Filesystem) -> None:
    fs.listdir("/one")
    with mount_device(device) as other:
        other.listdir("/one")
        assert other.stat("/one").st_dev != fs.stat("/one").st_dev
        assert objects.alive()["superblocks"] == 3
    assert objects.alive()["superblocks"] == 2


def test_destroy_comes_once_after_all_submounts(device: Device) -> None:
    fs = mount_device(device)
    for name in ("one", "two", "three"):
        fs.listdir(f"/{name}")
    conn = fs.conn
    fs.close()
    assert {op.name: n for op, n in conn.requests.items()}["DESTROY"] == 1
    assert objects.alive() == dict.fromkeys(objects.KINDS, 0)


@pytest.mark.parametrize("step", SUBMOUNT_STEPS)
def test_an_automount_that_fails_at_any_step_leaks_nothing(fs: Filesystem, step: str) -> None:
    def steps(name: str) -> None:
        if name == step:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    fs.stat("/one")
    before = objects.alive()
    fs.root.automount_steps = steps
    with pytest.raises(OSError) as caught:
        fs.listdir("/one")
    assert caught.value.errno == errno.ENOMEM
    assert objects.alive() == before
    fs.root.automount_steps = lambda name: None
    assert fs.listdir("/one") == ["file"]


def test_submounts_are_seen_in_listings(fs: Filesystem) -> None:
    names: Callable[[], list[str]] = lambda: sorted(fs.listdir("/"))  # noqa: E731
    assert names() == ["one", "three", "two"]
    found = {top: sorted(files) for top, _, files in fs.walk("/")}
    assert found == {"/": [], "/one": ["file"], "/two": ["file"], "/three": [], "/three/dir": []}
    assert names() == ["one", "three", "two"]
