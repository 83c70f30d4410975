"""What an operator chooses by name. Read before all else is imported, so it imports nothing itself."""

from __future__ import annotations

TYPE_CHECKING = False  # see hostfs/choices.py
if TYPE_CHECKING:
    from typing import Literal

    Mode = Literal["namespace", "chroot", "none"]
    Action = Literal["none", "kill", "log", "trap"]

MODES: tuple[Mode, ...] = ("namespace", "chroot", "none")
ACTIONS: tuple[Action, ...] = ("none", "kill", "log", "trap")
