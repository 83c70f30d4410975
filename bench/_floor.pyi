__all__ = ("KINDS", "measure")

KINDS: tuple[str, ...]

def measure(
    text: str,
    seconds: float,
    warm: float,
    *,
    files: int = -1,
    scratch: int = -1,
    fd: int = -1,
    count: int = 1,
    entries: int = 0,
    block: int = 0,
    blocks: int = 1,
    size: int = 0,
    start: int = 0,
    scattered_order: bool = False,
    depth: int = 1,
) -> tuple[int, int, tuple[int, int, int, int, bytes]]:
    """Run one kind: (ns it took, ns of CPU time, a histogram as _measure.count). OSError.

    Descriptors as in work_t. depth: buffers of `block` bytes that take turns.
    """
