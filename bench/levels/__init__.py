"""Where daemons are driven from. A level is a class of vfsd_bench.level.Level and one line here."""

from __future__ import annotations

from collections.abc import Callable

from ..level import Level
from .dax import DaxLevel
from .guest import GUESTS, GuestLevel
from .mount import MountLevel
from .place import Place
from .slow import SlowLevel
from .wire import WireLevel

LEVELS: dict[str, Callable[[Place], Level]] = {
    "wire": WireLevel, "slow": SlowLevel, "dax": DaxLevel, "mount": MountLevel, "guest": GuestLevel,
}  # fmt: skip
NAMES = tuple(LEVELS)


def make(name: str, place: Place) -> Level:
    """The level of that name."""
    return LEVELS[name](place)


__all__ = ("GUESTS", "LEVELS", "NAMES", "make")
