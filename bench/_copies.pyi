from typing_extensions import Buffer

from .histogram import Raw

__all__ = ("measure", "measure_reads")

def measure(
    memory: Buffer, block: int, scattered_order: bool, seconds: float, seed: int
) -> tuple[int, int, Raw]:
    """Copy blocks of that many bytes (whole pages) out of the memory for so long.

    In order or scattered, of the largest power of two of blocks. (nanoseconds, pages whose tags are not
    those of a file of that seed, histogram of one copy)."""

def measure_reads(
    fd: int, block: int, scattered_order: bool, seconds: float, seed: int
) -> tuple[int, int, Raw]:
    """The same by pread(2), into memory that is aligned for O_DIRECT.

    OSError: a read that failed, or was short."""
