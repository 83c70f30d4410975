"""Groups, umask, ACLs and set-id bits as our guest sends them where INIT agreed."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsd.fuse.abi import Init
from vfsd.guest import Filesystem
from vfsd.guest.client import acl

USER, GROUP, TEAM = 1234, 2345, 3456
NO_ID = 0xFFFFFFFF

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")


def pack(*entries: tuple[int, int, int]) -> bytes:
    return acl.HEADER.pack(acl.VERSION) + b"".join(acl.ENTRY.pack(*entry) for entry in entries)


DEFAULT = pack((1, 7, NO_ID), (2, 6, 777), (4, 5, NO_ID), (16, 7, NO_ID), (32, 5, NO_ID))


def owner(path: Path) -> tuple[int, int, str]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, oct(stat.S_IMODE(st.st_mode))


def make_all(fs: Filesystem, directory: str) -> list[str]:
    fs.mkdir(f"{directory}/d")
    fs.mknod(f"{directory}/n", stat.S_IFREG | 0o666)
    fs.symlink("t", f"{directory}/l")
    fs.write_bytes(f"{directory}/f", b"x")
    return ["d", "n", "l", "f"]


def test_the_group_of_the_directory_is_sent(mounted: Callable[..., Filesystem], shared: Path) -> None:
    fs = mounted(daemon=("xattr",))
    fs.stat("/")
    assert fs.conn.has(Init.CREATE_SUPP_GROUP) and fs.conn.has(Init.ALLOW_IDMAP)
    for name, mode, gid in (("team", 0o770, GROUP), ("set", 0o2770, TEAM)):
        (shared / name).mkdir()
        os.chown(shared / name, 0, TEAM)
        os.chmod(shared / name, mode)
        with fs.as_user(USER, GROUP), pytest.raises(PermissionError):
            fs.mkdir(f"/{name}/x")
        with fs.as_user(USER, GROUP, [1, TEAM]):
            for made in make_all(fs, f"/{name}"):
                assert owner(shared / name / made)[:2] == (USER, gid)
            file = fs.open(f"/{name}/f", "rb")
            assert file.read() == b"x"
            file.close()


def test_umask_and_acls_are_the_daemons_and_the_guests(
    mounted: Callable[..., Filesystem], shared: Path
) -> None:
    fs = mounted(daemon=("posix-acl", "security-label"))
    fs.stat("/")
    assert fs.conn.has(Init.POSIX_ACL) and fs.conn.has(Init.SECURITY_CTX) and fs.conn.has(Init.DONT_MASK)
    fs.umask = 0o027
    os.chmod(shared, 0o777)
    fs.mkdir("/plain", 0o777)
    fs.mkdir("/acl", 0o777)
    assert owner(shared / "plain")[2] == "0o750"
    fs.setxattr("/acl", acl.DEFAULT, DEFAULT)
    fs.mkdir("/acl/d", 0o777)
    fs.mknod("/acl/n", stat.S_IFREG | 0o666)
    assert owner(shared / "acl/d")[2] == "0o775" and owner(shared / "acl/n")[2] == "0o664"
    assert fs.getxattr("/acl/d", acl.DEFAULT) == os.getxattr(shared / "acl/d", os.fsdecode(acl.DEFAULT))
    # Closed to all but one group, which only the ACL names.
    fs.mkdir("/closed", 0o700)
    access = pack((1, 7, NO_ID), (4, 0, NO_ID), (8, 7, TEAM), (16, 7, NO_ID), (32, 0, NO_ID))
    fs.setxattr("/closed", acl.ACCESS, access)
    with fs.as_user(USER, GROUP), pytest.raises(PermissionError):
        fs.listdir("/closed")
    with fs.as_user(USER, GROUP, [TEAM]):
        for made in make_all(fs, "/closed"):
            assert owner(shared / "closed" / made)[:2] == (USER, GROUP)
        assert sorted(fs.listdir("/closed")) == ["d", "f", "l", "n"]
        with pytest.raises(PermissionError) as refused:
            fs.setxattr("/closed", acl.ACCESS, access)
        assert refused.value.errno == errno.EPERM


@pytest.mark.parametrize(("who", "left"), [([], "0o755"), ([TEAM], "0o2755")])
def test_setgid_goes_when_who_is_not_in_the_group_sets_an_acl(
    mounted: Callable[..., Filesystem], shared: Path, who: list[int], left: str
) -> None:
    fs = mounted(daemon=("posix-acl",))
    (shared / "f").touch()
    os.chown(shared / "f", USER, TEAM)
    os.chmod(shared / "f", 0o2755)
    with fs.as_user(USER, GROUP, who):
        fs.setxattr("/f", acl.ACCESS, pack((1, 7, NO_ID), (4, 5, NO_ID), (32, 5, NO_ID)))
    assert owner(shared / "f")[2] == left


def test_the_daemon_takes_set_id_bits_and_capabilities(
    mounted: Callable[..., Filesystem], shared: Path
) -> None:
    fs = mounted(daemon=("xattr",))
    fs.stat("/")
    assert fs.conn.has(Init.HANDLE_KILLPRIV_V2)
    changes: dict[str, Callable[[str], object]] = {
        "write": lambda path: fs.write_bytes(path, b"new"),
        "truncate": lambda path: fs.truncate(path, 1),
        "chown": lambda path: fs.chown(path, -1, GROUP),
    }
    for uid, kept in ((0, {"write": "0o6777", "truncate": "0o6777", "chown": "0o777"}), (USER, {})):
        for what, change in changes.items():
            name = f"{what}-{uid}"
            (shared / name).write_bytes(b"program")
            os.chown(shared / name, USER, GROUP)
            os.chmod(shared / name, 0o6777)
            os.setxattr(shared / name, "security.capability", struct.pack("<5I", 0x02000001, 0x2000, 0, 0, 0))
            with fs.as_user(uid, GROUP):
                change(f"/{name}")
            assert owner(shared / name) == (USER, GROUP, kept.get(what, "0o777"))
            assert os.listxattr(shared / name) == []


@pytest.mark.parametrize(
    ("uid", "gids", "wanted", "granted"),
    [
        (1, {9}, 7, True), (2, {9}, 6, True), (2, {9}, 1, False), (3, {4}, 4, True), (3, {4}, 5, False),
        (3, {4, 8}, 6, True), (3, {8}, 1, False), (5, {9}, 4, True), (5, {9}, 2, False),
    ],
)  # fmt: skip
def test_an_acl_is_read_as_the_kernel_does(uid: int, gids: set[int], wanted: int, granted: bool) -> None:
    entries = acl.parse(
        pack((1, 7, NO_ID), (2, 7, 2), (4, 5, NO_ID), (8, 7, 8), (16, 6, NO_ID), (32, 4, NO_ID))
    )
    assert acl.allows(entries, 1, 4, (uid, gids), wanted) is granted


@pytest.mark.parametrize("value", [b"", b"\2\0\0", b"\1\0\0\0", b"\2\0\0\0\1"])
def test_what_is_no_acl_is_an_error(value: bytes) -> None:
    with pytest.raises(ValueError):
        acl.parse(value)
