"""The shared directory as one guest sees it: tables, and the policy compiled into them."""

import importlib
from dataclasses import dataclass
from typing import Literal

from vfsd.fuse.abi import Fopen
from vfsd.fuse.dispatch import Dispatch
from vfsd.fuse.opcodes import OPERATIONS
from vfsd.hostfs._tables import Tables

CacheMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class CachePolicy:
    """What a cache mode promises the guest (docs/architecture.md, "Cache modes")."""

    timeout_s: float  # names and attributes
    open_flags: Fopen
    opendir_flags: Fopen
    readdirplus: bool


CACHE_POLICIES: dict[CacheMode, CachePolicy] = {
    "never": CachePolicy(0, Fopen.DIRECT_IO, Fopen(0), False),
    "auto": CachePolicy(1, Fopen(0), Fopen(0), True),
    "always": CachePolicy(86400, Fopen.KEEP_CACHE, Fopen.KEEP_CACHE | Fopen.CACHE_DIR, True),
}


@dataclass(frozen=True)
class Policy:
    """What the operator chose for a share, as far as its operations care."""

    cache: CachePolicy
    xattr: bool


class HostFs:
    """One guest's view of a shared directory.

    root_fd: readable descriptor of the directory; stays the caller's.
    anchors_max: see `Tables`.
    """

    def __init__(self, root_fd: int, policy: Policy, anchors_max: int) -> None:
        self.policy = policy
        self.tables = Tables(root_fd, anchors_max)
        cache = policy.cache
        self.tables.set_timeouts(cache.timeout_s, cache.timeout_s)
        self.tables.set_policy(cache.open_flags, cache.opendir_flags, policy.xattr)

    def install(self, dispatch: Dispatch) -> None:
        """Give every operation of the table that lives in this package to the dispatch."""
        for module in sorted({op.module for op in OPERATIONS if op.module.startswith("hostfs.")}):
            importlib.import_module(f"vfsd.{module}").install(dispatch, self.tables)
