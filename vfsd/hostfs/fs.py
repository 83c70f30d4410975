"""The shared directory as one guest sees it: tables, policy, and the operations tied to them."""

import importlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EBADF, EISDIR, EMFILE, ENFILE
from typing import Literal

from vfsd.fuse.abi import Fopen
from vfsd.fuse.dispatch import Dispatch, Request
from vfsd.fuse.opcodes import OPERATIONS, Home
from vfsd.hostfs._syscalls import reset_thread_ids, set_thread_ids
from vfsd.hostfs._tables import Pin, Tables

CacheMode = Literal["auto", "always", "never"]

# What of open(2)'s flags a guest may choose. O_APPEND is applied to each write, O_CREAT and O_EXCL
# to CREATE alone; O_DIRECT would demand the host's alignment, O_NOATIME the owner's rights.
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
# O_NONBLOCK: never wait for a lease or a mandatory lock.
OPEN_ALWAYS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class CachePolicy:
    """What a cache mode promises the guest (docs/architecture.md, "Cache modes")."""

    timeout_s: float  # names and attributes
    open_flags: Fopen
    opendir_flags: Fopen
    readdirplus: bool


CACHE_POLICIES: dict[CacheMode, CachePolicy] = {
    "never": CachePolicy(0, Fopen.DIRECT_IO, Fopen(0), False),
    "auto": CachePolicy(1, Fopen(0), Fopen(0), True),
    "always": CachePolicy(86400, Fopen.KEEP_CACHE, Fopen.KEEP_CACHE | Fopen.CACHE_DIR, True),
}


@dataclass(frozen=True)
class Policy:
    """What the operator chose for a share, as far as its operations care."""

    cache: CachePolicy
    xattr: bool


class HostFs:
    """One guest's view of a shared directory.

    root_fd: readable descriptor of the directory; stays the caller's.
    anchors_max: see `Tables`.
    """

    def __init__(self, root_fd: int, policy: Policy, anchors_max: int) -> None:
        self.policy = policy
        self.tables = Tables(root_fd, anchors_max)
        self.tables.set_timeouts(policy.cache.timeout_s, policy.cache.timeout_s)
        self._ids = (os.geteuid(), os.getegid())

    def install(self, dispatch: Dispatch) -> None:
        """Give every operation of the table that lives in this package to the dispatch."""
        for op in OPERATIONS:
            if not op.module.startswith("hostfs."):
                continue
            module = importlib.import_module(f"vfsd.{op.module}")
            if op.home is Home.PYTHON:
                dispatch.set_python(op.number, getattr(module, op.name.lower()))
            else:
                module.install(dispatch, self.tables)

    @contextmanager
    def as_caller(self, request: Request) -> Iterator[None]:
        """Be the caller while something is created, so that it is made the caller's own.

        Only root can be somebody else; a daemon of a plain user creates everything as that user.
        """
        if self._ids[0] != 0 or self._ids == (request.uid, request.gid):
            yield
            return
        set_thread_ids(request.uid, request.gid)
        try:
            yield
        finally:
            reset_thread_ids(*self._ids)

    def retry(self, call: Callable[[], int]) -> int:
        """A call that makes a descriptor; once more after closing idle anchors when there are none left."""
        try:
            return call()
        except OSError as problem:
            if problem.errno not in (EMFILE, ENFILE) or not self.tables.make_room():
                raise
            return call()

    def reopen(self, pin: Pin, flags: int) -> int:
        """A new descriptor of what an O_PATH one stands for: regular files and directories only."""
        if stat.S_ISDIR(pin.kind):
            if not flags & os.O_DIRECTORY:
                raise OSError(EISDIR, "is a directory")
        elif not stat.S_ISREG(pin.kind) or flags & os.O_DIRECTORY:
            # Opening a device or a fifo of the host would act on the host.
            raise OSError(EBADF, "special file")
        wanted = (flags | OPEN_ALWAYS) & ~os.O_NOFOLLOW  # the link in /proc is to be followed
        return self.retry(lambda: os.open(proc_path(pin.fd), wanted))


def proc_path(fd: int) -> str:
    """The path that names what a descriptor stands for, be it a symlink."""
    return f"/proc/self/fd/{fd}"
