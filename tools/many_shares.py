"""What five shares with ten guests take: vfsd from one file, beside a daemon for each guest.

    tools/many_shares.py [COMMAND]

COMMAND is the other daemon's, with {socket} and {dir}. For each of three rounds: milliseconds until all
sockets are there, memory (PSS) without guests and with ten that have listed the root, and the median of what
they waited for that listing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from guests.daemon import eventually

from vfsd.guest import mount

SHARES, GUESTS, ROUNDS, FILES = 5, 10, 3, 50
VFSD = Path(sys.executable).with_name("vfsd")


def processes(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Those, and what they have forked."""
    found = [process.pid for process in started]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def mebibytes(pids: Sequence[int]) -> float:
    found = [re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M) for pid in pids]
    return sum(int(one[1]) for one in found if one) / 1024


def measure(name: str, commands: Sequence[Sequence[str]], sockets: Sequence[Path]) -> None:
    """commands: the daemons; sockets: one for each guest."""
    begun = time.monotonic()
    nowhere = subprocess.DEVNULL
    started = [subprocess.Popen(command, stdin=nowhere, stderr=nowhere) for command in commands]
    try:
        assert eventually(lambda: all(socket.exists() for socket in sockets), 30)
        listening = time.monotonic() - begun
        time.sleep(1)  # one that forks after it listens
        alone, waits = mebibytes(processes(started)), []
        with ExitStack() as stack:
            for socket in sockets:
                begun = time.monotonic()
                stack.enter_context(mount(str(socket))).listdir("/")
                waits.append(time.monotonic() - begun)
            used = mebibytes(processes(started))
        median = sorted(waits)[len(waits) // 2]
        memory = f"{alone:5.1f} MiB   {used:5.1f} MiB"
        print(f"{name:<6} {listening * 1e3:6.0f} ms   {memory}   {median * 1e3:4.0f} ms")
    finally:
        for process in started:
            process.terminate()
            process.wait()


def main() -> None:
    print("       listening    no guest   ten guests   first listing")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shares = [work / f"share{at}" for at in range(SHARES)]
        for share in shares:
            share.mkdir()
            for at in range(FILES):
                (share / f"file{at}").write_text("x")
        for turn in range(ROUNDS):
            sockets = [work / f"{turn}-{at}.sock" for at in range(SHARES)]
            config = work / f"{turn}.toml"
            config.write_text("".join(
                f'[share.share{at}]\nshared-dir = "{shares[at]}"\nsocket = "{sockets[at]}"\n'
                for at in range(SHARES)
            ))  # fmt: skip
            measure("vfsd", [[str(VFSD), "serve", "--config", str(config)]], sockets * (GUESTS // SHARES))
            if len(sys.argv) > 1:
                own = [work / f"{turn}-other{at}.sock" for at in range(GUESTS)]
                places = [{"socket": own[at], "dir": shares[at % SHARES]} for at in range(GUESTS)]
                commands = [sys.argv[1].format(**place).split() for place in places]
                measure("other", commands, own)


if __name__ == "__main__":
    main()
