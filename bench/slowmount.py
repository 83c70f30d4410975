"""A directory mounted by the slow file system, in a process of its own (vfsd_bench.slowfs)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfsd.guest.bridge import mounting

from .model import NotOffered


class SlowMount:
    """One that is there. source: what it shows. directory: where."""

    def __init__(self, process: subprocess.Popen[str], source: Path, directory: Path) -> None:
        self.source = source
        self.directory = directory
        self._process = process

    def set_delay(self, operation: str, delay_us: int) -> None:
        """From now on requests of that operation, or of `ALL`, take so many microseconds more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{operation} {delay_us}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


@contextmanager
def slow_mount(source: Path, directory: Path, delay_us: int) -> Iterator[SlowMount]:
    """Mount a directory so that each of its operations takes that long. Both are made. NotOffered."""
    if os.geteuid() != 0 or not os.path.exists(mounting.DEVICE):
        raise NotOffered(f"needs root and {mounting.DEVICE}")
    for path in (source, directory):
        path.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "vfsd_bench.slowfs", str(source), str(directory), str(delay_us)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != "READY\n":
            raise NotOffered("the slow file system could not be mounted")
        yield SlowMount(process, source, directory)
    finally:
        with contextlib.suppress(OSError):
            mounting.unmount(str(directory), mounting.MNT_DETACH)
        process.send_signal(signal.SIGTERM)
        process.wait()
        process.stdin.close()
        process.stdout.close()
