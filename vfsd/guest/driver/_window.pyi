from collections.abc import Callable, Sequence
from typing import Self, final

from vfsd._dax import Window
from vfsd.guest.buffer import Buffer

__all__ = ("View", "WindowMemory")

@final
class WindowMemory:
    """The DAX window as address space: nothing is there until the daemon has something mapped.

    size: bytes, a multiple of the page size. OSError ENOMEM. It installs handlers of SIGBUS and
    SIGSEGV, once for the process, see vfsd/memory/_guard.h.
    """

    def __new__(cls, size: int) -> Self: ...
    @property
    def size(self) -> int: ...
    def map(self, fd: int, fd_offset: int, offset: int, size: int, writable: bool) -> None:
        """SHMEM_MAP: bytes, multiples of the page size; the descriptor stays the caller's.

        OSError EINVAL: outside or unaligned; EEXIST: something is mapped there; mmap's."""
    def unmap(self, offset: int, size: int) -> None:
        """SHMEM_UNMAP of exactly what one map() made. OSError ENOENT."""
    def clear(self) -> None:
        """Nothing is mapped any more."""
    def close(self) -> None:
        """Give the address space back; views stay. Idempotent."""
    def mapped(self) -> list[tuple[int, int, bool]]:
        """(offset, size, writable) of what is mapped, in the order of the window."""
    def resident(self) -> int:
        """Bytes of the window that are in the host's page cache."""
    def read(self, offset: int, into: Buffer) -> int:
        """Copy out of the window: how many bytes, fewer where the file ends before (or is not mapped)."""
    def write(self, offset: int, data: Buffer) -> int:
        """Copy into the window: how many bytes."""
    def read_file(self, table: Window, inode: int, position: int, into: Buffer) -> int:
        """The same of a file, from the one range that has the position, which is busy meanwhile.

        -1: there is none. `into` lies within one range."""
    def write_file(self, table: Window, inode: int, position: int, data: Buffer) -> int:
        """-1: there is none, or it is not writable."""
    def view(
        self, parts: Sequence[tuple[int, int]], start: int, length: int, writable: bool,
        released: Callable[[], None],
    ) -> memoryview:  # fmt: skip
        """Pieces of the window, one after the other in memory of their own, as page tables would do it.

        parts: (offset, size), multiples of the page size. The view's bytes are those from start on; its
        `obj` is a View. released: called once, in whatever thread, when nobody has it any more. OSError."""

@final
class View:
    """The memory of a view, there as long as anybody has it, whatever becomes of the window."""

    @property
    def torn(self) -> int:
        """Pages that had to be replaced by zeroes because the file was cut off behind them."""
