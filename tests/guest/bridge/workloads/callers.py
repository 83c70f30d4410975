"""Threads that each have one request under way: callers.py DIR THREADS.

Opens DIR/f0, f1, ..., says "ready", waits for a line, and then every thread makes a call. Prints
the errno (0: none) of each as it ends, then what a call gives afterwards.
"""

import os
import sys
import threading


def call(number: int, fd: int, root: str) -> int:
    try:
        match number % 4:
            case 0:
                os.pread(fd, 4096, 0)
            case 1:
                os.pwrite(fd, b"x" * 4096, 0)
            case 2:
                os.statvfs(root)
            case _:
                os.ftruncate(fd, 100)
    except OSError as problem:
        return problem.errno or -1
    return 0


def report(number: int, fd: int, root: str) -> None:
    os.write(1, b"%d\n" % call(number, fd, root))  # whole lines, whatever the threads do


def main(root: str, count: int) -> None:
    fds = [os.open(f"{root}/f{number}", os.O_RDWR) for number in range(count)]
    threads = [
        threading.Thread(target=report, args=(number, fd, root)) for number, fd in enumerate(fds)
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("afterwards", call(0, fds[0], root), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
