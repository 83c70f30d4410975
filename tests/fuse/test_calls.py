"""A guest that was called for a reply looks at its used ring; one that does not has missed the call."""

import os
import select
from pathlib import Path

from guests import StartDaemon

from .conftest import guests_of
from .rawguest import TIMEOUT_S, GuestQueue
from .wire import ROOT

POLL_US = 1000  # the daemon calls again at the end of it
AGAIN_S = 0.1
BUSY = 50  # requests, so that the daemon polls
TRIES = 100  # it does not poll on a machine that is busy


def calls(queue: GuestQueue, timeout_s: float) -> int:
    """How often the guest has been called since the last time, waiting for it if it was not."""
    return os.eventfd_read(queue.call_fd) if select.select([queue.call_fd], [], [], timeout_s)[0] else 0


def calls_for_one(queue: GuestQueue) -> int:
    """How often the guest, busy until then, is called for a reply that it does not look at."""
    for _ in range(BUSY):
        assert queue.ask("GETATTR", ROOT, bytes(16)).error == 0
    assert not queue.ring.enable_call()  # nothing is there yet
    calls(queue, 0)
    token = queue.submit("GETATTR", ROOT, bytes(16))
    seen = calls(queue, TIMEOUT_S)
    while seen and (more := calls(queue, AGAIN_S)):
        seen += more
    assert queue.wait(token).error == 0
    return seen


def test_a_guest_that_does_not_look_is_called_again(module_daemon: StartDaemon, tmp_path: Path) -> None:
    """Once: user-mode Linux loses a call that arrives as it goes idle."""
    daemon = module_daemon(tmp_path, options=["--poll-us", str(POLL_US)])
    with guests_of(daemon) as start:
        guest = start()
        guest.init()
        for _ in range(TRIES):
            seen = calls_for_one(guest.queue)
            if seen != 1:
                break
        assert seen == 2
