"""How much is measured: quick, in minutes, to work with; full, for a report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vfsd.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """rounds: how often every figure is taken, from a fresh start each time; program_rounds: where it is
    a whole program that runs. Times in seconds.

    big: bytes of the files to read and write; scattered: of what is read and written in 4 KiB by fio;
    large: entries of the big directories; known, opened: inodes and open files whose memory is weighed;
    dirty: bytes that an fsync has to write while getattr is measured. source: files of the source tree;
    packages: small files as npm writes them; transactions: of sqlite; units: C files to compile; watch:
    how long a guest is watched for showing an old state.
    """

    name: str
    rounds: int
    seconds: float
    warm: float
    big: int
    large: int
    known: int
    dirty: int
    program_rounds: int = 1
    scattered: int = 8 * MIB
    opened: int = 1000
    source: int = 300
    packages: int = 1000
    transactions: int = 50
    units: int = 6
    watch: float = 2.0


PROFILES = {
    "quick": Profile(
        "quick", 3, 0.1, 0.03, 64 * MIB, 10_000, 10_000, 512 * MIB, program_rounds=2, opened=10_000
    ),
    "full": Profile(
        "full", 5, 0.25, 0.08, 128 * MIB, 10_000, 100_000, 1024 * MIB,
        program_rounds=3, scattered=32 * MIB, opened=10_000, source=3000, packages=30_000, transactions=500,
        units=40, watch=3.0,
    ),
}  # fmt: skip


def find(name: str) -> Profile:
    """ConfigError: there is none of that name."""
    if name not in PROFILES:
        raise ConfigError("--profile", f"{name!r} is unknown; use {' or '.join(PROFILES)}")
    return PROFILES[name]


def with_(profile: Profile, **changes: float) -> Profile:
    """The same, changed by the operator."""
    return replace(profile, **changes)  # type: ignore[arg-type]
