"""FUSE_INIT and FUSE_DESTROY: what is agreed with the guest's kernel, and when a session begins and ends."""

import contextlib
import logging
from collections.abc import Callable
from errno import EPROTO
from threading import Lock, Thread
from typing import Any, NamedTuple, Protocol

from vfsd.fuse import abi
from vfsd.fuse.abi import Init
from vfsd.fuse.dispatch import Dispatch, Request
from vfsd.fuse.opcodes import NUMBER

log = logging.getLogger("vfsd.fuse")

# Room for the headers and arguments of a READ or WRITE beside its pages: FUSE_HEADER_OVERHEAD
# of fs/fuse/virtio_fs.c.
HEADER_ELEMENTS = 4
# 4 MiB. Linux takes as much as its sysctl fs.fuse.max_pages_limit says, 256 unless it was raised.
MAX_PAGES = 1024
# The pages are the guest's, of whatever size Linux has them; and what is no page: headers, arguments, names.
PAGE_SIZE_MAX = 1 << 16
HEADERS_MAX = 1 << 16
MAX_BACKGROUND = 64
CONGESTION_THRESHOLD = 48


class Offer(NamedTuple):
    """What this side would agree to.

    queue_size: the smallest request queue, in elements. required: flags without which there is no session.
    map_alignment: log2 of bytes, with MAP_ALIGNMENT. settle: what is agreed on, of what both sides can do
    and what the guest can do.
    """

    flags: Init
    queue_size: int
    required: Init
    map_alignment: int
    settle: Callable[[Init, Init], Init]


class Agreed(NamedTuple):
    """The outcome of INIT."""

    minor: int
    flags: Init
    max_pages: int


def negotiate(request: Request, offer: Offer) -> tuple[bytes, Agreed | None]:
    """The INIT reply, and what it agrees on; None when a newer major must ask again.

    OSError EPROTO: the guest is too old, or lacks what the operator insists on.
    """
    major, minor, readahead, flags = request.take(abi.INIT_IN_MIN)
    if major > abi.KERNEL_VERSION:
        return init_out(abi.KERNEL_MINOR_VERSION, 0, Init(0), 0, 0), None
    if major < abi.KERNEL_VERSION or minor < abi.KERNEL_MINOR_VERSION_MIN:
        log.error("the guest speaks FUSE %d.%d, 7.%d is the oldest", major, minor,
                  abi.KERNEL_MINOR_VERSION_MIN)  # fmt: skip
        raise OSError(EPROTO, "FUSE version too old")
    if flags & Init.INIT_EXT:
        flags |= request.take(abi.INIT_FLAGS2)[0] << 32
    if offer.required & ~flags:
        log.error("the guest lacks %r, which must not be done without", offer.required & ~flags)
        raise OSError(EPROTO, "a required feature is missing")
    # A chain is never longer than its queue, with indirect descriptors neither (virtio 1.3, 2.7.5.3);
    # Linux before 5.13 does not see to that.
    max_pages = max(1, min(MAX_PAGES, offer.queue_size - HEADER_ELEMENTS))
    settled = offer.settle(offer.flags & flags, Init(flags))
    agreed = Agreed(min(minor, abi.KERNEL_MINOR_VERSION), settled, max_pages)
    alignment = offer.map_alignment if Init.MAP_ALIGNMENT in agreed.flags else 0
    return init_out(agreed.minor, readahead, agreed.flags, max_pages, alignment), agreed


def init_out(minor: int, readahead: int, flags: Init, max_pages: int, map_alignment: int) -> bytes:
    return abi.INIT_OUT.pack(
        abi.KERNEL_VERSION, minor, readahead, flags & 0xFFFFFFFF,
        MAX_BACKGROUND, CONGESTION_THRESHOLD, max_pages * abi.PAGE_SIZE,
        1,  # time_gran: nanoseconds
        max_pages, map_alignment, flags >> 32,
    )  # fmt: skip


class Remembers(Protocol):
    """What has been agreed, as a `vfsd.state._journal.State` does."""

    agreed: tuple[int, int, int] | None


class Session:
    """The time between INIT and DESTROY of one connection.

    state: remembers what was agreed, for the next server; what it remembers holds from the beginning.
    offer: asked at each INIT. agree: told what it came to, before any other request. drop: forgets
    all that the guest held; that closes files, and may take as long as the file system likes.
    """

    def __init__(
        self, dispatch: Dispatch, offer: Callable[[], Offer], agree: Callable[[Init], None],
        drop: Callable[[], None], state: Remembers | None = None,
    ) -> None:  # fmt: skip
        self._state = state
        self.agreed: Agreed | None = None
        self._dispatch = dispatch
        self._offer = offer
        self._agree = agree
        self._drop = drop
        self._turn = Lock()  # of one that begins or ends a session
        self._number = 0  # sessions so far
        dispatch.set_python(NUMBER["INIT"], self.init)
        dispatch.set_python(NUMBER["DESTROY"], self.destroy)
        if state is not None and state.agreed is not None:
            minor, flags, max_pages = state.agreed
            self._begin(Agreed(minor, Init(flags), max_pages))

    def init(self, _fs: Any, request: Request) -> bytes:
        with self._turn:
            self._end()
            reply, self.agreed = negotiate(request, self._offer())
            if self.agreed is not None:
                log.info("session begins: FUSE 7.%d, %d pages a request",
                         self.agreed.minor, self.agreed.max_pages)  # fmt: skip
                log.debug("agreed: %r", self.agreed.flags)
                self._begin(self.agreed)
            return reply

    def _begin(self, agreed: Agreed) -> None:
        self.agreed = agreed
        self._number += 1
        self._agree(agreed.flags)
        if self._state is not None:
            self._state.agreed = agreed
        self._dispatch.open(agreed.max_pages * PAGE_SIZE_MAX + HEADERS_MAX)

    def destroy(self, _fs: Any, _request: Request) -> None:
        self.end()

    def end(self) -> None:
        """What DESTROY, a reset and the loss of the connection mean alike."""
        with self._turn:
            self._end()

    def reset(self) -> None:
        """end(), of which only the end of all requests is waited for: the rest is up to another thread, or
        where none can be had to the next INIT."""
        self._dispatch.shut()
        with contextlib.suppress(RuntimeError, MemoryError):
            Thread(target=self._end_if, args=(self._number,), name="reset", daemon=True).start()

    def _end_if(self, number: int) -> None:
        with self._turn:
            if number == self._number:
                self._end()

    def _end(self) -> None:
        self._dispatch.shut()
        self.agreed = None
        if self._state is not None:
            self._state.agreed = None
        self._drop()
