from collections.abc import Sequence
from typing import final

from vfsd.guest.driver._transport import Transport

@final
class Bridge:
    """The host kernel's /dev/fuse joined to the queues of a device.

    fds: /dev/fuse and clones of it (FUSE_DEV_IOC_CLONE), one for each thread that is to call run().
    init_fd, end_fd: eventfds, written once each: INIT has been answered, the last thread has ended.
    All descriptors stay the caller's, and open until the transport is closed. ValueError: no more
    slots than threads, or pages too few for what Linux asks of a read buffer.
    """

    def __new__(cls, transport: Transport, fds: Sequence[int], init_fd: int, end_fd: int) -> Bridge: ...
    def run(self, thread: int) -> None:
        """Carry requests until the kernel has no more: the file system is unmounted, its connection
        aborted, or the transport closed. Once for each descriptor, in a thread of its own."""
    @property
    def init(self) -> int | None:
        """None: INIT is not answered; 0: the kernel has its reply; else -errno."""
    @property
    def running(self) -> int:
        """Threads that have not ended; those that have not begun count."""
    @property
    def ended(self) -> int:
        """The errno that ended a thread, if it is not one that unmounting or aborting gives; else 0."""
    def counters(self) -> dict[str, int]:
        """forgets, interrupts: frames dropped on the way. refused: requests that no queue can carry,
        or replies that the kernel refused."""
