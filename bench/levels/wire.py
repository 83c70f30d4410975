"""The level "wire": our driver against a vhost-user socket, without any kernel in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vfsd.fuse.opcodes import NAME
from vfsd.guest.device import Device

from .. import _floor
from .._load import Load
from .._measure import block_at
from ..client import Client
from ..daemons import Running, Target
from ..fixture import FILES, SMALL, SMALL_ENTRIES, Tree, written_wrong
from ..histogram import Histogram
from ..machine import Foreign
from ..model import FLOOR, Blocking, Caching, Cell, Errand, Failed, Inodes, NotOffered, Sample, Setting
from ..profiles import Profile
from ..steps import Order
from ..workloads import WORKLOADS, Workload, blocks_of
from . import blocking, caching, plan
from .driving import drive, expect_device, seed
from .place import Place

DEPTH_MAX = 128
SPARE_SLOTS = 8  # for what is asked beside a load


class WireLevel:
    """See vfsd_bench.model.Level."""

    name = "wire"

    def __init__(self, place: Place) -> None:
        self._place = place

    def missing(self) -> str | None:
        """Nothing is needed but the daemons."""
        return None

    def cells(self, profile: Profile) -> list[Cell]:
        return plan.cells(profile)

    def errands(self, profile: Profile) -> list[Errand]:
        return plan.errands(profile)

    @contextmanager
    def around(self, errand: Errand, target: Target) -> Iterator[None]:
        if errand.what != "read":
            yield
            return
        with blocking.slow_mount(self._place.trees[errand.setting.backing].base / f"slow-{target.name}"):
            yield

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[WireSession]:
        session = WireSession(target, running, setting, self._place)
        try:
            yield session
        finally:
            session.close()

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        workload = WORKLOADS[cell.workload]
        if workload.floor is None:
            raise NotOffered("no system calls do the same")
        with self._place.pinning.use(self._place.pinning.daemon):
            return floor(workload, self._place.trees[cell.setting.backing], seconds, warm)


class WireSession:
    """A daemon, and a device on it. See vfsd_bench.model.Session."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        self.target = target
        self.running = running
        self.setting = setting
        self.place = place
        self.tree = place.trees[setting.backing]
        self.device = self._connect()
        try:
            self.client = Client(self.device, self.tree, target.name, place.no_reply)
            with self.asking("while it was set up"):
                self.client.init(setting.writeback)
                self.client.file  # noqa: B018 - looked up, which makes its threads
            running.expect_threads()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> Device:
        try:
            with self.place.pinning.use(self.place.pinning.front):
                return Device.connect(
                    self.running.socket, queues=self.setting.queues, queue_size=self.setting.queue_size,
                    slots=DEPTH_MAX + SPARE_SLOTS, poll=self.setting.completions == "poll",
                    timeout_s=self.place.no_reply,
                )  # fmt: skip
        except OSError as problem:
            self.running.expect_alive("during the handshake")
            kind = NotOffered if problem.errno == errno.EINVAL else Failed
            raise kind(problem.strerror or str(problem)) from problem

    def close(self) -> None:
        """What does not answer is not waited for."""
        if self.device.gone is None and self.device.transport.in_flight:
            self.device.transport.abort(errno.ETIMEDOUT)
            self.running.kill()
        self.device.remove()

    @contextmanager
    def asking(self, when: str) -> Iterator[None]:
        """An error that a daemon answers in here is a failure of its own."""
        try:
            yield
        except OSError as problem:
            expect_device(self.device, self.running, when)
            raise Failed(f"answered {problem.strerror} {when}") from problem
        except Failed as problem:
            expect_device(self.device, self.running, when)
            raise Failed(f"{problem} {when}") from problem

    def load(self, name: str, depth: int) -> Load:
        """A workload, ready to run. Failed, NotOffered."""
        workload = WORKLOADS[name]
        self.client.depth = depth
        with self.asking(f"while {name} was set up"):
            program = workload.program(self.client)
        return Load(self.device.transport, program, depth, self.setting.queues)

    def drive(
        self, load: Load, name: str, seconds: float, ops_min: int = 0, whole: bool = False, seed: int = 0
    ) -> float:
        patience = self.place.no_reply
        return drive(self.device, self.running, load, name, patience, seconds, ops_min, whole, seed)

    def run(self, cell: Cell, seconds: float, warm: float) -> Sample:
        workload = WORKLOADS[cell.workload]
        if workload.direct and self.setting.backing == "memory":
            raise NotOffered("O_DIRECT means nothing in memory")
        load = self.load(cell.workload, cell.depth)
        each = 2 * cell.depth // self.setting.queues
        self.drive(load, cell.workload, warm, ops_min=each, whole=True)
        sample = self._measure(load, cell, seconds)
        with self.asking(f"at the end of {cell.workload}"):
            self.client.close_all()
        self.running.expect_threads()
        return sample

    def _measure(self, load: Load, cell: Cell, seconds: float) -> Sample:
        workload = WORKLOADS[cell.workload]
        before, cpu = self._counts(), self.running.cpu()
        others = Foreign()
        fresh = seed() if workload.writes else 0
        elapsed = self.drive(load, cell.workload, seconds, seed=fresh)
        used = self.running.cpu() - cpu
        share = others.share(used)
        if workload.writes:
            self._expect_written(load, workload, fresh)
        kicks, calls = (after - then for after, then in zip(self._counts(), before, strict=True))
        ops, requests, moved, _, _ = load.totals()
        sample = Sample(ops, elapsed, moved, requests, kicks, calls, used, share)
        sample.latencies(merged(load, self.setting.queues, 0))
        sample.steps = self._steps(load)
        return sample

    def _steps(self, load: Load) -> dict[str, dict[str, float]]:
        """Latencies of each request of an operation, when there is more than one."""
        found = {}
        for at, step in enumerate(load.program.steps):
            one = merged(load, self.setting.queues, 1 + at)
            if one.n and len(load.program.steps) > 1:
                name = f"{at + 1} {NAME.get(step.opcode, str(step.opcode))}"
                found[name] = {
                    "n": one.n,
                    "mean": one.mean,
                    "p50": one.percentile(50),
                    "p99": one.percentile(99),
                }
        return found

    def _counts(self) -> tuple[int, int]:
        """Kicks and calls so far, of all queues."""
        queues = [found for name, found in self.device.transport.counters().items() if name != "opcodes"]
        return sum(q["kicks"] for q in queues), sum(q["calls"] for q in queues)

    def _expect_written(self, load: Load, workload: Workload, fresh: int) -> None:
        """Failed: what was written is not in the file on the host."""
        file = load.program.file
        bits = file.blocks.bit_length() - 1
        queues = len(load.begun())
        items = {k * queues + q for q, n in enumerate(load.begun()) for k in range(min(n, file.blocks))}
        at = {block_at(i, bits) if workload.order == Order.SCATTERED else i % file.blocks for i in items}
        wrong = written_wrong(self.client.path("big"), fresh, file.block, sorted(at))
        if wrong is not None:
            raise Failed(
                f"WRITE was answered, but byte {wrong} of the file on the host is not what was written"
            )

    def inodes(self) -> Inodes:
        """Known by a listing with attributes."""
        self.client.expect_readdirplus("READDIRPLUS")
        before = self.running.resident()
        with self.asking("while many inodes were looked up"):
            known = self.client.list_all("known")
        if known < self.place.profile.known:
            raise Failed(f"gave nodeids for {known} of {self.place.profile.known} entries")
        return Inodes(known, self.running.resident() - before)

    def blocking(self, what: str) -> Blocking:
        return blocking.measure(self, what)

    def caching(self) -> Caching:
        return caching.measure(self)


def merged(load: Load, queues: int, which: int) -> Histogram:
    """Of all queues: operations (0) or a step (1 and up)."""
    total = Histogram.of(load.histogram(0, which))
    for queue in range(1, queues):
        total.add(Histogram.of(load.histogram(queue, which)))
    return total


def floor(workload: Workload, tree: Tree, seconds: float, warm: float) -> Sample:
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
            part = "large" if "10000" in workload.name else "small"
            count, entries = (1, 2 + tree.large) if part == "large" else (SMALL, 2 + SMALL_ENTRIES)
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
            took, raw = _floor.measure(
                workload.floor, seconds, warm, files=opened(files, os.O_RDONLY),
                scratch=opened(own, os.O_RDONLY), fd=opened(fd, flags), count=count, entries=entries,
                block=workload.block, blocks=blocks, size=tree.big,
                start=tree.big if workload.at_end else 0, scattered_order=workload.order == Order.SCATTERED,
            )  # fmt: skip
        except OSError as problem:
            raise NotOffered(f"the floor can't be measured: {problem.strerror}") from problem
    found = Histogram.of(raw)
    sample = Sample(found.n, took / 1e9, found.n * workload.block * (not workload.at_end))
    sample.daemon_cpu = sample.elapsed
    sample.foreign = others.share(0)
    sample.latencies(found)
    return sample
