"""Files with awkward names: NAMES-AS-HEX-FILE... is read in `host`, others are made in `guest`."""

from __future__ import annotations

import errno
import json
import os
import sys

NAMES = [
    b"with space",
    b" leading and trailing ",
    b"new\nline",
    b"tab\tand\\backslash",
    b"-rf",
    b"*?[a]",
    b"...",
    b"quote'\"",
    "grüße-日本語-\U0001f600".encode(),
    b"not utf-8 \xff\xfe",
    b"\x01\x7f control",
    b"x" * 255,
    ("é" * 127 + "x").encode(),
]


def fill(directory: bytes) -> None:
    """Make every name as a file, holding its name, and as a directory beside it."""
    for name in NAMES:
        with open(os.path.join(directory, name), "xb") as file:
            file.write(name)
    os.mkdir(os.path.join(directory, b".dirs"))
    for name in NAMES:
        os.mkdir(os.path.join(directory, b".dirs", name))


def look(directory: bytes) -> list[str]:
    """Problems of a directory that `fill` has made."""
    problems = []
    for place in (directory, os.path.join(directory, b".dirs")):
        listed = set(os.listdir(place)) - {b".dirs"}
        problems += [f"missing in {place!r}: {name!r}" for name in set(NAMES) - listed]
        problems += [f"unexpected in {place!r}: {name!r}" for name in listed - set(NAMES)]
    for name in NAMES:
        path = os.path.join(directory, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                if file.read() != name:
                    problems.append(f"content of {name!r}")
    return problems


def error_of(path: bytes) -> str:
    """Name of the error that making the file gives."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def main() -> None:
    """Look at what the host has made, make the same, rename each to itself with a suffix."""
    top = os.fsencode(sys.argv[1])
    fill(top + b"/guest")
    renamed = top + b"/renamed"
    os.mkdir(renamed)
    for name in NAMES:
        os.rename(top + b"/guest/.dirs/" + name, renamed + b"/" + name)
        os.rename(renamed + b"/" + name, top + b"/guest/.dirs/" + name)
    print(
        json.dumps(
            {
                "host": look(top + b"/host"),
                "guest": look(top + b"/guest"),
                "256 bytes": error_of(top + b"/guest/" + b"y" * 256),
            }
        )
    )


if __name__ == "__main__":
    main()
