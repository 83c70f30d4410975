"""One daemon for the tests of a file, and raw guests that connect to it."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import Daemon, StartDaemon, eventually

from .rawguest import Guest

StartGuest = Callable[..., Guest]
LEFT = "the front end has left"


@pytest.fixture(scope="module")
def served(module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """Shares `share`; `outside`, beside it, is what nobody may touch."""
    base = tmp_path_factory.mktemp("fuse")
    (base / "share").mkdir(mode=0o755)
    (base / "outside").mkdir()
    return module_daemon(base / "share", options=["--xattr", "--flock", "--posix-lock"])


@pytest.fixture
def share(served: Daemon) -> Iterator[Path]:
    """The shared directory, empty."""
    yield served.shared
    for entry in os.scandir(served.shared):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


@pytest.fixture
def outside(served: Daemon) -> Path:
    return served.shared.parent / "outside"


def held(daemon: Daemon) -> list[str]:
    """What the daemon has open below its share."""
    below = f"{daemon.shared}/"
    return [path.removeprefix(below) for path in daemon.descriptors() if path.startswith(below)]


@contextlib.contextmanager
def guests_of(daemon: Daemon) -> Iterator[StartGuest]:
    """Starts guests; at the end the daemon has seen them off and has said nothing bad."""
    guests: list[Guest] = []
    log_start = len(daemon.log)
    with contextlib.ExitStack() as stack:

        def start(**arguments: Any) -> Guest:
            guest = Guest(daemon.socket, **arguments)
            guests.append(guest)
            stack.callback(guest.close)
            return guest

        yield start
    assert eventually(lambda: daemon.log.count(LEFT, log_start) == len(guests)), "it keeps guests that left"
    assert "Traceback" not in daemon.log[log_start:], daemon.log[log_start:]


@pytest.fixture
def start_guest(served: Daemon, share: Path) -> Iterator[StartGuest]:
    """Starts guests that have not said INIT. Arguments: Guest's, but for the socket."""
    with guests_of(served) as start:
        yield start


@pytest.fixture
def guest(start_guest: StartGuest) -> Guest:
    """One that has."""
    guest = start_guest()
    guest.init()
    return guest
