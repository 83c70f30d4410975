"""File systems of several kinds, empty, for as long as they are used. As root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

IMAGE_BYTES = 320 << 20  # XFS wants 300 MiB; the image has holes

# kind: options of its mount. "here" is where the directory is.
KINDS = {"here": "", "tmpfs": "", "ext4": "loop", "xfs": "loop", "overlay": ""}


class CannotMount(Exception):
    """This machine lacks the kind, or its mkfs."""


def _image(kind: str, at: Path) -> Path:
    with at.open("wb") as image:
        image.truncate(IMAGE_BYTES)
    try:
        subprocess.run([f"mkfs.{kind}", "-q", at], check=True, capture_output=True)
    except FileNotFoundError as problem:
        raise CannotMount(f"there is no {problem.filename}") from None
    return at


def _layers(base: Path, more: str) -> str:
    # On a tmpfs: an upper directory may lie on overlayfs itself otherwise.
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", base], check=True)
    layers = {name: base / name for name in ("lower", "upper", "work")}
    for layer in layers.values():
        layer.mkdir()
    return ",".join([*(f"{name}dir={layer}" for name, layer in layers.items()), *((more,) if more else ())])


@contextlib.contextmanager
def file_system(kind: str, directory: Path, more: str = "") -> Iterator[Path]:
    """An empty directory of a file system of that kind, below `directory`.

    more: options of an overlay's mount.
    """
    place, base = directory / "place", directory / "base"
    place.mkdir()
    if kind == "here":
        yield place
        return
    source, options = Path("none"), KINDS[kind]
    if options == "loop":
        source = _image(kind, directory / "image")
    try:
        if kind == "overlay":
            options = _layers(base, more)
        words = ["mount", "-t", kind, *(("-o", options) if options else ()), source, place]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise CannotMount(f"can't mount {kind}: {done.stderr.strip()}")
        yield place
    finally:
        for mounted in (place, base):
            subprocess.run(["umount", mounted], check=False, capture_output=True)
