"""What real programs work on: made here, always the same, with no network.

All of it is made on the host's own file system, once for a run; daemons only ever serve it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

from .fixture import SEED

WORDS = (
    "static", "struct", "inode", "page", "cache", "queue", "request", "reply", "offset", "length", "return",
    "error", "state", "flags", "entry", "name", "lock", "ring", "guest", "memory", "daemon", "handle",
)  # fmt: skip
NEEDLE = "frobnicate_the_needle"  # in every NEEDLE_EACH-th file, and in no other
NEEDLE_EACH = 10
FILES_EACH = 20  # in a directory
DIRECTORIES_EACH = 10
LINES = 4096  # that all texts are cut from
OLD = 1_600_000_000  # all times: git trusts a file's time only if it is older than its index
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "Bench" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "bench@example.org" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_DATE": f"{OLD} +0000" for who in ("AUTHOR", "COMMITTER")},
}  # fmt: skip


@functools.cache
def lines() -> list[str]:
    dice = random.Random(SEED)
    return [" ".join(dice.choices(WORDS, k=dice.randint(2, 12))) + "\n" for _ in range(LINES)]


def source_path(number: int) -> str:
    """Of a file of the source tree, three levels down."""
    directory = number // FILES_EACH
    suffix = ("c", "h", "py", "txt")[number % 4]
    return f"part{directory // DIRECTORIES_EACH}/dir{directory}/file{number}.{suffix}"


def make_source(top: Path, files: int) -> None:
    """Text of 0.1 to 30 kB in each file: about 8 kB, as in the sources of programs."""
    dice, text = random.Random(SEED), lines()
    for number in range(files):
        path = top / source_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        start = dice.randrange(LINES)
        content = [text[(start + at) % LINES] for at in range(int(3 + 700 * dice.random() ** 2))]
        if number % NEEDLE_EACH == 0:
            content.insert(len(content) // 2, f"int {NEEDLE};\n")
        path.write_text("".join(content))
        os.utime(path, (OLD, OLD))


def make_archive(archive: Path, source: Path) -> None:
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as stream:
        stream.add(source, "source")


def git(directory: Path, *words: str) -> str:
    """What it prints. subprocess.CalledProcessError."""
    return subprocess.run(
        ["git", *words], cwd=directory, env=os.environ | GIT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


CHANGED, UNTRACKED = source_path(1), "untracked"


def make_repository(top: Path, source: Path) -> None:
    """All of the source tree in one commit, then one file changed and one that git does not know."""
    shutil.copytree(source, top)
    git(top, "init", "--quiet", "--initial-branch=main")
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message", "everything")
    with open(top / CHANGED, "a") as stream:
        stream.write("changed\n")
    (top / UNTRACKED).touch()


def make_bare(top: Path, repository: Path) -> None:
    git(repository.parent, "clone", "--quiet", "--bare", "--no-hardlinks", str(repository), str(top))


def make_project(top: Path, units: int) -> None:
    """A program of so many C files, which prints project_says()."""
    top.mkdir()
    for number in range(units):
        body = "".join(
            f"static int step{at}(int x) {{ return (x * {at + 3} + {number}) % 65521; }}\n"
            for at in range(60)
        )
        calls = "".join(f"    x = step{at}(x);\n" for at in range(60))
        (top / f"unit{number}.c").write_text(
            f'#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include "project.h"\n{body}'
            f"int unit{number}(int x) {{\n{calls}    return x;\n}}\n"
        )
    (top / "project.h").write_text("".join(f"int unit{number}(int x);\n" for number in range(units)))
    calls = "".join(f"    x = unit{number}(x);\n" for number in range(units))
    (top / "main.c").write_text(
        f'#include <stdio.h>\n#include "project.h"\n'
        f'int main(void) {{\n    int x = 1;\n{calls}    printf("%d\\n", x);\n    return 0;\n}}\n'
    )
    objects = " ".join(f"unit{number}.o" for number in range(units))
    (top / "Makefile").write_text(
        f"program: main.o {objects}\n\tcc -o $@ $^\n%.o: %.c project.h\n\tcc -O1 -c -o $@ $<\n"
    )


def project_says(units: int) -> str:
    """What the program prints when it was compiled well."""
    x = 1
    for number in range(units):
        for at in range(60):
            x = (x * (at + 3) + number) % 65521
    return f"{x}\n"


def digest(top: Path, leave_out: str = "") -> tuple[int, str]:
    """How many files there are below a directory, and a checksum of their paths and contents."""
    total = hashlib.sha256()
    count = 0
    for directory, below, names in os.walk(top):
        below[:] = sorted(name for name in below if name != leave_out)
        for name in sorted(names):
            path = os.path.join(directory, name)
            with open(path, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").digest()
            total.update(os.path.relpath(path, top).encode() + b"\0" + found)
            count += 1
    return count, total.hexdigest()


known_digest = functools.cache(digest)
"""The same, of what does not change while this runs."""
