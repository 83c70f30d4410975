"""Guest memory with one split virtqueue in it, laid out by hand, descriptor by descriptor."""

import os
import struct
from collections.abc import Iterable

from vfsd._ring import DeviceRing
from vfsd.memory._regions import GuestMemory
from vfsd.virtqueue._driver_ring import DriverRing

NEXT, WRITE, INDIRECT = 1, 2, 4

RING_GPA = 0x1_0000_0000
DATA_GPA = 0x2_0000_0000
UVA_OFFSET = 0x7E00_0000_0000  # uva = gpa + this

Desc = tuple[int, int, int, int]  # addr, len, flags, next


def memfd(size: int) -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd


def add_region(memory: GuestMemory, gpa: int, size: int) -> None:
    fd = memfd(size)
    try:
        memory.add(fd, gpa, size, gpa + UVA_OFFSET, 0)
    finally:
        os.close(fd)


class Layout:
    """The driver's view of a ring: what it writes is raw and may be wrong.

    Data regions follow each other in guest memory and, mapped in rising order and of one
    size, never do so in the host's.
    """

    def __init__(
        self, num: int, *, base: int = 0, event_idx: bool = False,
        regions: int = 2, region_size: int = 0x10000,
    ) -> None:
        self.num = num
        self.base = base
        self.event_idx = event_idx
        self.memory = GuestMemory()
        self.desc = RING_GPA
        self.avail = self.desc + 16 * num
        self.used = (self.avail + 6 + 2 * num + 3) & ~3
        add_region(self.memory, RING_GPA, self.used + 6 + 8 * num - RING_GPA)
        self.region_size = region_size
        for i in range(regions):
            add_region(self.memory, DATA_GPA + i * region_size, region_size)
        self.border = DATA_GPA + region_size
        self.end = DATA_GPA + regions * region_size
        self.idx = base
        self.u16(self.avail + 2, base)
        self.u16(self.used + 2, base)

    def device(self) -> DeviceRing:
        desc, avail, used = (gpa + UVA_OFFSET for gpa in (self.desc, self.avail, self.used))
        return DeviceRing(self.memory, self.num, desc, avail, used, self.base, self.event_idx)

    def driver(self, indirect: int | None = None) -> DriverRing:
        desc, avail, used = (gpa + UVA_OFFSET for gpa in (self.desc, self.avail, self.used))
        return DriverRing(self.memory, self.num, desc, avail, used, self.event_idx, indirect)

    def u16(self, gpa: int, value: int | None = None) -> int:
        if value is not None:
            self.memory.write(gpa, struct.pack("<H", value & 0xFFFF))
        return int(struct.unpack("<H", self.memory.read(gpa, 2))[0])

    def table(self, gpa: int, descs: Iterable[Desc]) -> None:
        self.memory.write(gpa, b"".join(struct.pack("<QIHH", *d) for d in descs))

    def read_desc(self, gpa: int, i: int) -> Desc:
        addr, length, flags, next_ = struct.unpack("<QIHH", self.memory.read(gpa + 16 * i, 16))
        return addr, length, flags, next_

    def descs(self, *descs: Desc) -> None:
        self.table(self.desc, descs)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.u16(self.avail + 4 + 2 * (self.idx % self.num), head)
            self.idx += 1
        self.u16(self.avail + 2, self.idx)

    @property
    def used_idx(self) -> int:
        return self.u16(self.used + 2)

    def used_elem(self, i: int) -> tuple[int, int]:
        at = self.used + 4 + 8 * (i % self.num)
        id_, length = struct.unpack("<II", self.memory.read(at, 8))
        return id_, length

    def give_back(self, idx: int, *elems: tuple[int, int]) -> None:
        """A device's used elements ending at idx, true or not."""
        for i, elem in enumerate(elems, idx - len(elems)):
            self.memory.write(self.used + 4 + 8 * (i % self.num), struct.pack("<II", *elem))
        self.u16(self.used + 2, idx)

    @property
    def used_event(self) -> int:
        return self.avail + 4 + 2 * self.num

    @property
    def avail_event(self) -> int:
        return self.used + 4 + 8 * self.num
