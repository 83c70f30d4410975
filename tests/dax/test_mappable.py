"""--dax-policy auto, the default: a guest maps what its front end can, and reads the rest by request."""

import contextlib
import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.ops import refused
from guests import StartDaemon, eventually

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.guest import mount
from vfsd.guest.driver import device
from vfsd.guest.driver._window import WindowMemory
from vfsd.vhost.messages import SHMEM_MAP, BackendRequest, Message, ShmemMap

from .vmm import DAX_FLAGS, WRITE, Refuses, Vmm, as_qemu, past_the_end, read_only

RANGE = abi.DAX_RANGE
SIZES = (0, 1, RANGE - 1, RANGE, RANGE + 1, 3 * RANGE)
ALL = set(SIZES)
WHOLE = {RANGE, 3 * RANGE}
MAPS_ALL = DAX_FLAGS & ~Init.HAS_INODE_DAX  # dax=always
REFUSAL = "are EIO; "


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for size in SIZES:
        (tmp_path / str(size)).write_bytes(os.urandom(size))
    return tmp_path


def marked(vmm: Vmm) -> set[int]:
    return {size for size in SIZES if vmm.lookup(1, b"%d" % size).attr.flags & abi.ATTR_DAX}


def everything(request: ShmemMap, fd: int) -> bool:
    return True


def nothing(request: ShmemMap, fd: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("refuses", "options", "expected"),
    [
        (nothing, (), ALL),
        (nothing, ("--readonly",), ALL),
        (nothing, ("--dax-policy", "auto"), ALL),
        (as_qemu, (), WHOLE),
        (as_qemu, ("--readonly",), set()),
        (past_the_end, ("--readonly",), WHOLE),
        (read_only, (), WHOLE),
        (everything, (), set()),
        (as_qemu, ("--dax-policy", "always"), ALL),
        (as_qemu, ("--dax-policy", "size:1"), ALL - {0}),
    ],
)
def test_what_the_front_end_can_map_is_for_dax(
    daemon: StartDaemon, files: Path, refuses: Refuses, options: tuple[str, ...], expected: set[int]
) -> None:
    served = daemon(files, options=["--dax-window", *options])
    with contextlib.closing(Vmm(served.socket, refuses=refuses)) as vmm:
        vmm.start_session()
        assert marked(vmm) == expected
        assert vmm.mapped == {}, "what was tried is undone"
        if "--dax-policy" not in options or "auto" in options:
            for size in expected:
                vmm.map_file(vmm.walk(str(size)), max(0, size - RANGE) & -RANGE, RANGE, 0)
                assert vmm.mapped.keys() == {0}


@pytest.mark.parametrize("refuses", [as_qemu, nothing])
def test_a_guest_that_maps_some_keeps_a_cache_of_the_others(
    daemon: StartDaemon, files: Path, refuses: Refuses
) -> None:
    """It has to be told of new times; one that maps all must not (see test_daemon)."""
    cached = Init.AUTO_INVAL_DATA | Init.EXPLICIT_INVAL_DATA
    served = daemon(files, options=["--dax-window"])
    with contextlib.closing(Vmm(served.socket, refuses=refuses)) as vmm:
        agreed = vmm.init(flags=DAX_FLAGS | cached).flags & cached
        assert agreed == (Init.EXPLICIT_INVAL_DATA if refuses is nothing else Init.AUTO_INVAL_DATA)


def test_each_session_finds_out_anew(daemon: StartDaemon, files: Path) -> None:
    served = daemon(files, options=["--dax-window"])
    with contextlib.closing(Vmm(served.socket, refuses=as_qemu)) as vmm:
        vmm.start_session()
        assert marked(vmm) == WHOLE
        vmm.map_file(vmm.walk(str(RANGE)), 0, RANGE, 0)
        vmm.refuses = nothing
        vmm.start_session()
        assert marked(vmm) == ALL
        vmm.init(flags=DAX_FLAGS & ~Init.MAP_ALIGNMENT)  # dax=never
        assert marked(vmm) == set()


def test_what_can_not_be_written_is_not_for_dax_where_all_is_mapped_for_writing(
    daemon: StartDaemon, files: Path
) -> None:
    """A share that vfsd serves as a user for whom a file is read-only."""
    (files / str(RANGE)).chmod(0o444)
    served = daemon(files, options=["--dax-window", "--modcaps=-dac_override:-dac_read_search"])
    with contextlib.closing(Vmm(served.socket, refuses=as_qemu)) as vmm:
        vmm.start_session()
        assert marked(vmm) == {3 * RANGE}
        (files / str(RANGE)).chmod(0o644)
        assert marked(vmm) == WHOLE


# ---- a guest, or an operator, that will not leave it to the daemon


@pytest.mark.parametrize(
    ("flags", "policy", "remedy"),
    [
        (MAPS_ALL, (), "mount with -o dax=inode"),
        (MAPS_ALL, ("--dax-policy", "whole"), "mount with -o dax=inode"),
        (MAPS_ALL, ("--dax-policy", "always"), "mount with -o dax=inode"),
        (DAX_FLAGS, ("--dax-policy", "always"), "use --dax-policy auto"),
    ],
)
def test_a_guest_that_maps_what_the_front_end_refuses_gets_one_line(
    daemon: StartDaemon, files: Path, flags: Init, policy: tuple[str, ...], remedy: str
) -> None:
    served = daemon(files, options=["--dax-window", *policy])
    with contextlib.closing(Vmm(served.socket, refuses=as_qemu)) as vmm:
        vmm.init(flags=flags)
        with refused(errno.EIO):
            vmm.map_file(vmm.walk("1"), 0, RANGE, 0)
    assert eventually(lambda: "the front end has left" in served.log)
    (line,) = [line for line in served.log.splitlines() if REFUSAL in line]
    assert remedy in line and "docs/dax.md" in line


@pytest.mark.parametrize(
    ("refuses", "flags", "policy"),
    [
        (nothing, MAPS_ALL, ()),
        (nothing, DAX_FLAGS, ("--dax-policy", "always")),
        (as_qemu, DAX_FLAGS, ()),
        (as_qemu, MAPS_ALL & ~Init.MAP_ALIGNMENT, ()),
    ],
)
def test_nobody_is_warned_who_maps_no_more_than_that(
    daemon: StartDaemon, files: Path, refuses: Refuses, flags: Init, policy: tuple[str, ...]
) -> None:
    served = daemon(files, options=["--dax-window", *policy])
    with contextlib.closing(Vmm(served.socket, refuses=refuses)) as vmm:
        vmm.init(flags=flags)
    assert eventually(lambda: "the front end has left" in served.log)
    assert REFUSAL not in served.log


# ---- front ends that do not answer


def test_a_queue_that_is_stopped_while_it_is_tried(daemon: StartDaemon, files: Path) -> None:
    """The front end waits for GET_VRING_BASE and answers nothing meanwhile: INIT gives up waiting."""
    served = daemon(files, options=["--dax-window"])
    with contextlib.closing(Vmm(served.socket)) as vmm:
        queue = vmm.queues[1]
        with vmm.busy() as frontend:
            args = abi.INIT_IN.pack(7, 38, 0, DAX_FLAGS & 0xFFFFFFFF, DAX_FLAGS >> 32)
            token = queue.submit("INIT", 0, args)
            assert frontend.channel is not None
            assert select.select([frontend.channel], [], [], 10)[0]
            base = frontend.get_vring_base(1)
        assert queue.wait(token).error == 0
        with vmm.busy():
            queue.start(base)
        assert marked(vmm) == set(), "all can be read by request"
        assert eventually(lambda: bool(vmm.mapped)), "the front end has done it after all"
        vmm.map_file(vmm.walk("1"), 0, RANGE, 0, WRITE)
        assert vmm.mapped == {0: (RANGE, True)}
        vmm.start_session()
        assert marked(vmm) == ALL
    assert "what the front end can map is not known" in served.log


def test_a_front_end_that_closes_the_channel_while_it_is_tried(daemon: StartDaemon, files: Path) -> None:
    served = daemon(files, options=["--dax-window"])
    with contextlib.closing(Vmm(served.socket)) as vmm:
        with vmm.busy() as frontend:
            frontend._close_channel()
        vmm.start_session()
        assert marked(vmm) == set()


# ---- our own guest, whose front end maps as QEMU does


def mapping_as_qemu(do: Callable[[WindowMemory | None, Message], int]) -> Callable[..., int]:
    def map_shared(window: WindowMemory | None, message: Message) -> int:
        asked = ShmemMap._make(SHMEM_MAP.unpack(message.payload))
        if message.request == BackendRequest.SHMEM_MAP and as_qemu(asked, message.fds[0]):
            return errno.EIO
        return do(window, message)

    return map_shared


@pytest.mark.parametrize("options", ["", "dax=inode"])
def test_nothing_is_eio_for_a_guest_of_such_a_front_end(
    daemon: StartDaemon, files: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "map_shared", mapping_as_qemu(device.map_shared))
    served = daemon(files, options=["--dax-window", "64M"])
    with mount(served.socket, options=options, order="qemu-generic") as fs:
        for size in SIZES:
            host = files / str(size)
            with fs.open(f"/{size}", "rb+") as file:
                assert file.read() == host.read_bytes()
                file.seek(size // 2)
                file.write(b"written")
            assert host.read_bytes()[size // 2 :].startswith(b"written")
        assert fs.stats()["dax"]["free"] == 4, "ranges of the files that can be mapped"
