"""From exec to listening, and to the first answer, beside `python3 -ISE -c pass`, in turns.

    tools/startup.py [ROUNDS [PROGRAM]]     default: 15, the vfsd-virtiofsd beside this interpreter

An editable installation takes longer: its import hook is loaded first. Resident memory is that of the
process which listens, and of the server of one guest, in KiB.
"""

from __future__ import annotations

import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

GET_FEATURES = struct.pack("=III", 1, 1, 0)


class Start(NamedTuple):
    """Milliseconds, and KiB of each process."""

    listening: float
    answer: float
    resident: list[int]


def elapsed(since: float) -> float:
    return (time.perf_counter() - since) * 1000


def bare() -> float:
    """What Python takes alone."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-ISE", "-c", "pass"], check=True)
    return elapsed(began)


def start(program: str) -> Start:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = f"{place}/socket"
        began = time.perf_counter()
        process = subprocess.Popen(
            [program, "--socket-path", path, "--shared-dir", place, "--log-level", "error"]
        )
        front_end = connect(path)
        listening = elapsed(began)
        with front_end:
            front_end.sendall(GET_FEATURES)
            front_end.recv(20)
            answer = elapsed(began)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            found = Start(listening, answer, [resident(str(process.pid)), *map(resident, children)])
        process.wait()
    return found


def connect(path: str) -> socket.socket:
    while True:
        front_end = socket.socket(socket.AF_UNIX)
        try:
            front_end.connect(path)
        except OSError:
            front_end.close()
            time.sleep(0.0005)
        else:
            return front_end


def resident(pid: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    program = sys.argv[2] if len(sys.argv) > 2 else str(Path(sys.executable).parent / "vfsd-virtiofsd")
    pairs = [(bare(), start(program)) for _ in range(rounds)]
    times = {
        "python3 -ISE -c pass": [alone for alone, _ in pairs],
        "listening": [found.listening for _, found in pairs],
        "first answer": [found.answer for _, found in pairs],
    }
    for what, values in times.items():
        print(f"{what:22} {statistics.median(values):7.1f} ms  (best {min(values):.1f})")
    ratio = statistics.median(found.listening / alone for alone, found in pairs)
    print(f"listening / pass       {ratio:7.2f}     (median of {rounds} pairs)")
    print(f"resident, KiB          {pairs[-1][1].resident}")


if __name__ == "__main__":
    main()
