"""The workloads of the level dax that are no requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mapped:
    """Copies of `block` bytes out of a mapped file, each checked by its pages' tags."""

    name: str
    title: str
    block: int
    scattered: bool
    unit: str


ROWS = (
    Mapped("mapped-4k", "copy 4 KiB, scattered, of a mapped file", 4096, True, "op"),
    Mapped("mapped-1m", "copy 1 MiB, in order, of a mapped file", 1 << 20, False, "MB"),
)
MAPPED = {row.name: row for row in ROWS}
