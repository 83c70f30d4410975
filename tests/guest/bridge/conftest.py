"""Fixtures of tests that mount: a daemon and its directory, mounted, for all tests of a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import Mounted, force_unmount, missing, mounting, peer_missing

# A test that makes a mount hang ends with an error, not never.
HANGS_AFTER_S = 200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what can't be mounted here, and say why."""
    reason = missing()
    for item in items:
        if reason and item.path.name.startswith("test_mount_"):
            item.add_marker(pytest.mark.skip(reason=reason))


# daemon, its options, options of `vfsd mount`
VARIANTS = {
    "vfsd": ("vfsd", (), ()),
    "vfsd-queues-4": (
        "vfsd",
        ("--num-request-queues", "4"),
        ("--queues", "4", "--threads", "4", "--order", "crosvm"),
    ),
    "vfsd-queue-of-8": ("vfsd", (), ("--queue-size", "8", "--threads", "1", "--order", "libkrun")),
    "qemu-virtiofsd": ("qemu-virtiofsd", (), ()),
}


@pytest.fixture(scope="module", params=VARIANTS)
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A daemon's directory, mounted, in each variant."""
    peer, serve, options = VARIANTS[request.param]
    if reason := peer_missing(peer):
        pytest.skip(reason)
    with mounting(tmp_path_factory.mktemp("mount"), peer, serve, options) as it:
        yield it


@pytest.fixture(scope="module", params=["vfsd", "qemu-virtiofsd"])
def peer(request: pytest.FixtureRequest) -> str:
    """The name of a daemon."""
    name: str = request.param
    if reason := peer_missing(name):
        pytest.skip(reason)
    return name


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount at; free of mounts afterwards, however the test has ended."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    timer = threading.Timer(HANGS_AFTER_S, force_unmount, [directory])
    timer.daemon = True
    timer.start()
    yield directory
    timer.cancel()
    force_unmount(directory)


@pytest.fixture(autouse=True)
def nothing_hangs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Errors instead of waiting for ever, for tests that use `mounted` in their own process."""
    if "mounted" not in request.fixturenames:
        yield
        return
    it: Mounted = request.getfixturevalue("mounted")
    timer = threading.Timer(HANGS_AFTER_S, force_unmount, [it.root])
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
