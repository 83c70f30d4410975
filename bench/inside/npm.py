"""Writes small files as a package manager does: `npm.py COUNT`, below node_modules.

Each file is written under another name first and then renamed, 1 in 4 gets its mode changed.
content() and path() say what must be there afterwards.
"""

import os
import sys

FILES_EACH = 25  # in a package


def path(number: int) -> str:
    package, at = divmod(number, FILES_EACH)
    return f"node_modules/package{package}/{'lib/' if at % 5 else ''}file{at}.js"


def content(number: int) -> bytes:
    return f"module.exports = {number};\n".encode() * (1 + number * 7 % 60)


def main(count: int) -> None:
    made: set[str] = set()
    for number in range(count):
        name = path(number)
        directory = os.path.dirname(name)
        if directory not in made:
            os.makedirs(directory, exist_ok=True)
            made.add(directory)
        fd = os.open(name + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, content(number))
        os.close(fd)
        os.rename(name + ".tmp", name)
        if number % 4 == 0:
            os.chmod(name, 0o755)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except OSError as problem:
        sys.exit(str(problem))
