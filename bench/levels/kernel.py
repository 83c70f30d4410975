"""What the levels with a kernel's file system client share: programs run there, and what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import inside
from ..catalogue import TASKS
from ..daemons import Running, Target
from ..level import Found
from ..machine import Foreign
from ..model import FLOOR, Cell, Errand, Failed, Sample, Setting
from ..profiles import Profile
from ..tasks import Outcome, Task, Work
from . import staleness
from .driving import seed
from .place import Place

TOOLS = Path(inside.__file__).parent
LOOK_S = 0.02
LIMITS = 30  # times the patience is what a program may take


def here() -> dict[str, str]:
    """The environment of scripts on this host."""
    return {"PYTHON": sys.executable, "TOOLS": str(TOOLS), "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}


def spent() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def nothing() -> None:
    pass


def run_here(
    argv: list[str], limit: float, look: Callable[[], None] = nothing, give_up: Callable[[], None] = nothing
) -> str:
    """What a command on this host prints. Failed: it did not end in time.

    look: called all the time, may raise. give_up: when the command is killed, to answer it what it waits
    for; a kernel does not end a process that waits for a file system.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        ends = time.monotonic() + limit
        try:
            while process.poll() is None:
                if time.monotonic() > ends:
                    raise Failed(f"did not end within {limit:g} s")
                look()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                give_up()
                process.wait()
        output.seek(0)
        return output.read().decode(errors="replace")


def order(script: str, directory: str, environment: dict[str, str]) -> str:
    """For inside/work.py."""
    return json.dumps({"directory": directory, "script": script, "environment": environment})


def outcome(said: str) -> Outcome:
    """Of what work.py printed. Failed."""
    try:
        return Outcome(**json.loads(said.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError) as problem:
        raise Failed(f"ended without a result: {' '.join(said.split())[-200:]}") from problem


class KernelSession(ABC):
    """A daemon, and its file system where programs see it. See vfsd_bench.level.Session.

    directory: where the served directory is seen.
    """

    directory: str

    def __init__(self, target: Target, running: Running, setting: Setting, place: Place) -> None:
        self.target = target
        self.running = running
        self.setting = setting
        self.place = place
        self.tree = place.trees[setting.backing]
        self.limit = LIMITS * place.no_reply
        self._runs = 0

    @abstractmethod
    def execute(self, argv: list[str], when: str) -> str:
        """Run a command where the file system is: what it prints. Failed."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Of scripts: PYTHON, TOOLS."""

    @abstractmethod
    def counts(self) -> tuple[int, int, int]:
        """Requests, kicks and calls so far; zeros where nobody counts."""

    @abstractmethod
    def driver_cpu(self) -> float:
        """CPU seconds so far of all that is ours: the driver, and what runs on it."""

    @abstractmethod
    def expect_programs(self, task: Task) -> None:
        """NotOffered: there is a program that a task needs and that is not there."""

    @abstractmethod
    def forget(self) -> None:
        """Make sure that nothing is in the guest's caches."""

    @contextmanager
    def fresh(self, name: str) -> Iterator[Work]:
        """A directory of its own for one run."""
        self._runs += 1
        host = self.tree.base / self.target.name / f"{self._runs}-{name}"
        host.mkdir()
        try:
            yield Work(self.tree, host, self.place.profile, seed() & 0x7FFFFFFF)
        finally:
            shutil.rmtree(host, ignore_errors=True)

    def tool(self, name: str) -> list[str]:
        """The command for a program of `inside`."""
        environment = self.environment()
        return [environment["PYTHON"], "-S", f"{environment['TOOLS']}/{name}"]

    def path(self, work: Work) -> str:
        """Of its directory, where the file system is."""
        return f"{self.directory}/{self.target.name}/{work.host.name}"

    def run(self, cell: Cell, seconds: float, warm: float) -> Sample:
        """All of the work once, however long it takes."""
        task = TASKS[cell.workload]
        self.expect_programs(task)
        with self.fresh(task.name) as work:
            task.prepare(work)
            self.forget()
            return self._run(task, work)

    def _run(self, task: Task, work: Work) -> Sample:
        if task.again:
            task.finish(work, self._script(task, work, task.script(work)))
        before, cpu = self.counts(), self.running.cpu()
        others = Foreign(self.driver_cpu)
        found = self._script(task, work, task.script(work))
        used = self.running.cpu() - cpu
        share = others.share(used)
        after = self.counts()
        self.running.expect_threads(f"in the middle of {task.name}")
        sample = task.finish(work, self._followed(task, work, found))
        sample.requests, sample.kicks, sample.calls = (b - a for a, b in zip(before, after, strict=True))
        sample.daemon_cpu, sample.foreign = used, share
        return sample

    def _followed(self, task: Task, work: Work, found: Outcome) -> Outcome:
        """With what the script says that is not measured any more."""
        # What a guest has not written back yet could not be compared on the host.
        sync = "sync -f ." if self.setting.writeback else ""
        script = "\n".join(filter(None, (sync, task.after(work))))
        if found.status != 0 or not script:
            return found
        last = self._script(task, work, script)
        if last.status != 0:
            return last
        return replace(found, after=last.output)

    def _script(self, task: Task, work: Work, script: str) -> Outcome:
        """Run one where the file system is. Failed: there is no outcome."""
        argv = [*self.tool("work.py"), order(script, self.path(work), self.environment())]
        return outcome(self.execute(argv, f"in the middle of {task.name}"))

    def errand(self, what: str) -> Found:
        assert what == "staleness", what
        with self.fresh("staleness") as work:
            staleness.prepare(work)
            self.forget()
            argv = [*self.tool("watch.py"), self.path(work), f"{self.place.profile.watch:g}"]
            return staleness.measure(
                self.setting, self.target.name, work, lambda: self.execute(argv, "while it was watched")
            )


class KernelLevel(ABC):
    """What is measured by programs. See vfsd_bench.level.Level."""

    name: str
    chunk: int

    def __init__(self, place: Place) -> None:
        self._place = place

    def left_out(self) -> list[str]:
        """Programs that are not installed."""
        programs = {program for task in TASKS.values() for program in task.needs}
        found = []
        for program in sorted(program for program in programs if shutil.which(program) is None):
            names = ", ".join(task.name for task in TASKS.values() if program in task.needs)
            found.append(f"{program} is not installed: without {names}")
        return found

    def _there(self, cells: list[Cell]) -> list[Cell]:
        """Those whose programs there are."""
        return [cell for cell in cells if all(map(shutil.which, TASKS[cell.workload].needs))]

    def rounds(self, profile: Profile) -> int:
        return profile.program_rounds

    def fresh(self, cell: Cell) -> bool:
        """Nothing more than `chunk` has already."""
        return False

    @contextmanager
    def around(self, errand: Errand, target: Target) -> Iterator[None]:
        yield

    def floor_cell(self, cell: Cell) -> Cell:
        """The same with every kernel and every setting of a daemon."""
        return Cell(Setting(level="mount", backing=cell.setting.backing), cell.workload, cell.depth)

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        """The same command in the host's own directory."""
        task = TASKS[cell.workload]
        tree = self._place.trees[cell.setting.backing]
        host = tree.base / FLOOR / task.name
        host.mkdir()
        try:
            work = Work(tree, host, self._place.profile, seed() & 0x7FFFFFFF)
            task.prepare(work)
            if task.again:
                self._script(work, task.script(work))
            others = Foreign(spent)
            found = self._script(work, task.script(work))
            share = others.share(0)
            if task.after(work):
                found = replace(found, after=self._script(work, task.after(work)).output)
            sample = task.finish(work, found)
        finally:
            shutil.rmtree(host, ignore_errors=True)
        sample.foreign = share
        return sample

    def _script(self, work: Work, script: str) -> Outcome:
        argv = [sys.executable, "-S", str(TOOLS / "work.py"), order(script, str(work.host), here())]
        return outcome(run_here(argv, LIMITS * self._place.no_reply))
