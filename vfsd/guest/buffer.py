"""The type of what has the buffer protocol: `collections.abc.Buffer`, which came with Python 3.12."""

from typing import Protocol


class Buffer(Protocol):
    """bytes, bytearray, memoryview, array, mmap, NumPy arrays: what memoryview() takes."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
