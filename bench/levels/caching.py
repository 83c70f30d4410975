"""What a daemon lets a guest keep, as its replies say it, and how soon it sees the host's changes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from vfsd.fuse import abi
from vfsd.fuse.abi import Fopen, Init

from ..client import ATTR_TIMES, WRITEBACK_CACHE, Client, seconds
from ..model import Caching, Failed
from .session import WireSession

NO_FLUSH = 1 << 5  # FOPEN_NOFLUSH
SHOWN_S = 5.0  # a change that no new request sees for so long
SIZE_AT = ATTR_TIMES.size + 4 + 8  # in the reply to GETATTR: after ino


def until(shown: Callable[[], bool], what: str) -> float:
    """Seconds until it is so. Failed."""
    began = time.perf_counter()
    while not shown():
        if time.perf_counter() - began > SHOWN_S:
            raise Failed(f"{what} was not seen for {SHOWN_S:g} s")
    return time.perf_counter() - began


def negative_time(client: Client) -> float:
    """How long a guest may believe that a name is not there. Seconds."""
    try:
        reply, _ = client.call("LOOKUP", client.own, b"no-such-name\0")
    except FileNotFoundError:
        return 0.0
    valid, nanoseconds = int.from_bytes(reply[16:24], "little"), int.from_bytes(reply[32:36], "little")
    return seconds(valid, nanoseconds)


def measure(session: WireSession) -> Caching:
    """For the cache mode of the session."""
    client = session.client
    found = Caching(session.setting.cache, session.target.name)
    with session.asking("while its cache mode was asked for"):
        entry = client.lookup(client.own, "file")
        found.entry, found.attr = entry.entry_valid, entry.attr_valid
        found.negative = negative_time(client)
        found.readdirplus = bool(client.flags & Init.DO_READDIRPLUS)
        found.writeback = bool(client.flags & WRITEBACK_CACHE)
        fh, flags = client.open(entry.nodeid, os.O_RDONLY)
        found.keep_cache = bool(flags & Fopen.KEEP_CACHE)
        found.direct_io = bool(flags & Fopen.DIRECT_IO)
        found.no_flush = bool(flags & NO_FLUSH)
        reply, _ = client.call("OPENDIR", client.own, abi.OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0))
        directory, flags, _ = abi.OPEN_OUT.unpack(reply)
        found.cache_dir = bool(flags & Fopen.CACHE_DIR)
        client.release(client.own, directory, directory=True)
        changes(client, entry.nodeid, fh, found)
        client.release(entry.nodeid, fh)
    return found


def changes(client: Client, node: int, fh: int, found: Caching) -> None:
    """Change the file on the host, and look."""
    content = os.urandom(4096)
    client.path("file").write_bytes(content * 2)
    into = bytearray(4096)

    def read() -> bool:
        args = abi.READ_IN.pack(fh, 4096, 4096, 0, 0, 0, 0)
        return client.call("READ", node, args, into)[1] == 4096 and into == content

    def size() -> bool:
        reply, _ = client.call("GETATTR", node, bytes(16))
        return int.from_bytes(reply[SIZE_AT : SIZE_AT + 8], "little") == 4096

    found.data_shown = until(read, "a change of a file's contents on the host")
    os.truncate(client.path("file"), 4096)
    found.attr_shown = until(size, "a change of a file's size on the host")
