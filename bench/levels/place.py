"""Where a run takes place: profile, served directories, CPUs and the patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..daemons import Pinning
from ..fixture import Tree
from ..profiles import Profile


@dataclass(frozen=True)
class Place:
    """trees: by backing. no_reply: seconds after which a request counts as not answered.

    missing: by backing, why there is none. guest: which guests the level of that name boots.
    """

    profile: Profile
    trees: Mapping[str, Tree]
    missing: Mapping[str, str]
    pinning: Pinning
    no_reply: float
    guest: str = "uml"
