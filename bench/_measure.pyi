from collections.abc import Iterable

from typing_extensions import Buffer

__all__ = ("BUCKETS", "PAGE", "block_at", "count", "fill", "first_wrong", "tags_wrong")

BUCKETS: int
PAGE: int

def count(values: Iterable[int]) -> tuple[int, int, int, int, bytes]:
    """Durations in ns, each 0 to 2^64-1: (n, sum, min, max, 64-bit counts of every bucket)."""

def block_at(i: int, bits: int) -> int:
    """Which of 2^bits blocks a scattered order has at place i."""

def fill(data: Buffer, seed: int, page: int) -> None:
    """Make `data`, whole pages, the file's contents from that page on."""

def first_wrong(data: Buffer, seed: int, page: int) -> int:
    """The first byte of the first page that is not the file's contents from `page` on; -1 if none."""

def tags_wrong(data: Buffer, seed: int, page: int) -> int:
    """The same, looking only at the first and last word of each page."""
