"""Guest memory as the front end's messages build it up: SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG."""

from collections.abc import Sequence
from typing import Final

from vfsd.errors import ProtocolError
from vfsd.memory._regions import GuestMemory
from vfsd.vhost.messages import Region

SLOTS_MAX: Final = 509  # answer of GET_MAX_MEM_SLOTS; below QEMU's own limit of 512


class MemoryTable:
    """The regions of one connection, mapped. What works with them keeps what it knew when they change.

    Descriptors stay the caller's and are not needed after the call."""

    def __init__(self) -> None:
        self.guest = GuestMemory()

    def __len__(self) -> int:
        return len(self.guest)

    def replace(self, regions: Sequence[Region], fds: Sequence[int]) -> None:
        """SET_MEM_TABLE: these regions and no others.

        ProtocolError, and the table as it was, when one of them cannot be."""
        if len(fds) != len(regions):
            raise ProtocolError(f"{len(regions)} regions with {len(fds)} descriptors")
        table = self.guest.another()
        for number, (region, fd) in enumerate(zip(regions, fds, strict=True)):
            self._map(table, f"region {number}", region, fd)
        self.guest.take(table)

    def add(self, region: Region, fd: int) -> None:
        """ADD_MEM_REG. ProtocolError, and the table as it was, when it cannot be."""
        self._map(self.guest, "region", region, fd)

    def add_shrinking(self, region: Region, fd: int) -> None:
        """A file that may end before the region does, or can't be mapped: what lies there is EFAULT."""
        self._map(self.guest, "region", region, fd, may_shrink=True)

    def remove(self, region: Region) -> None:
        """REM_MEM_REG: the region with this gpa, size and uva. ProtocolError if there is none."""
        try:
            self.guest.remove(region.gpa, region.size, region.uva)
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def clear(self) -> None:
        """No regions, and nobody to tell of missing pages any more."""
        self.guest.clear()
        self.guest.watch(-1)

    @staticmethod
    def _map(table: GuestMemory, name: str, region: Region, fd: int, may_shrink: bool = False) -> None:
        if len(table) >= SLOTS_MAX:
            raise ProtocolError(f"more than {SLOTS_MAX} regions")
        try:
            table.add(fd, region.gpa, region.size, region.uva, region.offset, may_shrink)
        except (ValueError, OSError) as error:
            raise ProtocolError(f"{name} (gpa {region.gpa:#x}): {error}") from error
