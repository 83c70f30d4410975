"""Which changes of another guest are seen at once, in each cache mode (docs/caching.md).

One guest looks, another changes, the first looks again. Who looks is our driver, or the kernel's FUSE
client. Times are a minute here, so that what is not seen at once is not seen by chance either.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guests import Daemon
from mounts import MountCommand

from vfsd.guest import mount
from vfsd.guest.face.filesystem import Filesystem

MINUTE = ("--timeout", "60", "--negative-timeout", "60")


class View(NamedTuple):
    """What a guest is asked."""

    content: Callable[[], bytes]
    size: Callable[[], int]
    mode: Callable[[], int]
    new: Callable[[], bool]
    old: Callable[[], bool]
    names: Callable[[], list[str]]


def of_driver(fs: Filesystem) -> View:
    return View(
        lambda: fs.read_bytes("/file"), lambda: fs.stat("/file").st_size, lambda: fs.stat("/file").st_mode,
        lambda: fs.exists("/new"), lambda: fs.exists("/old"), lambda: sorted(fs.listdir("/")),
    )  # fmt: skip


def of_kernel(root: Path) -> View:
    file = root / "file"
    return View(
        file.read_bytes, lambda: file.stat().st_size, lambda: file.stat().st_mode,
        (root / "new").exists, (root / "old").exists, lambda: sorted(os.listdir(root)),
    )  # fmt: skip


# In this order: reading lets a guest ask for attributes again.
CHANGES: dict[str, Callable[[Filesystem], object]] = {
    "size": lambda fs: fs.truncate("/file", 100),
    "mode": lambda fs: fs.chmod("/file", 0o600),
    "new": lambda fs: fs.mkdir("/new"),
    "old": lambda fs: fs.unlink("/old"),
    "names": lambda fs: fs.mkdir("/listed"),
    "content": lambda fs: fs.write_bytes("/file", b"second"),
}
SEEN: dict[str, set[str]] = {
    "never": {"content", "size", "mode", "new", "old", "names"},
    "auto": {"content", "new", "names"},
    "metadata": {"content"},
    "always": set(),
}
OPTIONS = {"never": (), "auto": ("--timeout", "60"), "metadata": MINUTE, "always": MINUTE}


@contextlib.contextmanager
def looking(kind: str, daemon: Daemon, place: Path) -> Iterator[View]:
    if kind == "driver":
        with mount(daemon.socket) as fs:
            yield of_driver(fs)
        return
    command = MountCommand(daemon.socket, place)
    try:
        yield of_kernel(place)
        assert command.end() == 0, command.log
    finally:
        command.kill()


@pytest.mark.parametrize("kind", ["driver", "kernel"])
@pytest.mark.parametrize("cache", SEEN)
def test_what_another_guest_does_is_seen(cache: str, kind: str, tmp_path: Path, place: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(b"first!")
    (share / "old").touch()
    daemon = Daemon(share, cache=cache, options=OPTIONS[cache])
    try:
        with looking(kind, daemon, place) as view, mount(daemon.socket) as other:
            before = {change: look() for change, look in view._asdict().items()}
            seen = set()
            for change, make in CHANGES.items():
                make(other)
                if getattr(view, change)() != before[change]:
                    seen.add(change)
        # Linux may ask sooner than it has to.
        assert seen == SEEN[cache] or (kind == "kernel" and seen > SEEN[cache])
    finally:
        daemon.stop()
