"""What a level is: where daemons are driven from, the wire, a mount or a guest."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from .daemons import Running, Target
from .model import Blocking, Caching, Cell, Errand, Memory, PageCache, Sample, Setting, Staleness
from .profiles import Profile

Found = Memory | Blocking | Caching | Staleness | PageCache


class Session(Protocol):
    """A daemon that has been started, with what drives it."""

    def run(self, cell: Cell, seconds: float, warm: float) -> Sample:
        """Measure. Failed, NotOffered."""

    def errand(self, what: str) -> Found:
        """Measure what is in no cell. Failed, NotOffered."""


class Level(Protocol):
    """chunk: cells from one start of a daemon."""

    name: str
    chunk: int

    def missing(self) -> str | None:
        """Why this level can't be had here; None when it can."""

    def left_out(self) -> list[str]:
        """Why a part of it can't be had: what cells() leaves out."""

    def rounds(self, profile: Profile) -> int:
        """How often each cell is measured."""

    def cells(self, profile: Profile) -> list[Cell]:
        """What a profile measures here."""

    def fresh(self, cell: Cell) -> bool:
        """Whether a cell needs a daemon that has done nothing before."""

    def around(self, errand: Errand, target: Target) -> AbstractContextManager[None]:
        """What has to be there before a daemon is started for an errand. NotOffered."""

    def errands(self, profile: Profile) -> list[Errand]:
        """What is measured once for each daemon, and not in cells."""

    def session(self, target: Target, running: Running, setting: Setting) -> AbstractContextManager[Session]:
        """Drive a daemon that listens. Failed: it can't be. NotOffered."""

    def floor_cell(self, cell: Cell) -> Cell:
        """Under what the floor of a cell is kept: the same for cells that have the same floor."""

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        """The same work without a daemon. NotOffered: there is no such thing."""
