"""A disk of its own for a share, whose blocks can be looked at."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


def missing() -> str | None:
    """Why no disk can be made here, or None."""
    if os.geteuid() != 0:
        return "only root may mount"
    if not os.path.exists("/dev/loop-control"):
        return "there are no loop devices"
    return None


@contextlib.contextmanager
def loop_mount(image: Path, point: Path, mebibytes: int) -> Iterator[None]:
    """A new ext4 in the file `image`, mounted at `point`; of its own it writes back after ten minutes."""
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop,commit=600", image, point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", point], check=True)
