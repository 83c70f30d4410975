"""What a guest may keep and for how long, by cache mode (docs/caching.md)."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from vfsd.fuse.abi import Fopen, Init

if TYPE_CHECKING:
    from vfsd.hostfs.choices import CacheMode

DAY_S = 86400.0
# Programs ask again and again for names that are not there, but within moments: a second answers
# nearly all of them, and who waits for a file of the host is not kept for a day.
NEGATIVE_S = 1.0
CACHED_DIR = Fopen.KEEP_CACHE | Fopen.CACHE_DIR


class Dirty(IntEnum):
    """What of a file a guest may have changed without having told the daemon."""

    NOTHING = 0
    PAGES = 1  # by stores through a shared mapping
    SIZES = 2  # by any write, so that the file may be longer than the host knows


class CachePolicy(NamedTuple):
    """What a cache mode promises the guest.

    entry_s, attr_s, negative_s: seconds that a name, attributes and the absence of a name may be
    kept. open_flags, opendir_flags: of the replies to OPEN and OPENDIR. symlinks: whether targets
    are kept as long as their inode.
    """

    entry_s: float
    attr_s: float
    negative_s: float
    open_flags: Fopen
    opendir_flags: Fopen
    readdirplus: bool
    symlinks: bool

    def dirty(self, agreed: Init) -> Dirty:
        """What can be dirty in a guest's page cache that has agreed to these flags."""
        if Fopen.DIRECT_IO not in self.open_flags:
            return Dirty.SIZES if Init.WRITEBACK_CACHE in agreed else Dirty.PAGES
        return Dirty.PAGES if Init.DIRECT_IO_ALLOW_MMAP in agreed else Dirty.NOTHING

    def with_timeouts(
        self, entry_s: float | None, attr_s: float | None, negative_s: float | None
    ) -> CachePolicy:
        """The same but for the timeouts that are given."""
        return self._replace(
            entry_s=self.entry_s if entry_s is None else entry_s,
            attr_s=self.attr_s if attr_s is None else attr_s,
            negative_s=self.negative_s if negative_s is None else negative_s,
        )


CACHE_POLICIES: dict[CacheMode, CachePolicy] = {
    "never": CachePolicy(0, 0, 0, Fopen.DIRECT_IO, Fopen(0), False, False),
    "auto": CachePolicy(1, 1, 0, Fopen(0), Fopen(0), True, False),
    "metadata": CachePolicy(DAY_S, DAY_S, NEGATIVE_S, Fopen.DIRECT_IO, CACHED_DIR, True, True),
    "always": CachePolicy(DAY_S, DAY_S, NEGATIVE_S, Fopen.KEEP_CACHE, CACHED_DIR, True, True),
}
