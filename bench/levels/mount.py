"""The level "mount": the daemon's file system mounted on this host, by our driver and /dev/fuse."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfsd.guest.bridge import mounting
from vfsd.guest.bridge.device_mount import DeviceMount

from ..daemons import Running, Target
from ..model import Cell, Errand, Failed, NotOffered, Setting
from ..profiles import Profile
from ..tasks import Task
from . import programplan
from .driving import connected, expect_device
from .kernel import KernelLevel, KernelSession, here, run_here, spent
from .place import Place
from .stall import Stall


class MountLevel(KernelLevel):
    """A fresh daemon and a fresh mount for every cell: no cache has anything."""

    name = "mount"
    chunk = 1

    def missing(self) -> str | None:
        if os.geteuid() != 0:
            return "only root may mount"
        if not os.path.exists(mounting.DEVICE):
            return f"there is no {mounting.DEVICE}"
        return None

    def cells(self, profile: Profile) -> list[Cell]:
        return self._there(programplan.mount_cells(profile))

    def errands(self, profile: Profile) -> list[Errand]:
        return programplan.mount_errands(profile)

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[MountSession]:
        if setting.dax:
            raise NotOffered(f"{mounting.DEVICE} has no DAX window")
        session = MountSession(target, running, setting, self._place)
        try:
            yield session
        finally:
            session.close()


class MountSession(KernelSession):
    """What `vfsd mount` makes, made in this process, where its driver's counters can be read."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        super().__init__(target, running, setting, place)
        self._point = Path(tempfile.mkdtemp(prefix="vfsd-bench-mount-"))
        self.directory = str(self._point)
        try:
            self.device = connected(running, setting, place, poll=False)
            self._mount = self._mounted()
        except BaseException:
            self._point.rmdir()
            raise

    def _mounted(self) -> DeviceMount:
        try:
            return DeviceMount(
                self.device, self._point, source=self.target.name, threads=max(2, self.setting.queues),
                timeout_s=self.place.no_reply,
            )  # fmt: skip
        except OSError as problem:
            self.running.expect_alive("while it was mounted")
            raise Failed(f"can't be mounted: {problem.strerror or problem}") from problem

    def close(self) -> None:
        self._mount.close()
        self._point.rmdir()

    def execute(self, argv: list[str], when: str) -> str:
        stall = Stall(self.device.transport, self.place.no_reply)
        try:
            said = run_here(argv, self.limit, stall.look, self._mount.abort)
        except Failed as problem:
            expect_device(self.device, self.running, when)
            self.running.kill()
            raise Failed(f"{problem} {when}") from problem
        expect_device(self.device, self.running, when)
        return said

    def environment(self) -> dict[str, str]:
        return here()

    def expect_programs(self, task: Task) -> None:
        """Cells whose programs are not there have been left out."""

    def forget(self) -> None:
        """The mount is as fresh as the daemon."""

    def counts(self) -> tuple[int, int, int]:
        queues = [found for name, found in self.device.transport.counters().items() if name != "opcodes"]
        requests, kicks, calls = (sum(q[name] for q in queues) for name in ("requests", "kicks", "calls"))
        return requests, kicks, calls

    def driver_cpu(self) -> float:
        return spent()
