"""What POSIX says of a file system holds through the mount as on the host's own: case by case, equal."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import mounting
from posixcases import QUICK_GROUPS, SUITE, assert_alike, on_host

ALL = ("one_path", "two_paths", "rights", "special_bits", "files")  # minutes: VFSD_CONFORMANCE=all
SUITE_TAKES_AT_MOST_S = 180

EXCEPTIONS = {
    r"fallocate \d+ of \w+ by root mask \d+": "with ALLOW_IDMAP Linux does not say who asks: set-id bits go",
}

# kind: its mount options; "here" is where the tests' files are
KINDS = {"here": "", "tmpfs": "", "ext4": "loop", "xfs": "loop", "overlay": ""}


@contextlib.contextmanager
def file_system(kind: str, directory: Path) -> Iterator[Path]:
    """An empty directory of a file system of that kind."""
    place = directory / "place"
    place.mkdir()
    if kind == "here":
        yield place
        return
    source, options = Path("none"), KINDS[kind]
    if options == "loop":
        source = directory / "image"
        with source.open("wb") as image:
            image.truncate(320 << 20)
        try:
            subprocess.run([f"mkfs.{kind}", "-q", source], check=True, capture_output=True)
        except FileNotFoundError as problem:
            pytest.skip(f"there is no {problem.filename}")
    if kind == "overlay":
        # On a tmpfs: an upper directory may lie on overlayfs itself otherwise.
        base = directory / "base"
        base.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", base], check=True)
        layers = {name: base / name for name in ("lower", "upper", "work")}
        for layer in layers.values():
            layer.mkdir()
        options = ",".join(f"{name}dir={layer}" for name, layer in layers.items())
    words = ["mount", "-t", kind, *(("-o", options) if options else ()), source, place]
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        if done.returncode:
            pytest.skip(f"can't mount {kind}: {done.stderr.strip()}")
        yield place
    finally:
        for mounted in (place, directory / "base"):
            subprocess.run(["umount", mounted], check=False, capture_output=True)


@pytest.mark.parametrize("kind", KINDS)
def test_cases_end_as_on_the_host(kind: str, tmp_path: Path) -> None:
    groups = ALL if kind == "tmpfs" or os.environ.get("VFSD_CONFORMANCE") == "all" else QUICK_GROUPS
    with file_system(kind, tmp_path) as place, mounting(place, "vfsd", ("--xattr",)) as mounted:
        own = place / "own"
        own.mkdir()
        host = on_host(own, groups, SUITE_TAKES_AT_MOST_S)
        output = mounted.workload(SUITE.name, mounted.root, *groups, timeout=SUITE_TAKES_AT_MOST_S)
    assert_alike(host, json.loads(output), EXCEPTIONS)
