"""What a further guest costs: `python tools/measure_guests.py [OPTION OF vfsd serve...]`.

Milliseconds from connect(2) to the first answer of a forked server, medians; private memory of guests that
are idle, and after a guest has made, written, read, listed and removed files.
"""

import socket
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path

from guests import Daemon

from vfsd.guest import Filesystem, mount

GET_FEATURES = struct.pack("=III", 1, 1, 0)
GUESTS = 20
FILES = 200


def served_ms(daemon: Daemon) -> float:
    with socket.socket(socket.AF_UNIX) as sock:
        began = time.perf_counter()
        sock.connect(str(daemon.socket))
        sock.sendall(GET_FEATURES)
        sock.recv(20)
        return (time.perf_counter() - began) * 1000


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def private_of_each(daemon: Daemon) -> list[float]:
    """MiB of each guest: of its server, and of its keeper if it has one."""
    keepers, servers = daemon.children(), daemon.servers()
    if keepers == servers:
        return [private_mib(pid) for pid in servers]
    return [private_mib(one) + private_mib(other) for one, other in zip(keepers, servers, strict=True)]


def work(fs: Filesystem) -> None:
    fs.mkdir("/dir")
    for number in range(FILES):
        with fs.open(f"/dir/f{number}", "w+b") as file:
            file.write(bytes(65536))
    assert len(fs.listdir("/dir")) == FILES
    for number in range(FILES):
        fs.rename(f"/dir/f{number}", f"/dir/g{number}")
        fs.unlink(f"/dir/g{number}")
    fs.rmdir("/dir")


def main() -> None:
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, Daemon(Path(name), options=options) as daemon:
        times = [served_ms(daemon) for _ in range(GUESTS)]
        print(f"connect to first answer: {statistics.median(times):.1f} ms (worst {max(times):.1f})")
        systems = [mount(daemon.socket) for _ in range(3)]
        idle = private_of_each(daemon)
        for fs in systems:
            work(fs)
        loaded = private_of_each(daemon)
        print(f"private MiB: {statistics.median(idle):.1f} idle, {statistics.median(loaded):.1f} after work")
        for fs in systems:
            fs.close()


if __name__ == "__main__":
    main()
