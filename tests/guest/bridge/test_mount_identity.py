"""Owners, modes, ACLs and rights of what other users do, through the mount and on the host's own."""

import ctypes
import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, mounting

from vfsd.guest.bridge.mounting import unmount

IDENTITY = Path(__file__).resolve().parents[2] / "linux" / "workloads" / "identity.py"


def answer_of(directory: Path) -> Any:
    directory.mkdir()
    done = subprocess.run([sys.executable, IDENTITY, directory], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def differences(found: Any, expected: Any) -> dict[str, tuple[object, object]]:
    """What is not the same in two answers, found and expected."""
    return {
        f"{part} {name}": (found[part].get(name), expected[part].get(name))
        for part in ("errors", "seen")
        for name in found[part] | expected[part]
        if found[part].get(name) != expected[part].get(name)
    }


@pytest.fixture(scope="module")
def acl_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    options = ("--posix-acl", "--security-label=auto", "--modcaps=+setfcap")
    with mounting(tmp_path_factory.mktemp("acl"), "vfsd", options) as it:
        os.chmod(it.share, 0o755)
        yield it


def test_other_users_find_what_the_host_has(acl_mounted: Mounted, tmp_path: Path) -> None:
    expected = answer_of(tmp_path / "host")
    found = answer_of(acl_mounted.root / "mount")
    assert differences(found, expected) == {}


def test_getfacl_shows_what_setfacl_has_set(acl_mounted: Mounted) -> None:
    (acl_mounted.root / "dir").mkdir(0o750)
    acl_mounted.run("setfacl", "-m", "u:1234:rwx,g:4321:r-x,d:u:99:rw-", "dir")
    shown = acl_mounted.run("getfacl", "-n", "dir")
    for entry in ("user:1234:rwx", "group:4321:r-x", "mask::rwx", "default:user:99:rw-"):
        assert entry in shown
    (acl_mounted.root / "dir" / "file").touch()
    host = subprocess.run(
        ["getfacl", "-n", "--omit-header", "dir/file"], cwd=acl_mounted.share, capture_output=True, text=True
    )
    assert host.stdout == acl_mounted.run("getfacl", "-n", "--omit-header", "dir/file")
    assert "user:99:rw-" in host.stdout


class IdmappedMount:
    """A second mount of a directory, on which ids SHOWN and after stand for STORED and after."""

    STORED, SHOWN, COUNT = 1000, 5000, 10
    OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
    CLONE, EMPTY_PATH, ATTR_IDMAP = 1, 0x1000, 0x100000

    def __init__(self, source: Path, target: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.target = target
        holder = subprocess.Popen(
            ["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdin is not None and holder.stdout is not None
        try:
            holder.stdin.write(b"x")
            holder.stdin.flush()
            assert holder.stdout.read(1) == b"x"  # it has its user namespace
            for file in ("uid_map", "gid_map"):
                ids = f"{self.STORED} {self.SHOWN} {self.COUNT}"
                Path(f"/proc/{holder.pid}/{file}").write_text(ids)
            with open(f"/proc/{holder.pid}/ns/user", "rb") as namespace:
                tree = self._call(self.OPEN_TREE, -100, os.fsencode(source), self.CLONE)
                attr = struct.pack("=QQQQ", self.ATTR_IDMAP, 0, 0, namespace.fileno())
                self._call(self.MOUNT_SETATTR, tree, b"", self.EMPTY_PATH, attr, len(attr))
            self._call(self.MOVE_MOUNT, tree, b"", -100, os.fsencode(target), 4)
            os.close(tree)
        finally:
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()

    def _call(self, number: int, *arguments: int | bytes) -> int:
        result: int = self._libc.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def __enter__(self) -> Path:
        return self.target

    def __exit__(self, *exc: object) -> None:
        unmount(str(self.target))


def as_user(uid: int, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    argv = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--", *command]
    return subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=30)


def test_an_idmapped_mount_stores_its_own_ids(acl_mounted: Mounted, tmp_path: Path) -> None:
    (acl_mounted.root / "ids").mkdir()
    (acl_mounted.root / "ids").chmod(0o777)
    os.chown(acl_mounted.root / "ids", IdmappedMount.STORED, IdmappedMount.STORED)
    host = acl_mounted.share / "ids"
    place = tmp_path / "idmapped"
    place.mkdir()
    with IdmappedMount(acl_mounted.root / "ids", place) as mapped:
        making = "echo x >file; mkdir dir; ln -s t link; mkfifo fifo; cat file"
        done = as_user(5001, mapped, "sh", "-c", making)
        assert done.stdout == "x\n", done.stderr
        for name in ("file", "dir", "link", "fifo"):
            assert (os.lstat(host / name).st_uid, os.lstat(host / name).st_gid) == (1001, 1001)
            assert (os.lstat(mapped / name).st_uid, os.lstat(mapped / name).st_gid) == (5001, 5001)
        os.chown(mapped / "file", 5002, 5003)
        assert (os.stat(host / "file").st_uid, os.stat(host / "file").st_gid) == (1002, 1003)
        assert "too large" in as_user(7, mapped, "touch", "not").stderr  # EOVERFLOW
        with pytest.raises(OSError) as info:
            os.chown(mapped / "file", 7, 7)
        assert info.value.errno in (errno.EINVAL, errno.EOVERFLOW)
        assert not (host / "not").exists()
