"""Programs of this machine, with their libraries, for a guest that has none: a directory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

WRAPPER = """#!/bin/sh
here=${{0%/*}}/..
exec "$here/lib/{loader}" --library-path "$here/lib" "$here/real/{name}" "$@"
"""


def libraries(program: str) -> list[str]:
    """Paths of what it is linked with, its loader too."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return [word for line in said.splitlines() for word in line.split() if word.startswith("/")]


def bundle(directory: Path, tools: Path, *programs: str) -> None:
    """The files of `tools`, and bin/NAME for each program that is installed."""
    for path in tools.glob("*.py"):
        shutil.copy(path, directory)
    for name in ("bin", "lib", "real"):
        (directory / name).mkdir()
    for name in programs:
        program = shutil.which(name)
        if program is None:
            continue
        shutil.copy(program, directory / "real" / name)
        loader = ""
        for library in libraries(program):
            shutil.copy(library, directory / "lib")
            if Path(library).name.startswith("ld-linux"):
                loader = Path(library).name
        wrapper = directory / "bin" / name
        wrapper.write_text(WRAPPER.format(loader=loader, name=name))
        wrapper.chmod(0o755)
