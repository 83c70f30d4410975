"""The level "dax": a file through the DAX window against requests, and against the host's own mapping.

Our driver maps it (`vfsd.guest`), as a kernel would; the floor copies out of the page cache. The full profile
has a Linux guest map it too, where one with a window is at hand.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from vfsd.guest import Filesystem, mount
from vfsd.guest.face.rawfile import RawFile

from .. import _copies
from ..daemons import Running, Target
from ..fixture import SEED
from ..histogram import Histogram
from ..level import Found, Session
from ..machine import Foreign
from ..mapped import MAPPED, Mapped
from ..model import Cell, Errand, Failed, NotOffered, PageCache, Sample, Setting
from ..profiles import Profile
from . import daxguest, wire
from .daxguest import DaxGuestSession
from .place import Place
from .session import WireSession

ORDER = "qemu-generic"  # the front end of QEMU's that has a window
REQUEST = "read-4k"  # what mapped-4k does without
SETTING = Setting("dax", completions="event", dax=True)  # as a guest learns of replies
PATH = "/common/big"


class DaxLevel:
    """See vfsd_bench.level.Level."""

    name = "dax"
    chunk = 12

    def __init__(self, place: Place) -> None:
        self._place = place

    def missing(self) -> str | None:
        return None

    def left_out(self) -> list[str]:
        why = daxguest.missing() if self._place.profile.name == "full" else None
        return [why] if why else []

    def rounds(self, profile: Profile) -> int:
        return profile.rounds

    def cells(self, profile: Profile) -> list[Cell]:
        found = [Cell(SETTING, name) for name in (REQUEST, *MAPPED)]
        if profile.name == "full" and daxguest.missing() is None:
            found += [Cell(daxguest.SETTING, name) for name in (REQUEST, daxguest.SCATTERED)]
        return found

    def fresh(self, cell: Cell) -> bool:
        return False

    def errands(self, profile: Profile) -> list[Errand]:
        return [Errand("pagecache", SETTING)]

    @contextmanager
    def around(self, errand: Errand, target: Target) -> Iterator[None]:
        yield

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[Session]:
        kind = DaxGuestSession if setting.guest else DaxSession
        session = kind(target, running, setting, self._place)
        try:
            yield session
        finally:
            session.close()

    def floor_cell(self, cell: Cell) -> Cell:
        return Cell(Setting("dax"), cell.workload)

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        row = MAPPED.get(cell.workload)
        if row is None:
            return wire.WireLevel(self._place).floor(cell, seconds, warm)
        path = self._place.trees[cell.setting.backing].part("big")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            copies(row, memoryview(memory), warm)
            return copies(row, memoryview(memory), seconds)


class DaxSession:
    """See vfsd_bench.level.Session. Its mounts are made when they are needed."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        self._target = target
        self._running = running
        self._setting = setting
        self._place = place
        self._stack = ExitStack()
        self._wire: WireSession | None = None
        self._file: memoryview | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.release()
        self._stack.close()
        if self._wire is not None:
            self._wire.close()  # last: it may kill a daemon that has not answered all

    def run(self, cell: Cell, seconds: float, warm: float) -> Sample:
        if cell.workload == REQUEST:
            if self._wire is None:
                self._wire = WireSession(self._target, self._running, self._setting, self._place)
            return self._wire.run(cell, seconds, warm)
        row = MAPPED[cell.workload]
        if self._file is None:
            fs = self._stack.enter_context(self._mounted("dax"))
            with fs.open(PATH) as file:
                self._file = file.mmap(0, fs.fstat(file).st_size)
        copies(row, self._file, warm)
        before = self._running.cpu()
        sample = copies(row, self._file, seconds)
        sample.daemon_cpu = self._running.cpu() - before
        return sample

    def _mounted(self, options: str) -> Filesystem:
        try:
            return mount(self._running.socket, options=options, order=ORDER)
        except OSError as problem:
            self._running.expect_alive("while it was mounted")
            raise NotOffered(problem.strerror or str(problem)) from problem

    def errand(self, what: str) -> Found:
        """How often a file that a guest has read is in memory."""
        assert what == "pagecache"
        path = self._place.trees[self._setting.backing].part("big")
        with self._mounted("dax=never") as plain, plain.open(PATH) as file:
            size = read_all(file)
            copied = len(file.file.inode.pages) * mmap.PAGESIZE
        with self._mounted("dax") as mapped, mapped.open(PATH) as file:
            read_all(file)
            own = len(file.file.inode.pages) * mmap.PAGESIZE
            assert mapped.device.window is not None
            shared = mapped.device.window.resident()
        if size != path.stat().st_size:
            raise Failed(f"a file of {path.stat().st_size} bytes was read as {size}")
        return PageCache(self._setting, self._target.name, size, copied, own, shared)


def read_all(file: RawFile) -> int:
    """Once, in pieces; how many bytes."""
    size = 0
    while data := file.read(1 << 20):
        size += len(data)
    return size


def copies(row: Mapped, memory: memoryview, seconds: float) -> Sample:
    """Failed: what was copied is not the file."""
    others = Foreign()
    elapsed, wrong, raw = _copies.measure(memory, row.block, row.scattered, seconds, SEED)
    if wrong:
        raise Failed(f"{wrong} pages of the mapped file are not what is in it")
    found = Histogram.of(raw)
    sample = Sample(found.n, elapsed / 1e9, found.n * row.block)
    sample.foreign = others.share(0)
    sample.latencies(found)
    return sample
