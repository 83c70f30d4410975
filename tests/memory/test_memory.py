import gc
import mmap
import os
import random
from pathlib import Path

import pytest
from ring.layout import DATA_GPA, NEXT, WRITE, Layout, add_region, memfd

from vfsd.memory._regions import REGIONS_MAX, GuestMemory

PAGE = mmap.PAGESIZE


def test_bytes_are_shared_with_the_file() -> None:
    fd = memfd(4 * PAGE)
    memory = GuestMemory()
    memory.add(fd, 0x1000, 2 * PAGE, 0x5000, PAGE)
    memory.write(0x1000, b"guest")
    assert os.pread(fd, 5, PAGE) == b"guest"
    os.pwrite(fd, b"host", 2 * PAGE)
    assert memory.read(0x1000 + PAGE, 4) == b"host"
    os.close(fd)


def test_descriptor_stays_the_callers() -> None:
    fd = memfd(PAGE)
    before = len(os.listdir("/proc/self/fd"))
    memory = GuestMemory()
    memory.add(fd, 0, PAGE, 0, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    memory.write(0, b"still mapped")
    assert memory.read(6, 6) == b"mapped"


@pytest.mark.parametrize("offset", [1, 100, PAGE - 1, PAGE + 8])
def test_offset_inside_a_page(offset: int) -> None:
    fd = memfd(4 * PAGE)
    memory = GuestMemory()
    memory.add(fd, 0, 2 * PAGE, 0, offset)
    memory.write(2 * PAGE - 3, b"end")
    assert os.pread(fd, 3, offset + 2 * PAGE - 3) == b"end"
    os.close(fd)


def test_regions_are_sorted_by_gpa() -> None:
    memory = GuestMemory()
    order = list(range(20))
    random.Random(1).shuffle(order)
    for i in order:
        add_region(memory, i * 0x10000, PAGE)
        memory.write(i * 0x10000, bytes([i]))
    assert [gpa for gpa, _, _ in memory.regions()] == [i * 0x10000 for i in range(20)]
    assert [memory.read(i * 0x10000, 1)[0] for i in range(20)] == list(range(20))
    assert len(memory) == 20


@pytest.mark.parametrize(
    ("gpa", "size", "uva", "offset", "text"),
    [
        (0, 0, 0, 0, "size 0"),
        (2**64 - PAGE, PAGE, 0, 0, "guest address .* overflows"),
        (0, PAGE, 2**64 - PAGE, 0, "user address .* overflows"),
        (0, PAGE, 0, 2**64 - PAGE, "offset .* overflows"),
        (0, PAGE, 0, 2**63 - PAGE, "offset .* overflows"),
        (0x10000 + PAGE, PAGE, 0x90000, 0, "guest address .* overlaps"),
        (0x10000 - PAGE + 1, PAGE, 0x90000, 0, "guest address .* overlaps"),
        (0x90000, PAGE, 0x20000 + PAGE, 0, "user address .* overlaps"),
        (0x90000, PAGE, 0x20000 - PAGE + 1, 0, "user address .* overlaps"),
        (0x90000, 4 * PAGE + 1, 0x90000, 0, "of a file of"),
        (0x90000, PAGE, 0x90000, 3 * PAGE + 1, "of a file of"),
    ],
)
def test_refused(gpa: int, size: int, uva: int, offset: int, text: str) -> None:
    fd = memfd(4 * PAGE)
    memory = GuestMemory()
    memory.add(fd, 0x10000, 2 * PAGE, 0x20000, 0)
    with pytest.raises(ValueError, match=text):
        memory.add(fd, gpa, size, uva, offset)
    assert memory.regions() == [(0x10000, 2 * PAGE, 0x20000)]
    os.close(fd)


def test_regions_may_touch() -> None:
    memory = GuestMemory()
    for gpa in (PAGE, 0, 2 * PAGE):
        add_region(memory, gpa, PAGE)
    data = random.Random(2).randbytes(3 * PAGE)
    memory.write(0, data)
    assert memory.read(PAGE - 2, PAGE + 4) == data[PAGE - 2:2 * PAGE + 2]


def test_too_many_regions() -> None:
    memory = GuestMemory()
    for i in range(REGIONS_MAX):
        add_region(memory, i * 0x10000, PAGE)
    with pytest.raises(ValueError, match="more than 512"):
        add_region(memory, REGIONS_MAX * 0x10000, PAGE)
    memory.clear()
    assert len(memory) == 0
    add_region(memory, 0, PAGE)


def test_mmap_failure_is_an_oserror(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    memory = GuestMemory()
    with pytest.raises(PermissionError):
        memory.add(fd, 0, PAGE, 0, 0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        memory.add(fd, 0, PAGE, 0, 0)
    assert len(memory) == 0


def test_remove_wants_the_exact_region() -> None:
    memory = GuestMemory()
    fd = memfd(PAGE)
    for gpa in (0x10000, 0x20000, 0x30000):
        memory.add(fd, gpa, PAGE, gpa + 8 * PAGE, 0)
    for wrong in (
        (0x20001, PAGE, 0x20000 + 8 * PAGE), (0x20000, PAGE - 1, 0x20000 + 8 * PAGE),
        (0x20000, PAGE, 0x20000), (0x90000, PAGE, 0x90000),
    ):
        with pytest.raises(ValueError, match="no memory region"):
            memory.remove(*wrong)
    memory.remove(0x20000, PAGE, 0x20000 + 8 * PAGE)
    assert [gpa for gpa, _, _ in memory.regions()] == [0x10000, 0x30000]
    with pytest.raises(ValueError, match="not all in guest memory"):
        memory.read(0x20000, 1)
    assert memory.read(0x30000, 1) == b"\0"
    os.close(fd)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(PAGE - 1, 1), (PAGE, PAGE + 1), (2 * PAGE, 1), (0, 2**63), (PAGE, 2**64 - 1), (2**64 - 1, 2)],
)
def test_outside_memory(gpa: int, size: int) -> None:
    memory = GuestMemory()
    add_region(memory, PAGE, PAGE)
    with pytest.raises(ValueError, match="not all in guest memory"):
        memory.read(gpa, size)


def test_write_is_all_or_nothing() -> None:
    memory = GuestMemory()
    add_region(memory, 0, PAGE)
    with pytest.raises(ValueError, match="not all in guest memory"):
        memory.write(PAGE - 2, b"abc")
    assert memory.read(PAGE - 2, 2) == b"\0\0"


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:guest")


def test_memory_is_unmapped() -> None:
    gc.collect()
    before = maps()
    memory = GuestMemory()
    add_region(memory, 0, PAGE)
    add_region(memory, 2 * PAGE, PAGE)
    assert maps() == before + 2
    memory.remove(0, PAGE, memory.regions()[0][2])
    assert maps() == before + 1
    del memory
    gc.collect()
    assert maps() == before


def test_a_view_keeps_memory_mapped() -> None:
    layout = Layout(2)
    layout.descs((DATA_GPA, 4, NEXT, 1), (DATA_GPA + 64, 4, WRITE, 0))
    layout.offer(0)
    layout.memory.write(DATA_GPA, b"data")
    memory = layout.memory
    popped = layout.device().pop()
    assert popped is not None
    _, (readable,), (writable,) = popped
    memory.remove(*memory.regions()[0])
    memory.clear()
    del layout, memory, popped
    gc.collect()
    assert bytes(readable) == b"data"
    writable[:] = b"back"
    assert readable.readonly and not writable.readonly
