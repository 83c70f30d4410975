"""Where daemons are driven from. A level is a class of vfsd_bench.model.Level and one line here."""

from __future__ import annotations

from ..model import Level
from .place import Place
from .wire import WireLevel

NAMES = ("wire",)


def make(name: str, place: Place) -> Level:
    """The level of that name."""
    return {"wire": WireLevel}[name](place)
