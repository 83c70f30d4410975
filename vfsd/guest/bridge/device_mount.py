"""A device's file system as a mount of this host: the kernel's /dev/fuse joined to its queues.

What ends a mount: the operator unmounts it, this process is told to stop, or the daemon goes. Each
way every waiting caller gets an answer, the daemon a DESTROY if it still lives, and no mount is left.
"""

import contextlib
import errno
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from vfsd.fuse.opcodes import NUMBER
from vfsd.guest.bridge import mounting
from vfsd.guest.bridge._bridge import Bridge
from vfsd.guest.bridge.mounting import MNT_DETACH, MNT_FORCE, Mounted
from vfsd.guest.driver.device import Device

log = logging.getLogger("vfsd.guest")

UNMOUNTED = "it was unmounted"
# After a plain umount2 the threads find the connection ended at once, unless another mount
# namespace still has the file system.
LEFTOVER_S = 0.5
# A daemon that let us wait in vain is told of the end, but hardly waited for again.
SILENT_S = 1.0


def ready(timeout_s: float | None, *fds: int) -> bool:
    """Wait until one of the descriptors can be read: is one?"""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


class DeviceMount:
    """One device, mounted at a directory; a context manager.

    The device becomes the mount's own. source, flags: as for mount(2). threads: how many carry
    requests, each with a clone of /dev/fuse. timeout_s: how long the daemon may take for INIT, and
    for what is in flight when the mount is to end. Returns when INIT has been agreed. OSError,
    ConfigError: it can't be mounted; nothing is left then, the device neither.
    """

    def __init__(
        self, device: Device, directory: str | os.PathLike[str], *, source: str = "vfsd", flags: int = 0,
        threads: int = 2, timeout_s: float = 10.0,
    ) -> None:  # fmt: skip
        self.device = device
        self.directory = os.fspath(directory)
        self._timeout_s = timeout_s
        self._closing = threading.Lock()
        self._detaching = threading.Lock()
        self._closed = False
        self._silent = False  # the daemon lives and does not answer
        self._fds: list[int] = []
        self._threads: list[threading.Thread] = []
        self._mounted: Mounted | None = None
        self._bridge: Bridge | None = None
        self._init = self._end = -1
        try:
            self._init = os.eventfd(0, os.EFD_CLOEXEC)
            self._end = os.eventfd(0, os.EFD_CLOEXEC)
            self._start(source, flags, threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, source: str, flags: int, threads: int) -> None:
        self._fds.append(mounting.open_device())
        self._mounted = mounting.mount(self._fds[0], self.directory, source, flags)
        while len(self._fds) < threads:
            self._fds.append(mounting.clone_device(self._fds[0]))
        self._bridge = Bridge(self.device.transport, self._fds, self._init, self._end)
        for number in range(len(self._fds)):
            thread = threading.Thread(
                target=self._bridge.run, args=(number,), name=f"fuse.{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self.device.on_gone = self._on_gone
        if self.device.gone is not None:  # before it could tell
            self._on_gone()
        if not ready(self._timeout_s, self._init, self._end):
            raise OSError(errno.ETIMEDOUT, f"the daemon did not answer INIT for {self._timeout_s:g} s")
        if self._bridge.init != 0:
            code = -(self._bridge.init or -errno.ENOTCONN)
            raise OSError(code, self.device.gone or f"INIT failed: {os.strerror(code)}")

    @property
    def alive(self) -> bool:
        """Whether the kernel can still send requests."""
        return self._bridge is not None and self._bridge.running > 0

    @property
    def why(self) -> str:
        """Why it is not alive any more."""
        if self.device.gone is not None:
            return self.device.gone
        if self._bridge is not None and self._bridge.ended:
            return f"{mounting.DEVICE}: {os.strerror(self._bridge.ended)}"
        return UNMOUNTED

    def wait(self, *also: int, timeout_s: float | None = None) -> bool:
        """Wait until it is not alive any more, or one of the descriptors `also` can be read: the former?"""
        ready(timeout_s, self._end, *also)
        return not self.alive

    def counters(self) -> dict[str, int]:
        """See Bridge.counters; the device's own are at `device.transport`."""
        return self._bridge.counters() if self._bridge else {}

    def abort(self) -> None:
        """End it at once: whoever waits for it gets ECONNABORTED, and its mount points go."""
        with self._detaching:
            if self._mounted is None:
                return
            alive = self.alive
            points = self._mounted.points(alive)
            if alive:  # else its number may be another's by now
                try:
                    mounting.abort(self._mounted)
                except OSError as problem:
                    log.warning("%s: no abort file (%s)", self.directory, problem.strerror)
            for point in points:
                with contextlib.suppress(OSError):
                    mounting.unmount(point, MNT_FORCE | MNT_DETACH)

    def _on_gone(self) -> None:
        self.abort()

    def close(self) -> None:
        """Unmount, tell the daemon (DESTROY), remove the device, close everything. Idempotent."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if self._mounted is not None:
                with self._watched(self._give_up_waiting):
                    self._unmount(self._mounted)
            for thread in self._threads:
                thread.join()
            with self._watched(self._give_up_device):
                if self._silent:
                    self._give_up_device()
                else:
                    self._destroy()
                self.device.remove()
            self.device.on_gone = None
            # Replies are written until the device has been removed.
            for fd in (*self._fds, self._init, self._end):
                if fd >= 0:
                    os.close(fd)

    @contextlib.contextmanager
    def _watched(self, too_late: Callable[[], None]) -> Iterator[None]:
        """What is done in here may wait for a daemon that does not answer."""
        timer = threading.Timer(self._timeout_s, too_late)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _unmount(self, mounted: Mounted) -> None:
        if self.alive:
            left = False
            for point in mounted.points(True):
                try:
                    mounting.unmount(point)
                except OSError as problem:
                    left = True
                    if problem.errno == errno.EBUSY:
                        log.warning("%s: is still in use; who uses it gets errors from now on", point)
                        with contextlib.suppress(OSError):
                            mounting.sync(point)
                    else:
                        log.error("%s: can't be unmounted: %s", point, problem.strerror)
            if not left:
                self.wait(timeout_s=LEFTOVER_S)
        self.abort()

    def _give_up_waiting(self) -> None:
        self._silent = True
        log.error("%s: the daemon did not answer for %g s", self.directory, self._timeout_s)
        self.abort()

    def _give_up_device(self) -> None:
        self.device.frontend.timeout_s = min(self.device.frontend.timeout_s, SILENT_S)
        self.device.transport.abort(errno.ETIMEDOUT)

    def _destroy(self) -> None:
        """virtio_fs_conn_destroy; through /dev/fuse the kernel sends no DESTROY."""
        if self._bridge is None or self._bridge.init != 0 or self.device.gone is not None:
            return
        transport = self.device.transport
        transport.disconnect(0)
        transport.drain()
        with contextlib.suppress(OSError):
            transport.call(NUMBER["DESTROY"], 0)
