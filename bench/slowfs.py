"""A file system whose operations take their time, as on a server: `python -m vfsd_bench.slowfs`.

    slowfs SOURCE DIRECTORY DELAY_US [THREADS]

Mounts SOURCE at DIRECTORY by FUSE; each operation waits for DELAY_US microseconds before it begins, and
THREADS of them (64) do so at a time. Prints READY when it is mounted. A line `OPERATION DELAY_US` on standard
input changes the delay of one operation, or of `ALL`, and is answered by the same line. Nothing is kept by
the kernel: names and attributes are asked for each time. It ends by a signal, or when standard input does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from vfsd.daemon.share import policy_of
from vfsd.fuse.abi import Init
from vfsd.fuse.dispatch import Dispatch
from vfsd.fuse.init import Offer, Session
from vfsd.fuse.opcodes import NUMBER
from vfsd.guest.bridge import mounting
from vfsd.hostfs.fs import HostFs
from vfsd.hostfs.lock._locks import Locks
from vfsd.options.o_list import Given
from vfsd.options.resolve import check_options

from ._slowfs import Server

THREADS = 64
QUEUE_SIZE = 260  # as a virtqueue of that size: requests of at most 1 MiB
FLAGS = (
    Init.ASYNC_READ | Init.BIG_WRITES | Init.ASYNC_DIO | Init.PARALLEL_DIROPS | Init.MAX_PAGES | Init.INIT_EXT
)


def served(source: str) -> Dispatch:
    """The operations of vfsd on a directory."""
    given = {"shared_dir": source, "socket": "unused", "cache": "never", "xattr": True}
    policy = policy_of(check_options({key: Given(key, text) for key, text in given.items()}))
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fs = HostFs(root, policy, Locks())
    dispatch = Dispatch(fs)
    fs.install(dispatch)
    offer = Offer(FLAGS | policy.init_flags(), QUEUE_SIZE, Init(0), 0, fs.settle)
    Session(dispatch, lambda: offer, fs.agree, fs.clear)
    return dispatch


def follow(server: Server) -> None:
    """Delays as standard input says, until it ends."""
    for line in sys.stdin:
        operation, delay_us = line.split()
        for name in NUMBER if operation == "ALL" else (operation,):
            server.set_delay(name, int(delay_us))
        print(line, end="", flush=True)


def main() -> NoReturn:
    source, directory, delay_us = sys.argv[1], sys.argv[2], int(sys.argv[3])
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else THREADS
    server = Server(served(source), delay_us)
    fd = mounting.open_device()
    mounting.mount(fd, directory, "slow", 0)

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):  # it has been unmounted
            mounting.unmount(directory, mounting.MNT_DETACH)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    for _ in range(threads):
        threading.Thread(target=server.work, args=(fd,), daemon=True).start()
    print("READY", flush=True)
    follow(server)
    end()
    raise AssertionError


if __name__ == "__main__":
    main()
