"""A tree shaped like a kernel's sources: tree.py DIR FILES, fifteen files a directory, three levels."""

import os
import sys

PER_DIRECTORY = 15


def main(root: str, files: int) -> None:
    data = b"/* SPDX-License-Identifier: none */\n" * 20
    for number in range((files + PER_DIRECTORY - 1) // PER_DIRECTORY):
        directory = f"{root}/{number % 20}/{number // 20 % 20}/{number // 400}"
        os.makedirs(directory)
        for file in range(min(PER_DIRECTORY, files - number * PER_DIRECTORY)):
            fd = os.open(f"{directory}/{file}.c", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(fd, data[: 36 * (file + 1)])
            os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
