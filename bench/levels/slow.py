"""The level "slow": the wire, and a shared directory on a file system whose operations take their time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from vfsd.guest.bridge import mounting

from ..daemons import Running, Target
from ..level import Found, Session
from ..model import Cell, Errand, NotOffered, Sample, Setting
from ..profiles import Profile
from ..workloads import WORKLOADS
from .place import Place
from .plan import across
from .session import WireSession

KINDS = ("getattr", "statfs", "lookup-new", "setattr-mode", "open-release", "create", "mkdir-rmdir", "rename",
         "read-4k", "write-4k", "readdirplus-10-new")  # fmt: skip
ONE_AT_A_TIME = ("readdirplus-1000-new",)  # what its entries wait for can be waited for at the same time
SLOWER = 6  # times as long as elsewhere may a daemon take: a thousand lookups in turn come before getattr
# Asks the file system nothing, or of 10,000 entries one after the other.
LEFT_OUT = ("nop", "readdir-10000", "readdirplus-10000", "readdirplus-10000-new", *ONE_AT_A_TIME)


class SlowLevel:
    """See vfsd_bench.level.Level."""

    name = "slow"
    chunk = 6

    def __init__(self, place: Place) -> None:
        self._place = replace(place, no_reply=SLOWER * place.no_reply)

    def missing(self) -> str | None:
        if os.geteuid() != 0:
            return "only root may mount a file system"
        return None if os.path.exists(mounting.DEVICE) else f"there is no {mounting.DEVICE}"

    def left_out(self) -> list[str]:
        return []

    def rounds(self, profile: Profile) -> int:
        return profile.rounds

    def cells(self, profile: Profile) -> list[Cell]:
        full = profile.name == "full"
        every = [name for name, row in WORKLOADS.items() if not row.direct and name not in LEFT_OUT]
        found = across(setting(), every if full else KINDS, (32,)) + across(setting(), ONE_AT_A_TIME, (1,))
        return found + across(setting(queues=4), KINDS if full else KINDS[:2], (32,))

    def errands(self, profile: Profile) -> list[Errand]:
        return []

    def fresh(self, cell: Cell) -> bool:
        return False

    @contextmanager
    def around(self, errand: Errand, target: Target) -> Iterator[None]:
        yield

    @contextmanager
    def session(self, target: Target, running: Running, setting: Setting) -> Iterator[Session]:
        session = SlowSession(target, running, setting, self._place)
        try:
            yield session
        finally:
            session.close()

    def floor_cell(self, cell: Cell) -> Cell:
        return cell

    def floor(self, cell: Cell, seconds: float, warm: float) -> Sample:
        raise NotOffered("the file system's own time is the floor")


class SlowSession(WireSession):
    """See vfsd_bench.level.Session."""

    def errand(self, what: str) -> Found:
        raise NotOffered("the level has cells only")


def setting(queues: int = 1) -> Setting:
    """As a guest that sleeps: its CPU is left to the others."""
    return Setting("slow", "slow", completions="event", queues=queues)
