from typing import final

__all__ = ("Pool",)

@final
class Pool:
    def __new__(cls, name: str, threads_max: int) -> Pool: ...
    def close(self, timeout_s: float) -> bool: ...
