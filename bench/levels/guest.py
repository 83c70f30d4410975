"""The level "guest": the daemon's file system in a Linux guest, by the kernel's own virtio-fs driver."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..daemons import TAG, Running, Target
from ..harness import HARNESS, harness
from ..machine import TICK
from ..model import Cell, Errand, Failed, NotOffered, Setting
from ..profiles import Profile
from ..tasks import Task
from . import programplan
from .bundle import bundle
from .kernel import LOOK_S, TOOLS, KernelLevel, KernelSession, spent
from .place import Place

MEMORY_MB = 1024
BOOT = 6  # times the patience is what a guest may take to boot
IN_QEMU = ("fio", "md5sum", "dd")  # beyond busybox and Python
GUESTS = ("uml", "qemu")


class GuestLevel(KernelLevel):
    """Several cells in one boot; the guest's caches are dropped before each."""

    name = "guest"
    chunk = 12

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def missing(self) -> str | None:
        try:
            guests = harness()
        except ImportError:
            return f"what boots guests is only in a source checkout, in tools/guests: {HARNESS} has none"
        kind = guests.UmlGuest if self._place.guest == "uml" else guests.QemuGuest
        why: str | None = kind.missing()
        return why

    def cells(self, profile: Profile) -> list[Cell]:
        return self._there(programplan.guest_cells(profile, self._place.guest))

    def errands(self, profile: Profile) -> list[Errand]:
        return programplan.guest_errands(profile, self._place.guest)

    def _tools(self) -> Path:
        """What the guest has besides its own: a directory."""
        if self._place.guest == "uml":
            return TOOLS
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="vfsd-bench-")
            bundle(Path(self._files.name), TOOLS, "fio")
        return Path(self._files.name)

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[GuestSession]:
        session = GuestSession(target, running, setting, self._place, self._tools())
        try:
            yield session
        finally:
            session.close()


class GuestSession(KernelSession):
    """A guest that has the share mounted."""

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place, tools: Path) -> None:
        super().__init__(target, running, setting, place)
        self._error: type[Exception] = harness().GuestError
        self._guest = self._make(tools)
        self._guest.boot_seconds = BOOT * place.no_reply
        self.directory = self._guest.share
        try:
            self._watched(self._boot, "while a guest booted")
        except BaseException:
            self.close()
            raise

    def _make(self, tools: Path) -> Any:
        guests = harness()
        kind = guests.UmlGuest if self.setting.guest == "uml" else guests.QemuGuest
        return kind(self.running.socket, tag=TAG, memory=MEMORY_MB, files=tools)

    def _boot(self) -> str:
        self._guest.start()
        self._guest.mount()
        return ""

    def close(self) -> None:
        self._guest.kill()

    def _watched(self, call: Any, when: str) -> str:
        """Failed: the daemon has gone, and the guest with it; or the guest."""
        affinity = os.sched_getaffinity(0)

        def pinned() -> str:
            os.sched_setaffinity(0, affinity)
            return str(call())

        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(pinned)
            while True:
                try:
                    return result.result(LOOK_S)
                except NotYet:
                    try:
                        self.running.expect_alive(when)
                    except Failed:
                        self._guest.kill()
                        with contextlib.suppress(Exception):  # of a guest that has been killed
                            result.result()
                        raise
                except (self._error, AssertionError, OSError, ValueError) as problem:
                    self.running.expect_alive(when)
                    raise Failed(f"{first_line(problem)} {when}") from problem

    def execute(self, argv: list[str], when: str) -> str:
        return self._watched(lambda: self._guest.run(shlex.join(argv), self.limit).output, when)

    def environment(self) -> dict[str, str]:
        tools = self._guest.files
        found = {"PYTHON": self._guest.python, "TOOLS": tools}
        return found if self.setting.guest == "uml" else found | {"PATH": f"/bin:{tools}/bin"}

    def expect_programs(self, task: Task) -> None:
        if self.setting.guest == "qemu":
            for program in task.needs:
                if program not in IN_QEMU:
                    raise NotOffered(f"{program} is not in the QEMU guest")

    def forget(self) -> None:
        self.execute(["/bin/sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches"], "while caches were dropped")

    def counts(self) -> tuple[int, int, int]:
        """The guest's kernel does not tell."""
        return 0, 0, 0

    def driver_cpu(self) -> float:
        return spent() + session_cpu(self._guest.pid)


def first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def session_cpu(session: int) -> float:
    """CPU seconds of all processes of a session, and of their children that have ended."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(entry.path, "stat").read_text(errors="replace")
                fields = stat.rpartition(")")[2].split()
                if int(fields[3]) == session:
                    total += sum(map(int, fields[11:15]))
    return total * TICK
