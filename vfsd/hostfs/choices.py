"""What an operator chooses by name. Read before all else is imported, so it imports nothing itself."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which takes longer to import than a command line to read
if TYPE_CHECKING:
    from typing import Literal

    CacheMode = Literal["never", "auto", "metadata", "always"]
    DirectWrites = Literal["never", "direct", "always"]
    SymlinkCache = Literal["never", "auto", "always"]
    Negotiation = Literal["never", "auto", "always"]  # auto: if the guest can; always: it must
    FileHandles = Literal["never", "prefer", "mandatory"]

CACHE_MODES: tuple[CacheMode, ...] = ("never", "auto", "metadata", "always")
DIRECT_WRITES: tuple[DirectWrites, ...] = ("never", "direct", "always")
SYMLINK_CACHES: tuple[SymlinkCache, ...] = ("never", "auto", "always")
NEGOTIATIONS: tuple[Negotiation, ...] = ("never", "auto", "always")
FILE_HANDLES: tuple[FileHandles, ...] = ("never", "prefer", "mandatory")
