"""What the host answers with an errno that FUSE has no room for (fs/fuse/dev.c), whatever is asked."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from answering import answering
from guests import Daemon

from .fixtures import guests_of
from .rawguest import Guest
from .requests import Held, hold, request_for

ERESTARTSYS, EIOCBQUEUED = 512, 529  # linux/errno.h: within a kernel, but some file systems let them out

# The calls that these operations come to, and that a daemon makes for nothing else.
CALLS = {
    "READLINK": "readlinkat",
    "SYMLINK": "symlinkat",
    "MKNOD": "mknodat",
    "MKDIR": "mkdirat",
    "UNLINK": "unlinkat",
    "RMDIR": "unlinkat",
    "RENAME": "renameat",
    "RENAME2": "renameat2",
    "LINK": "linkat",
    "READ": "preadv2",
    "WRITE": "pwritev2",
    "FSYNC": "fdatasync",
    "FSYNCDIR": "fsync",
    "SYNCFS": "syncfs",
    "FALLOCATE": "fallocate",
    "COPY_FILE_RANGE": "copy_file_range",
    "COPY_FILE_RANGE_64": "copy_file_range",
}


@pytest.fixture(params=[511, ERESTARTSYS, EIOCBQUEUED, 4095])
def given(request: pytest.FixtureRequest) -> int:
    """What the host answers each of CALLS."""
    return int(request.param)


@pytest.fixture
def met(given: int, tmp_path: Path) -> Iterator[tuple[Guest, Held]]:
    (tmp_path / "share").mkdir()
    errnos = dict.fromkeys(CALLS.values(), given)
    with Daemon(tmp_path / "share", before=answering(**errnos)) as daemon, guests_of(daemon) as start:
        guest = start()
        guest.init()
        yield guest, hold(guest, tmp_path / "share")


def test_what_no_guest_has_a_name_for_is_eio(met: tuple[Guest, Held], given: int) -> None:
    guest, held = met
    expected = given if given < ERESTARTSYS else errno.EIO
    found = {}
    for name in CALLS:
        nodeid, body, out = request_for(name, held)
        found[name] = guest.queue.ask(name, nodeid, body, out=out).error
    assert found == dict.fromkeys(CALLS, expected)
