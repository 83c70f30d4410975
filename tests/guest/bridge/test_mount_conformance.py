"""What POSIX says of a file system holds through the mount as on the host's own: case by case, equal."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests.filesystems import CannotMount, file_system
from mounts import mounting
from posixcases import QUICK_GROUPS, SUITE, assert_alike, on_host

ALL = ("one_path", "two_paths", "rights", "special_bits", "files", "local")  # minutes: VFSD_CONFORMANCE=all
SUITE_TAKES_AT_MOST_S = 180

# Immutable files, file capabilities and trusted.* are among the cases, and take what a guest is not given.
OPTIONS = ("--xattr", "--flock", "--posix-lock", "--modcaps=+linux_immutable:+setfcap:+sys_admin")

# Of a kind of file system.
EXCEPTIONS = {
    "tmpfs": {
        "local privileges zero range": "fuse_file_fallocate takes them away before tmpfs refuses",
    },
    "xfs": {
        "local fallocate mode 0x4[01]": "no such kinds in FUSE (fuse_file_fallocate)",
    },
}

KINDS = ("here", "tmpfs", "ext4", "xfs", "overlay")


@contextlib.contextmanager
def made(kind: str, directory: Path) -> Iterator[Path]:
    try:
        with file_system(kind, directory) as place:
            yield place
    except CannotMount as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize("kind", KINDS)
def test_cases_end_as_on_the_host(kind: str, tmp_path: Path) -> None:
    groups = QUICK_GROUPS + (("local",) if kind == "ext4" else ())
    if kind == "tmpfs" or os.environ.get("VFSD_CONFORMANCE") == "all":
        groups = ALL
    with made(kind, tmp_path) as place, mounting(place, "vfsd", OPTIONS) as mounted:
        own = place / "own"
        own.mkdir()
        host = on_host(own, groups, SUITE_TAKES_AT_MOST_S)
        output = mounted.workload(SUITE.name, mounted.root, *groups, timeout=SUITE_TAKES_AT_MOST_S)
    assert_alike(host, json.loads(output), EXCEPTIONS.get(kind, {}))
