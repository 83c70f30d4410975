"""The DAX window as a table, for Python (tier 2; tier 1 and the terms are in _dax.pxd).

All offsets and lengths are bytes and multiples of range_size: ValueError otherwise, and for what
lies outside of the window. `moffset` is an offset in the window, `foffset` one in a file. A mapping
is named by the moffset of its beginning. Each call holds the GIL throughout: among threads with the
GIL it is atomic.
"""

from typing import NamedTuple, Self, final

import numpy as np
from numpy.typing import NDArray

__all__ = ("Mapping", "Window", "load_numpy")

def load_numpy() -> None:
    """Have it loaded already when the first Window is made: it takes a tenth of a second."""

class Mapping(NamedTuple):
    """A run of ranges that holds a part of one inode."""

    moffset: int
    length: int
    inode: int
    foffset: int
    writable: bool

@final
class Window:
    """size bytes of window, in ranges of range_size bytes, a power of two. All are free.

    ValueError: size is 0 or no multiple of range_size, or there would be more than 2^28 ranges.
    Loads NumPy.
    """

    def __new__(cls, size: int, range_size: int) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def range_size(self) -> int: ...

    # How many of each there are now. Claimed ranges are in none of them.
    @property
    def n_ranges(self) -> int: ...
    @property
    def n_free(self) -> int:
        """Ranges."""
    @property
    def n_mapped(self) -> int:
        """Mappings, busy ones too."""
    @property
    def n_busy(self) -> int:
        """Mappings that somebody uses."""
    def counters(self) -> dict[str, int]:
        """Since the beginning: allocated, stolen, split, merged."""

    # One bit a range, in words of 64, the lowest bit first: live views, not to be written.
    @property
    def free(self) -> NDArray[np.uint64]: ...
    @property
    def busy(self) -> NDArray[np.uint64]: ...
    @property
    def writable(self) -> NDArray[np.uint64]: ...

    # ---- both sides

    def find(self, inode: int, foffset: int) -> int | None:
        """The moffset of the range that holds that byte of the inode (foffset need not be a multiple);
        None. Logarithmic."""
    def at(self, moffset: int) -> Mapping | None:
        """The mapping around that byte of the window (need not be a multiple). Constant time."""
    def overlapping(self, moffset: int, length: int) -> list[Mapping]:
        """The mappings with a range in [moffset, moffset + length), by moffset, whole."""
    def has(self, inode: int) -> bool:
        """Whether the inode has a mapping. Logarithmic."""
    def of(self, inode: int) -> list[Mapping]:
        """The mappings of the inode, by foffset."""
    def mappings(self) -> list[Mapping]:
        """All of them, the oldest first."""
    def map(self, moffset: int, length: int, inode: int, foffset: int, writable: bool) -> None:
        """Free or claimed ranges hold that part of the inode. OSError EEXIST: one is mapped."""
    def unmap(self, moffset: int, keep: bool = False) -> None:
        """The mapping that begins there is gone, its ranges are free, or with keep claimed.

        OSError ENOENT: none begins there; EBUSY: somebody uses it."""
    def cut(self, moffset: int, length: int) -> list[Mapping]:
        """Nothing is mapped in [moffset, moffset + length) any more; its mapped ranges are free.

        What is left of mappings that lay across its borders. OSError EBUSY, and nothing done:
        somebody uses one."""
    def split(self, moffset: int) -> None:
        """The mapping around it becomes two, the second begins there. OSError ENOENT, EBUSY."""
    def merge(self, moffset: int) -> bool:
        """Join the mapping that begins there to the one before it, if both could be one. OSError
        ENOENT, EBUSY."""
    def set_writable(self, moffset: int) -> None:
        """OSError ENOENT: no mapping begins there."""
    def clear(self) -> None:
        """Every range is free, busy or not."""

    # ---- the guest

    def alloc(self) -> int | None:
        """The moffset of a free range, now claimed; None: there is none. In turn, 0 first."""
    def release(self, moffset: int) -> None:
        """A claimed range is free again. OSError EINVAL: it was not claimed."""
    def get(self, moffset: int) -> None:
        """One more uses the mapping that begins there: it is busy. OSError ENOENT."""
    def put(self, moffset: int) -> bool:
        """One less. Whether it is idle now. OSError ENOENT, EINVAL: nobody used it."""
    def steal(self, inode: int) -> Mapping | None:
        """Unmap the first idle mapping of the inode, in the order of the file, and claim its ranges:
        what it was. None: it has mappings, all of them busy. OSError ENOENT: it has none."""
    def take_oldest(self) -> Mapping | None:
        """Unmap the idle mapping made or touched longest ago and claim its ranges: what it was. None:
        none is idle."""
    def oldest_idle(self) -> Mapping | None:
        """The one take_oldest() would take."""
    def touch(self, moffset: int) -> None:
        """As if the mapping that begins there had been made now. OSError ENOENT."""
