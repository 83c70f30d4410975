"""A daemon on the wire: our device on its socket, and how a load runs there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from vfsd.fuse.opcodes import NAME

from .._load import Load
from .._measure import PAGE, block_at
from ..client import Client
from ..daemons import Running, Target
from ..fixture import written_wrong
from ..histogram import Histogram
from ..machine import Foreign
from ..model import Cell, Failed, NotOffered, Sample, Setting
from ..steps import Order
from ..workloads import WORKLOADS, Workload
from .driving import connected, drive, expect_device, seed
from .place import Place

DEPTH_MAX = 128
SPARE_SLOTS = 8  # for what is asked beside a load


class WireSession:
    """A daemon, and a device on it. See vfsd_bench.level.Session."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        self.target = target
        self.running = running
        self.setting = setting
        self.place = place
        self.tree = place.trees[setting.backing]
        poll = setting.completions == "poll"
        self.device = connected(running, setting, place, poll, DEPTH_MAX + SPARE_SLOTS)
        try:
            self.client = Client(self.device, self.tree, target.name, place.no_reply)
            with self.asking("while it was set up"):
                self.client.init(setting.writeback)
                self.client.file  # noqa: B018 - looked up, which makes its threads
            running.expect_threads("while it was set up")
        except BaseException:
            self.close()
            raise

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
        if workload.block > self.device.transport.max_pages * PAGE:
            raise NotOffered("longer than a queue of that size can carry at a time")
        load = self.load(cell.workload, cell.depth)
        each = 2 * cell.depth // self.setting.queues
        self.drive(load, cell.workload, warm, ops_min=each, whole=True)
        sample = self._measure(load, cell, seconds)
        with self.asking(f"at the end of {cell.workload}"):
            self.client.close_all()
        self.running.expect_threads(f"in the middle of {cell.workload}")
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
        wrong = written_wrong(self.tree.source / self.target.name / "big", fresh, file.block, sorted(at))
        if wrong is not None:
            raise Failed(
                f"WRITE was answered, but byte {wrong} of the file on the host is not what was written"
            )


def merged(load: Load, queues: int, which: int) -> Histogram:
    """Of all queues: operations (0) or a step (1 and up)."""
    total = Histogram.of(load.histogram(0, which))
    for queue in range(1, queues):
        total.add(Histogram.of(load.histogram(queue, which)))
    return total
