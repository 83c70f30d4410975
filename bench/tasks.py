"""What a whole program does on a file system, and how it is known to have done it: a Task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .fixture import Tree
from .model import Failed, Sample
from .profiles import Profile

COMMON = "../../common"  # of a task's directory, what all read
SAID_MAX = 200  # of what a program has printed, in a failure


@dataclass(frozen=True)
class Work:
    """Where one run takes place. host: its directory on the host, empty before; seed: differs each time."""

    tree: Tree
    host: Path
    profile: Profile
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a script. after: what the script that follows it printed."""

    status: int
    seconds: float
    output: str
    after: str = ""


def nothing(_work: Work) -> None:
    """No preparation."""


def script(text: str) -> Callable[[Work], str]:
    """The same for all."""
    return lambda _work: text


def timed(task: Task, work: Work, outcome: Outcome) -> Sample:
    """By the time that the script took."""
    return Sample(task.items(work.profile), outcome.seconds)


NO_SCRIPT = script("")


@dataclass(frozen=True)
class Task:
    """One workload. script: for /bin/sh -e, in a directory of its own on what is measured.

    It finds $PYTHON and $TOOLS, the directory `inside`. items: how many things it does, each of them a
    `unit`. prepare: on the host, before. check: on the host, after; raises Failed. after: a script whose
    output check gets. needs: programs. again: it is run once before, so that its guest may have all in
    its caches. sample: the figures.
    """

    name: str
    title: str
    unit: str
    script: Callable[[Work], str]
    items: Callable[[Profile], int]
    check: Callable[[Work, Outcome], None]
    prepare: Callable[[Work], object] = nothing
    after: Callable[[Work], str] = NO_SCRIPT
    needs: tuple[str, ...] = ()
    again: bool = False
    depth: int = 1
    sample: Callable[[Task, Work, Outcome], Sample] = timed

    def finish(self, work: Work, outcome: Outcome) -> Sample:
        """Failed: it did not end well, or did not do what it should."""
        if outcome.status != 0:
            raise Failed(f"{self.name} ended with status {outcome.status}: {said(outcome.output)}")
        self.check(work, outcome)
        return self.sample(self, work, outcome)


def said(output: str) -> str:
    """The end of what a program printed, in one line."""
    return " ".join(output.split())[-SAID_MAX:] or "it said nothing"


def expect(right: bool, why: str) -> None:
    if not right:
        raise Failed(why)
