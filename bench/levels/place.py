"""What every level needs of a run: the served directories, the CPUs and the patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..daemons import Pinning
from ..fixture import Tree
from ..profiles import Profile


@dataclass(frozen=True)
class Place:
    """trees: by backing. no_reply: seconds after which a request counts as not answered.

    missing: by backing, why there is none.
    """

    profile: Profile
    trees: Mapping[str, Tree]
    missing: Mapping[str, str]
    pinning: Pinning
    no_reply: float
