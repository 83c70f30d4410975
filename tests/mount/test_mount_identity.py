"""Owners, modes, ACLs and rights of what other users do, through the mount and on the host's own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, mounting

IDENTITY = Path(__file__).resolve().parent.parent / "guest" / "workloads" / "identity.py"


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
    with mounting(tmp_path_factory.mktemp("acl"), "vfsd", ("--posix-acl", "--security-label=auto")) as it:
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
