"""Prints what building, testing and checking need from the package index, as pyproject.toml says.

With it pip can install the build requirements into the environment itself, so that a rebuild needs
no network and no second environment.
"""

from __future__ import annotations

import tomllib
from pathlib import Path


def main() -> None:
    """One requirement a line: build system, program, and every optional group."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    settings = tomllib.loads(path.read_text())
    project = settings["project"]
    groups = project.get("optional-dependencies", {}).values()
    for requirement in (
        *settings["build-system"]["requires"],
        *project["dependencies"],
        *(requirement for group in groups for requirement in group),
        "build",
        "wheel",
    ):
        print(requirement)


if __name__ == "__main__":
    main()
