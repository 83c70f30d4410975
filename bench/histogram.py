"""Latencies: a log-linear histogram (see _common.h) and what is read off it, in nanoseconds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from ._measure import BUCKETS, count

SUB_BITS = 6
SUB = 1 << SUB_BITS

Raw = tuple[int, int, int, int, bytes]


def bounds(index: int) -> tuple[int, int]:
    """The smallest value of a bucket, and of the next one."""
    if index < SUB:
        return index, index + 1
    shift = index // SUB - 1
    low = (SUB + index % SUB) << shift
    return low, low + (1 << shift)


@dataclass
class Histogram:
    """Counts of durations. n: how many; total: their sum; smallest and largest are exact."""

    n: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    counts: array[int] = field(default_factory=lambda: array("Q", bytes(8 * BUCKETS)))

    @classmethod
    def of(cls, raw: Raw) -> Histogram:
        """From what a load generator gives."""
        n, total, smallest, largest, counts = raw
        return cls(n, total, smallest, largest, array("Q", counts))

    @classmethod
    def from_values(cls, values: Iterable[int]) -> Histogram:
        """Of durations measured elsewhere."""
        return cls.of(count(values))

    def add(self, other: Histogram) -> None:
        """Take in another's counts."""
        if other.n == 0:
            return
        self.smallest = other.smallest if self.n == 0 else min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.n += other.n
        self.total += other.total
        self.counts = array("Q", map(int.__add__, self.counts, other.counts))

    @property
    def mean(self) -> float:
        """0 when there is nothing."""
        return self.total / self.n if self.n else 0.0

    def percentile(self, q: float) -> float:
        """The value that a share of q per cent does not exceed: the middle of its bucket.

        As numpy's method "inverted_cdf"; never outside of what was seen. 0 when there is nothing.
        """
        rank = max(1, -(-self.n * q // 100))
        seen = 0
        for index, n in enumerate(self.counts):
            seen += n
            if n and seen >= rank:
                low, high = bounds(index)
                return float(min(max((low + high - 1) / 2, self.smallest), self.largest))
        return 0.0
