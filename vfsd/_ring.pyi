from collections.abc import Sequence
from typing import Self, final

from vfsd.memory._regions import GuestMemory

__pyx_capi__: dict[str, object]  # Cython's
__test__: dict[str, object]  # Cython's

RING_NUM_MAX: int
CHAIN_LOOP: int
CHAIN_INDEX: int
CHAIN_ADDRESS: int
CHAIN_OVERFLOW: int
CHAIN_ORDER: int
CHAIN_NESTED: int
CHAIN_INDIRECT_LENGTH: int
CHAIN_TOO_LONG: int
CHAIN_INDIRECT_NEXT: int
CHAIN_TOTAL: int
CHAIN_FRAGMENTS: int
RING_AVAIL: int
CHAIN_TORN: int
CHAIN_ERRORS: dict[int, str]

class RingError(OSError):
    code: int
    def __init__(self, code: int) -> None: ...

@final
class DeviceRing:
    @property
    def memory(self) -> GuestMemory: ...
    def __new__(
        cls, memory: GuestMemory, num: int, desc: int, avail: int, used: int,
        base: int = 0, event_idx: bool = False,
    ) -> Self: ...
    def pop(self) -> tuple[int, list[memoryview], list[memoryview]] | None: ...
    def pop_batch(self, max: int) -> list[tuple[int, list[memoryview], list[memoryview]]]: ...
    def push(self, head: int, written: int) -> None: ...
    def push_batch(self, elems: Sequence[tuple[int, int]]) -> None: ...
    def wants_call(self) -> bool: ...
    def call_unheard(self) -> bool: ...
    def disable_kick(self) -> None: ...
    def enable_kick(self) -> bool: ...
