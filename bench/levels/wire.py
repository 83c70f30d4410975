"""The level "wire": our driver against a vhost-user socket, without any kernel in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .. import _floor
from ..daemons import Running, Target
from ..fixture import FILES, SMALL, Tree
from ..histogram import Histogram
from ..level import Found
from ..machine import Foreign
from ..model import FLOOR, Cell, Errand, Failed, Memory, NotOffered, Sample, Setting
from ..profiles import Profile
from ..slowmount import slow_mount
from ..steps import Order
from ..workloads import WORKLOADS, Workload, blocks_of
from . import blocking, caching, plan
from .place import Place
from .session import WireSession

MANY_NEW = {"readdirplus-10000-new"}


class WireLevel:
    """See vfsd_bench.level.Level."""

    name = "wire"
    chunk = 12

    def __init__(self, place: Place) -> None:
        self._place = place

    def missing(self) -> str | None:
        """Nothing is needed but the daemons."""
        return None

    def left_out(self) -> list[str]:
        return []

    def rounds(self, profile: Profile) -> int:
        return profile.rounds

    def cells(self, profile: Profile) -> list[Cell]:
        return plan.cells(profile)

    def errands(self, profile: Profile) -> list[Errand]:
        return plan.errands(profile)

    def fresh(self, cell: Cell) -> bool:
        """Peers keep a descriptor for each inode: known ones and new ones may be too many together."""
        return cell.workload in MANY_NEW

    @contextmanager
    def around(self, errand: Errand, target: Target) -> Iterator[None]:
        if errand.what != "read":
            yield
            return
        base = self._place.trees[errand.setting.backing].base
        with slow_mount(base / blocking.SLOW_SOURCE, base / f"slow-{target.name}", 0) as mount:
            blocking.prepare_slow_file(mount)
            yield

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[WireErrands]:
        session = WireErrands(target, running, setting, self._place)
        try:
            yield session
        finally:
            session.close()

    def floor_cell(self, cell: Cell) -> Cell:
        """One thread, whatever the daemon's setting; only data takes more room with more under way."""
        depth = cell.depth if WORKLOADS[cell.workload].block else 1
        return Cell(Setting(backing=cell.setting.backing), cell.workload, depth)

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        workload = WORKLOADS[cell.workload]
        if workload.floor is None:
            raise NotOffered("no system calls do the same")
        with self._place.pinning.use(self._place.pinning.daemon):
            return floor(workload, self._place.trees[cell.setting.backing], seconds, warm, cell.depth)


class WireErrands(WireSession):
    """What is measured outside of cells. See vfsd_bench.level.Session."""

    def errand(self, what: str) -> Found:
        if what == "caching":
            return caching.measure(self)
        own = {"inodes": self._inodes, "handles": self._handles}
        return own[what]() if what in own else blocking.measure(self, what)

    def _inodes(self) -> Memory:
        """Known by a listing with attributes."""
        self.client.expect_readdirplus("READDIRPLUS")
        before = self.running.resident()
        with self.asking("while many inodes were looked up"):
            known = self.client.list_all("known")
        if known < self.place.profile.known:
            raise Failed(f"gave nodeids for {known} of {self.place.profile.known} entries")
        return Memory(known, self.running.resident() - before)

    def _handles(self) -> Memory:
        """Of files that are known, open many times each."""
        with self.asking("while many files were opened"):
            nodes = self.client.files().nodes
            before = self.running.resident()
            opened = self.client.opened(nodes, self.place.profile.opened)
            grown = self.running.resident() - before
            self.client.released(opened)
        return Memory(len(opened), grown)


def floor(workload: Workload, tree: Tree, seconds: float, warm: float, depth: int) -> Sample:
    """Bare system calls, on the same files."""
    assert workload.floor is not None
    own = tree.base / FLOOR
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        fd, count, entries = own / "file", FILES, 0
        flags = os.O_RDWR
        part = "files"
        if workload.floor.startswith("readdir"):
            words = workload.name.split("-")
            part = {"10": "small", "1000": "thousand"}.get(words[1], "large")
            count, entries = SMALL if part == "small" else 1, 2 + tree.entries(part)
            part += "-new" * workload.name.endswith("new")
        files = tree.part(part)
        if workload.block:
            fd = tree.part("big") if workload.floor == "read" else tree.own_big(FLOOR)
        elif workload.floor in ("getattr", "getxattr"):
            fd, flags = files / f"f{0:08x}", os.O_RDONLY
        flags |= os.O_DIRECT if workload.direct else 0
        blocks = blocks_of(tree.big, workload.block) if workload.block and not workload.at_end else 1
        others = Foreign()
        try:
            took, cpu, raw = _floor.measure(
                workload.floor, seconds, warm, files=opened(files, os.O_RDONLY),
                scratch=opened(own, os.O_RDONLY), fd=opened(fd, flags), count=count, entries=entries,
                block=workload.block, blocks=blocks, size=tree.big,
                start=tree.big if workload.at_end else 0, scattered_order=workload.order == Order.SCATTERED,
                depth=depth,
            )  # fmt: skip
        except OSError as problem:
            raise NotOffered(f"the floor can't be measured: {problem.strerror}") from problem
    found = Histogram.of(raw)
    sample = Sample(found.n, took / 1e9, found.n * workload.block * (not workload.at_end))
    sample.daemon_cpu = cpu / 1e9
    sample.foreign = others.share(0)
    sample.latencies(found)
    return sample
