"""SETUPMAPPING and REMOVEMAPPING from raw requests, with a window that is mapped for real."""

import contextlib
import errno
import fcntl
import os
import random
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse import wire
from fuse.fixtures import held
from fuse.ops import refused
from fuse.rawguest import UVA_OFFSET
from fuse.rawguest import readable as readable_fd
from guests import Daemon, StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Fopen, Init
from vfsd.fuse.init import MAX_PAGES
from vfsd.fuse.opcodes import NUMBER
from vfsd.vhost import messages
from vfsd.vhost.frontend import SharedRegion
from vfsd.vhost.messages import Region, ShmemMap

from .vmm import DAX_FLAGS, PAGE, READ, WINDOW_GPA, WRITE, Vmm, setupmapping

MIB = 1 << 20
RANGE = abi.DAX_RANGE
WINDOW = 64 * MIB

StartVmm = Callable[..., Vmm]


@pytest.fixture(scope="module")
def served(module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    share = tmp_path_factory.mktemp("dax")
    return module_daemon(share, options=["--dax-window", "64M", "--dax-policy", "size:4096"])


@pytest.fixture
def start_vmm(served: Daemon) -> Iterator[StartVmm]:
    log_start = len(served.log)
    vmms: list[Vmm] = []

    def start(**arguments: object) -> Vmm:
        vmms.append(Vmm(served.socket, **arguments))  # type: ignore[arg-type]
        return vmms[-1]

    yield start
    for vmm in vmms:
        vmm.close()
    left = "the front end has left"
    assert eventually(lambda: served.log.count(left, log_start) == len(vmms)), served.log[log_start:]
    assert "Traceback" not in served.log[log_start:], served.log[log_start:]
    below = f"{served.shared}/"
    assert [path for path in served.descriptors() if path.startswith(below)] == []
    for entry in os.scandir(served.shared):
        shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


@pytest.fixture
def vmm(start_vmm: StartVmm) -> Vmm:
    vmm = start_vmm()
    vmm.start_session()
    return vmm


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(3 * RANGE)


@pytest.fixture
def nodeid(vmm: Vmm, served: Daemon, content: bytes) -> int:
    (served.shared / "file").write_bytes(content)
    return vmm.walk("file")


def test_the_window_is_announced(vmm: Vmm) -> None:
    assert vmm.frontend.shmem == {0: WINDOW}
    init = vmm.on(1).init(flags=abi.Init.MAP_ALIGNMENT | Init.INIT_EXT | Init.HAS_INODE_DAX)
    assert init.flags & Init.MAP_ALIGNMENT and 1 << init.map_alignment == PAGE
    assert init.flags & Init.HAS_INODE_DAX
    init = vmm.on(1).init(flags=0)
    assert init.map_alignment == 0 and not init.flags & (Init.MAP_ALIGNMENT | Init.HAS_INODE_DAX)


def test_a_file_is_read_and_written_through_the_window(
    vmm: Vmm, served: Daemon, nodeid: int, content: bytes
) -> None:
    vmm.map_file(nodeid, RANGE, RANGE, 4 * RANGE)
    assert vmm.load(4 * RANGE, RANGE) == content[RANGE : 2 * RANGE]
    vmm.map_file(nodeid, RANGE, RANGE, 4 * RANGE, READ | WRITE)
    assert len(vmm.requests) == 1, "an upgrade needs no message"
    vmm.store(4 * RANGE + 5, b"written")
    assert (served.shared / "file").read_bytes()[RANGE + 5 : RANGE + 12] == b"written"
    vmm.remove(nodeid, (4 * RANGE, RANGE))
    assert vmm.mapped == {}


def test_a_mapping_may_end_beyond_the_file(vmm: Vmm, served: Daemon) -> None:
    (served.shared / "short").write_bytes(b"short")
    (served.shared / "empty").write_bytes(b"")
    vmm.map_file(vmm.walk("short"), 0, RANGE, 0)
    assert vmm.load(0, 8) == b"short\0\0\0"
    vmm.map_file(vmm.walk("empty"), 10 * RANGE, RANGE, RANGE)
    # QEMU would make an empty file longer, if it could write to it.
    assert vmm.mapped == {0: (RANGE, True), RANGE: (RANGE, False)}
    os.truncate(served.shared / "short", 0)
    vmm.map_file(vmm.walk("short"), 0, RANGE, 2 * RANGE)
    assert vmm.mapped[2 * RANGE] == (RANGE, False)
    vmm.map_file(vmm.walk("short"), 0, RANGE, 2 * RANGE, READ | WRITE)
    assert vmm.mapped[2 * RANGE] == (RANGE, True)
    (served.shared / "empty").write_bytes(b"no more")
    vmm.map_file(vmm.walk("empty"), 0, RANGE, 3 * RANGE)
    assert vmm.mapped[3 * RANGE] == (RANGE, True)


def test_a_mapping_replaces_what_it_overlaps(vmm: Vmm, nodeid: int, content: bytes) -> None:
    vmm.map_file(nodeid, 0, 3 * RANGE, 0)
    vmm.map_file(nodeid, 0, PAGE, RANGE + PAGE)
    assert vmm.mapped == {
        0: (RANGE + PAGE, True),
        RANGE + PAGE: (PAGE, True),
        RANGE + 2 * PAGE: (2 * RANGE - 2 * PAGE, True),
    }
    assert vmm.load(0, RANGE + PAGE) == content[: RANGE + PAGE]
    assert vmm.load(RANGE + PAGE, PAGE) == content[:PAGE]
    assert vmm.load(RANGE + 2 * PAGE, PAGE) == content[RANGE + 2 * PAGE : RANGE + 3 * PAGE]


def test_parts_are_removed(vmm: Vmm, nodeid: int, content: bytes) -> None:
    vmm.map_file(nodeid, 0, RANGE, 0)
    vmm.map_file(nodeid, RANGE, RANGE, RANGE)
    vmm.remove(nodeid, (RANGE - PAGE, 2 * PAGE), (8 * PAGE, PAGE), (10 * RANGE, RANGE), (0, 0))
    assert vmm.mapped == {
        0: (8 * PAGE, True),
        9 * PAGE: (RANGE - 10 * PAGE, True),
        RANGE + PAGE: (RANGE - PAGE, True),
    }
    assert vmm.load(RANGE + PAGE, PAGE) == content[RANGE + PAGE : RANGE + 2 * PAGE]
    vmm.remove(nodeid)


def test_mappings_outlive_the_name_and_the_nodeid(
    vmm: Vmm, served: Daemon, nodeid: int, content: bytes
) -> None:
    vmm.map_file(nodeid, 0, RANGE, 0)
    os.unlink(served.shared / "file")
    vmm.forget(nodeid)
    vmm.remove(nodeid, (PAGE, PAGE))
    assert vmm.load(0, PAGE) == content[:PAGE] and vmm.load(2 * PAGE, PAGE) == content[2 * PAGE : 3 * PAGE]
    with refused(errno.ESTALE):
        vmm.map_file(nodeid, 0, RANGE, RANGE)


@pytest.mark.parametrize("length", [RANGE, PAGE, 7 * PAGE])
def test_random_mappings_agree_with_a_model(
    start_vmm: StartVmm, served: Daemon, content: bytes, length: int
) -> None:
    vmm = start_vmm(tells=length == RANGE)
    vmm.start_session()
    choose = random.Random(length)
    nodeids = []
    for i in range(3):
        (served.shared / f"{i}").write_bytes(content[i * PAGE :])
        nodeids.append(vmm.walk(f"{i}"))
    pages = 12 * length // PAGE
    model: list[tuple[int, int] | None] = [None] * pages  # file, page of it
    for _ in range(120):
        n = choose.randrange(1, 2 * length // PAGE)
        at = choose.randrange(pages - n)
        if choose.random() < 0.6:
            file, page = choose.randrange(3), choose.randrange(100)
            vmm.map_file(nodeids[file], page * PAGE, n * PAGE, at * PAGE, choose.choice([READ, READ | WRITE]))
            model[at : at + n] = [(file, page + i) for i in range(n)]
        else:
            vmm.remove(nodeids[0], (at * PAGE, n * PAGE))
            model[at : at + n] = [None] * n
        for at in choose.sample(range(pages), 8):
            holds = model[at]
            if holds is None:
                assert not vmm.is_mapped(at * PAGE)
            else:
                start = (sum(holds)) * PAGE
                assert vmm.load(at * PAGE, 16) == content[start : start + 16]


# ---- who may what


def test_what_is_not_mapped(vmm: Vmm, served: Daemon, nodeid: int) -> None:
    (served.shared / "dir").mkdir()
    os.mkfifo(served.shared / "fifo")
    os.symlink("file", served.shared / "link")
    for name, wanted in (("dir", errno.EISDIR), ("fifo", errno.EBADF), ("link", errno.EBADF)):
        with refused(wanted):
            vmm.map_file(vmm.walk(name), 0, RANGE, 0)
    with refused(errno.ESTALE):
        vmm.map_file(nodeid + 1000, 0, RANGE, 0)
    for foffset, length, moffset in (
        (0, RANGE, WINDOW),
        (0, RANGE, WINDOW - PAGE),
        (0, WINDOW + PAGE, 0),
        (0, RANGE, 2**64 - RANGE),
        (0, 2**64 - PAGE, PAGE),
        (0, RANGE, 100),
        (100, RANGE, 0),
        (0, 100, 0),
        (0, 0, 0),
        (2**63 - RANGE, RANGE, 0),
        (2**64 - RANGE, RANGE, 0),
    ):
        with refused(errno.EINVAL):
            vmm.map_file(nodeid, foffset, length, moffset)
    with refused(errno.EINVAL):
        vmm.map_file(nodeid, 0, RANGE, 0, 4)
    for part in ((WINDOW, PAGE), (100, PAGE), (0, 100), (PAGE, 2**64 - PAGE)):
        with refused(errno.EINVAL):
            vmm.remove(nodeid, (0, PAGE), part)
    for count in (2, 1 << 20, 2**32 - 1):
        with refused(errno.EINVAL):
            vmm.remove(nodeid, (0, PAGE), count=count)
    with refused(errno.EINVAL):
        vmm.body("SETUPMAPPING", nodeid, bytes(39))
    assert vmm.requests == []


def test_a_file_being_executed_is_mapped_for_reading(vmm: Vmm, served: Daemon) -> None:
    program = served.shared / "program"
    shutil.copy("/bin/cat", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        nodeid = vmm.walk("program")
        vmm.map_file(nodeid, 0, RANGE, 0)
        assert vmm.mapped == {0: (RANGE, False)}
        with refused(errno.ETXTBSY):
            vmm.map_file(nodeid, 0, RANGE, 0, READ | WRITE)
        assert vmm.mapped == {0: (RANGE, False)}
        process.communicate()
    vmm.map_file(nodeid, 0, RANGE, 0, READ | WRITE)
    assert vmm.mapped == {0: (RANGE, True)}, "its reason is gone"


def test_files_are_for_dax_by_size(vmm: Vmm, served: Daemon) -> None:
    (served.shared / "small").write_bytes(bytes(4095))
    (served.shared / "large").write_bytes(bytes(4096))
    (served.shared / "dir").mkdir()
    for name, flags in ((b"small", 0), (b"large", abi.ATTR_DAX), (b"dir", 0)):
        entry = vmm.lookup(1, name)
        assert entry.attr.flags == flags
        assert vmm.getattr(entry.nodeid).flags == flags


def test_files_are_for_dax_that_fill_their_ranges(daemon: StartDaemon, tmp_path: Path) -> None:
    sizes = (0, 1, RANGE - 1, RANGE, RANGE + 1, 3 * RANGE)
    for size in sizes:
        with (tmp_path / str(size)).open("wb") as file:
            file.truncate(size)
    options = ["--dax-window", "--dax-policy", "whole"]
    with contextlib.closing(Vmm(daemon(tmp_path, options=options).socket)) as vmm:
        vmm.start_session()
        marked = {size for size in sizes if vmm.lookup(1, b"%d" % size).attr.flags & abi.ATTR_DAX}
        assert marked == {RANGE, 3 * RANGE}


# linux/fs.h
FS_IOC_SETFLAGS, FS_DAX_FL = 0x40086602, 0x02000000


def test_files_are_for_dax_that_are_marked(daemon: StartDaemon, tmp_path: Path) -> None:
    for name in ("plain", "marked"):
        (tmp_path / name).write_bytes(b"content")
    with (tmp_path / "marked").open() as file:
        try:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, FS_DAX_FL.to_bytes(8, "little"))
        except OSError as problem:
            pytest.skip(f"the file system of {tmp_path} marks no files: {problem.strerror}")
    options = ["--dax-window", "--dax-policy", "inode"]
    with contextlib.closing(Vmm(daemon(tmp_path, options=options).socket)) as vmm:
        vmm.start_session()
        for name, flags in ((b"plain", 0), (b"marked", abi.ATTR_DAX)):
            entry = vmm.lookup(1, name)
            assert entry.attr.flags == vmm.getattr(entry.nodeid).flags == flags


CACHED = Init.AUTO_INVAL_DATA | Init.EXPLICIT_INVAL_DATA


@pytest.mark.parametrize(
    ("policy", "flag", "cached"),
    [((), abi.ATTR_DAX, Init.EXPLICIT_INVAL_DATA), (("--dax-policy", "never"), 0, Init.AUTO_INVAL_DATA)],
)
def test_policies(
    daemon: StartDaemon, tmp_path: Path, policy: tuple[str, ...], flag: int, cached: Init
) -> None:
    (tmp_path / "file").touch()
    with contextlib.closing(Vmm(daemon(tmp_path, options=["--dax-window", *policy]).socket)) as vmm:
        assert vmm.size == 512 * MIB
        assert vmm.init(flags=DAX_FLAGS | CACHED).flags & CACHED == cached
        assert vmm.lookup(1, b"file").attr.flags == flag
        vmm.map_file(vmm.walk("file"), 0, RANGE, 0)  # a guest may have been told dax=always


def keeps(vmm: Vmm, nodeid: int) -> bool:
    """Whether the guest keeps what it has of a file that it opens now."""
    fh, flags, _ = wire.OPEN_OUT.unpack(vmm.body("OPEN", nodeid, abi.OPEN_IN.pack(os.O_RDONLY, 0)))
    vmm.release(nodeid, fh)
    return bool(flags & Fopen.KEEP_CACHE)


def test_what_is_mapped_stays_so_when_the_file_is_opened_again(vmm: Vmm, nodeid: int) -> None:
    """Some files are mapped, the others are in the guest's cache: close-to-open is for those."""
    assert not keeps(vmm, nodeid)
    vmm.map_file(nodeid, 0, RANGE, 0)
    vmm.map_file(nodeid, RANGE, RANGE, RANGE)
    assert keeps(vmm, nodeid)
    vmm.remove(nodeid, (0, RANGE))
    assert keeps(vmm, nodeid)
    vmm.remove(nodeid, (RANGE, RANGE))
    assert not keeps(vmm, nodeid)


@pytest.mark.parametrize("flags", [DAX_FLAGS & ~Init.HAS_INODE_DAX, DAX_FLAGS & ~Init.MAP_ALIGNMENT])
def test_a_guest_that_maps_all_files_has_none_to_invalidate(
    vmm: Vmm, nodeid: int, flags: Init
) -> None:
    """Linux says so by not asking which ones; without a window in use (dax=never) it maps none."""
    maps_all = Init.MAP_ALIGNMENT in flags
    agreed = vmm.init(flags=flags | CACHED).flags & CACHED
    assert agreed == (Init.EXPLICIT_INVAL_DATA if maps_all else Init.AUTO_INVAL_DATA)
    assert keeps(vmm, vmm.walk("file")) == maps_all


def test_a_share_that_is_read_only(daemon: StartDaemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    served = daemon(tmp_path, options=["--dax-window=2M", "--readonly", "--dax-policy=inode"])
    with contextlib.closing(Vmm(served.socket)) as vmm:
        vmm.start_session()
        nodeid = vmm.walk("file")
        with refused(errno.EROFS):
            vmm.map_file(nodeid, 0, RANGE, 0, READ | WRITE)
        vmm.map_file(nodeid, 0, RANGE, 0)
        assert vmm.mapped == {0: (RANGE, False)} and vmm.load(0, 8) == b"contents"
        with refused(errno.EROFS):
            vmm.map_file(nodeid, 0, RANGE, 0, READ | WRITE)
        assert vmm.mapped == {0: (RANGE, False)}
        assert vmm.lookup(1, b"file").attr.flags == 0, "it is not marked"


# ---- buffers in the window


Elements = list[tuple[int, int]]  # gpa, bytes


def send(vmm: Vmm, request: bytes, readable: Elements, writable: Elements) -> int:
    """A chain with these elements; what is in the window is not written. Bytes used."""
    queue = vmm.queues[1]
    at = 0
    for gpa, size in readable:
        if gpa < WINDOW_GPA:
            vmm.memory.write(gpa, request[at : at + size])
        at += size
    queue.ring.add(readable, writable, 7)
    queue.ring.publish()
    queue.kick_always()
    while (used := queue.ring.pop_used()) is None:
        if not queue.ring.enable_call():
            assert readable_fd(queue.call_fd, 10), "no call"
    return used[1]


def test_the_largest_request_with_its_data_in_the_window(
    vmm: Vmm, served: Daemon, nodeid: int, content: bytes
) -> None:
    size = MAX_PAGES * PAGE
    vmm.map_file(nodeid, 0, 2 * RANGE, 0, WRITE)
    (served.shared / "large").write_bytes(content[RANGE:][:size])
    large = vmm.walk("large")
    args = wire.read_in(vmm.open(large), 0, size)
    base = vmm.queues[1].arena
    request = wire.in_header(NUMBER["READ"], 9, large, len(args)) + args
    chain = [(base + PAGE, 16), (WINDOW_GPA, 2 * RANGE)]
    assert send(vmm, request, [(base, len(request))], chain) == 16 + size
    assert (served.shared / "file").read_bytes()[:size] == content[RANGE:][:size]


def test_buffers_in_the_window(vmm: Vmm, served: Daemon, nodeid: int, content: bytes) -> None:
    """They work; where the file has become shorter each such request fails, and nothing else."""
    vmm.map_file(nodeid, 0, RANGE, 0)
    path = served.shared / "other"
    path.write_bytes(content[: 2 * PAGE])
    other = vmm.walk("other")
    handle = vmm.open(other, os.O_RDWR)
    base, window = vmm.queues[1].arena, WINDOW_GPA
    reply = base + 2 * PAGE

    def header(op: str, size: int) -> bytes:
        return wire.in_header(NUMBER[op], 9, other, size)

    read = wire.read_in(handle, 0, 2 * PAGE)
    write = wire.WRITE_IN.pack(handle, 0, 2 * PAGE, 0, 0, 0, 0)
    reading, writing = header("READ", 40) + read, header("WRITE", 40 + 2 * PAGE) + write
    assert send(vmm, reading, [(base, 80)], [(reply, 16), (window + PAGE, 2 * PAGE)]) == 16 + 2 * PAGE
    assert vmm.load(0, 3 * PAGE) == content[:PAGE] + content[: 2 * PAGE]
    assert (
        send(vmm, reading, [(base, 80)], [(reply, 16), (base + PAGE, PAGE), (window, PAGE)]) == 16 + 2 * PAGE
    )
    assert vmm.load(0, PAGE) == content[PAGE : 2 * PAGE]
    assert send(vmm, writing, [(base, 80), (window, 2 * PAGE)], [(reply, 24)]) == 24
    assert path.read_bytes() == content[PAGE : 2 * PAGE] + content[:PAGE]
    path.write_bytes(content[: 2 * PAGE])
    os.truncate(served.shared / "file", 0)
    for request, readable, writable in (
        (reading, [(base, 80)], [(reply, 16), (window, 2 * PAGE)]),
        (reading, [(base, 80)], [(reply, 16), (base + PAGE, PAGE), (window, PAGE)]),
        (reading, [(base, 80)], [(reply, 16), (window, PAGE), (base + PAGE, PAGE)]),
        (reading, [(base, 40), (window, 40)], [(reply, 16), (base + PAGE, PAGE)]),
        (writing, [(base, 80), (window, 2 * PAGE)], [(reply, 24)]),
        (writing, [(base, 80), (window, PAGE), (base + PAGE, PAGE)], [(reply, 24)]),
    ):
        assert send(vmm, request, readable, writable) == 16
        assert wire.OUT_HEADER.unpack(vmm.memory.read(reply, 16)) == (16, -errno.EFAULT, 9)
    for readable, writable in (
        ([(base, 80)], [(window, 16), (base + PAGE, 2 * PAGE)]),
        ([(base, 80)], [(reply, 8), (window, 8), (base + PAGE, 2 * PAGE)]),
        ([(window, 80)], [(reply, 16), (base + PAGE, 2 * PAGE)]),
        ([(base, 20), (window, 60)], [(reply, 16), (base + PAGE, 2 * PAGE)]),
    ):
        assert send(vmm, reading, readable, writable) == 0, "there is nobody to answer"
    forget = wire.in_header(NUMBER["FORGET"], 9, other, 8) + wire.FORGET_IN.pack(1)
    assert send(vmm, forget, [(base, 40), (window, 8)], []) == 0
    assert path.read_bytes() == content[: 2 * PAGE]
    assert vmm.getattr(other).size == 2 * PAGE
    assert not vmm.queues[1].broken(0)
    vmm.release(other, handle)


# ---- the window ends


@pytest.mark.parametrize("end", ["destroy", "init", "reset"])
def test_the_end_of_a_session_empties_the_window(vmm: Vmm, served: Daemon, nodeid: int, end: str) -> None:
    vmm.map_file(nodeid, 0, RANGE, 0)
    vmm.map_file(nodeid, 0, PAGE, RANGE)
    if end == "destroy":
        vmm.destroy()
    elif end == "init":
        vmm.start_session()
    else:
        with vmm.busy() as frontend:
            frontend.set_status(0, ack=True)
    assert eventually(lambda: vmm.mapped == {})
    assert [path for path in served.descriptors() if path.startswith(f"{served.shared}/f")] == []


def test_as_many_mappings_as_the_front_end_can_have(vmm: Vmm, served: Daemon, nodeid: int) -> None:
    for i in range(448):
        vmm.map_file(nodeid, 0, PAGE, 2 * i * PAGE)
    with refused(errno.ENOSPC):
        vmm.map_file(nodeid, 0, PAGE, 2 * 448 * PAGE)
    vmm.map_file(nodeid, PAGE, PAGE, 0)  # in place of one
    vmm.map_file(nodeid, 0, 4 * PAGE, 0)  # of two
    vmm.map_file(nodeid, 0, PAGE, 2 * 448 * PAGE)
    with refused(errno.ENOSPC):
        vmm.remove(nodeid, (PAGE, PAGE))  # would make two of one
    assert len(vmm.mapped) == 448
    vmm.remove(nodeid, (0, WINDOW))
    assert vmm.mapped == {}


# ---- front ends


def test_a_front_end_without_a_window(start_vmm: StartVmm) -> None:
    vmm = start_vmm(order="qemu")
    assert not vmm.init(flags=DAX_FLAGS).flags & Init.MAP_ALIGNMENT
    with refused(errno.ENOSYS):
        vmm.map_file(1, 0, RANGE, 0)
    with refused(errno.ENOSYS):
        vmm.remove(1)


def test_a_front_end_that_refuses(vmm: Vmm, nodeid: int, content: bytes) -> None:
    vmm.answer = lambda request: 12
    with refused(errno.EIO):
        vmm.map_file(nodeid, 0, RANGE, 0)
    vmm.answer = None
    vmm.map_file(nodeid, 0, RANGE, 0)
    assert vmm.load(0, 16) == content[:16]


def test_a_front_end_that_has_dropped_a_mapping_itself(vmm: Vmm, nodeid: int) -> None:
    vmm.map_file(nodeid, 0, RANGE, 0)
    vmm._unmap(vmm.requests[0][1])
    vmm.remove(nodeid, (0, RANGE))
    vmm.map_file(nodeid, 0, RANGE, 0)
    assert vmm.mapped == {0: (RANGE, True)}


def test_a_front_end_that_closes_the_channel(vmm: Vmm, served: Daemon, nodeid: int) -> None:
    def close(request: ShmemMap) -> int:
        raise messages.PeerClosed

    vmm.answer = close
    token = vmm.queues[1].submit("SETUPMAPPING", nodeid, setupmapping(0, RANGE, 0))
    vmm._thread.join()
    vmm.frontend._close_channel()
    assert vmm.queues[1].wait(token).error == errno.ENODEV
    with refused(errno.ENOSYS):
        vmm.map_file(nodeid, 0, RANGE, 0)
    assert vmm.lookup(1, b"file").nodeid == nodeid


def test_a_queue_is_stopped_while_the_front_end_has_not_answered(vmm: Vmm, nodeid: int) -> None:
    """As QEMU stopping the machine: it waits for GET_VRING_BASE and answers nothing meanwhile."""
    queue = vmm.queues[1]
    with vmm.busy() as frontend:
        token = queue.submit("SETUPMAPPING", nodeid, setupmapping(0, RANGE, 0))
        assert frontend.channel is not None
        assert select.select([frontend.channel], [], [], 10)[0]
        base = frontend.get_vring_base(1)
    assert queue.wait(token).error == errno.EAGAIN
    # The front end does it after all: what it has is taken out before anything else goes there.
    assert eventually(lambda: vmm.mapped == {0: (RANGE, True)})
    with vmm.busy():
        queue.start(base)
    vmm.map_file(nodeid, RANGE, PAGE, PAGE)
    assert vmm.mapped == {PAGE: (PAGE, True)}


def test_messages_that_pause_a_queue_while_the_front_end_has_not_answered(vmm: Vmm, nodeid: int) -> None:
    """As QEMU masking an interrupt, or plugging memory in, before it looks at the channel."""

    def pause(request: ShmemMap) -> int:
        queue = vmm.queues[1]
        vmm.frontend.set_vring_call(1, queue.call_fd, ack=True)
        vmm.add_region(0x30_0000_0000, MIB)
        return 0

    vmm.answer = pause
    vmm.map_file(nodeid, 0, RANGE, 0)
    assert vmm.mapped == {0: (RANGE, True)}


def test_a_front_end_that_sends_all_of_memory_with_each_mapping(
    start_vmm: StartVmm, served: Daemon, content: bytes
) -> None:
    """As QEMU without CONFIGURE_MEM_SLOTS: no queue is stopped for it, nor is it waited for."""
    vmm = start_vmm(order="qemu-table")
    vmm.start_session()
    (served.shared / "file").write_bytes(content)
    nodeid = vmm.walk("file")
    for i in range(3):
        vmm.map_file(nodeid, i * RANGE, RANGE, i * RANGE)
        assert vmm.load(i * RANGE, RANGE) == content[i * RANGE : (i + 1) * RANGE]
    vmm.remove(nodeid, (0, 3 * RANGE))
    assert vmm.mapped == {}


def test_the_window_of_another_device(vmm: Vmm, served: Daemon, nodeid: int, tmp_path: Path) -> None:
    """QEMU tells every device of all mappings: they come and go without stopping a queue."""
    path = tmp_path / "file"
    path.write_bytes(bytes(RANGE))
    fd = os.open(path, os.O_RDWR)
    theirs = SharedRegion(Region(0x50_0000_0000, RANGE, 0x7C00_0000_0000, 0), fd)
    mapped: list[int] = []

    def count() -> None:
        mapped.append(Path(f"/proc/{served.server}/maps").read_text().count(str(path)))

    def tell(request: ShmemMap) -> int:
        vmm.frontend.add_mem_reg(theirs, ack=True)
        count()
        vmm.frontend.rem_mem_reg(theirs.region, ack=True)
        count()
        return 0

    vmm.answer = tell
    vmm.map_file(nodeid, 0, RANGE, 0)
    vmm.remove(nodeid, (0, RANGE))
    os.close(fd)
    assert mapped == [1, 0, 1, 0]


def test_many_at_once(start_vmm: StartVmm, served: Daemon, content: bytes) -> None:
    """More than a queue may have under way elsewhere."""
    vmm = start_vmm(request_queues=2)
    vmm.start_session()
    (served.shared / "file").write_bytes(content)
    nodeid = vmm.walk("file")
    tokens = []
    for i in range(160):
        queue = vmm.queues[1 + i % 2]
        args = setupmapping(i * PAGE, PAGE, i * PAGE)
        tokens.append((queue, queue.submit("SETUPMAPPING", nodeid, args)))
    assert [queue.wait(token).error for queue, token in tokens] == [0] * 160
    assert vmm.mapped == {i * PAGE: (PAGE, True) for i in range(160)}
    assert vmm.load(159 * PAGE, PAGE) == content[159 * PAGE : 160 * PAGE]


def test_mapped_files_are_within_the_budget(daemon: StartDaemon, tmp_path: Path) -> None:
    budget = 64
    for i in range(100):
        (tmp_path / str(i)).write_bytes(bytes(PAGE))
    served = daemon(tmp_path, options=["--dax-window", "1G", "--fd-budget", str(budget)])
    with contextlib.closing(Vmm(served.socket)) as vmm:
        vmm.tells = False
        vmm.start_session()
        nodeids = [vmm.walk(str(i)) for i in range(100)]
        mapped = 0
        with refused(errno.ENFILE):
            for nodeid in nodeids:
                vmm.map_file(nodeid, 0, PAGE, mapped * RANGE)
                mapped += 1
        assert mapped > budget // 2 and len(held(served)) <= budget
        vmm.remove(nodeids[0], (0, PAGE))
        vmm.map_file(nodeids[-1], 0, PAGE, 0)
        with refused(errno.ENFILE):
            vmm.map_file(nodeids[-2], 0, PAGE, mapped * RANGE)


def test_a_large_window_is_offered_without_slots(daemon: StartDaemon, tmp_path: Path) -> None:
    """Else QEMU would count each mapping as one of its 512 regions."""
    (tmp_path / "file").touch()
    with contextlib.closing(Vmm(daemon(tmp_path, options=["--dax-window", "1G"]).socket)) as vmm:
        assert not vmm.slots
        vmm.tells = False
        vmm.start_session()
        nodeid = vmm.walk("file")
        for i in range(512):
            vmm.map_file(nodeid, i * RANGE, RANGE, i * RANGE)
        assert len(vmm.mapped) == 512


def test_memory_from_a_named_file_is_memory(vmm: Vmm, tmp_path: Path) -> None:
    """A DIMM or persistent memory that QEMU has from a file, plugged in beside a window."""
    gpa, size = 0x50_0000_0000, 1 << 16
    path = tmp_path / "dimm"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    plugged = SharedRegion(Region(gpa, size, UVA_OFFSET + gpa, 0), fd)
    vmm.memory.add(fd, *plugged.region)
    vmm.frontend.add_mem_reg(plugged, ack=True)
    queue = vmm.queue
    top, end, queue._top, queue.end = queue._top, queue.end, gpa, gpa + size
    vmm.statfs()
    queue._top, queue.end = top, end
    vmm.frontend.rem_mem_reg(plugged.region, ack=True)
    vmm.memory.remove(*plugged.region[:3])
    os.close(fd)
    vmm.statfs()
