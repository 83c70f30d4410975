"""How much is measured: quick, in minutes, to work with; full, for a report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vfsd.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """rounds: how often every figure is taken, from a fresh start each time. Times in seconds.

    big: bytes of the files to read and write; large: entries of the big directories; known: inodes
    whose memory is weighed; dirty: bytes that an fsync has to write while getattr is measured.
    """

    name: str
    rounds: int
    seconds: float
    warm: float
    big: int
    large: int
    known: int
    dirty: int


PROFILES = {
    "quick": Profile("quick", 3, 0.12, 0.04, 64 * MIB, 10_000, 10_000, 512 * MIB),
    "full": Profile("full", 7, 0.6, 0.2, 256 * MIB, 10_000, 100_000, 1024 * MIB),
}


def find(name: str) -> Profile:
    """ConfigError: there is none of that name."""
    if name not in PROFILES:
        raise ConfigError("--profile", f"{name!r} is unknown; use {' or '.join(PROFILES)}")
    return PROFILES[name]


def with_(profile: Profile, **changes: float) -> Profile:
    """The same, changed by the operator."""
    return replace(profile, **changes)  # type: ignore[arg-type]
