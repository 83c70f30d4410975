from typing import final

from vfsd.fuse.dispatch import Dispatch

__all__ = ("Server",)

@final
class Server:
    def __new__(cls, dispatch: Dispatch, delay_us: int) -> Server: ...
    def set_delay(self, operation: str, delay_us: int) -> None: ...
    def work(self, fd: int) -> None: ...
