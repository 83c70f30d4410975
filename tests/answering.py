"""Run as a program: a command for which system calls are not made but answered with an errno.

    answering.py CALL=ERRNO... -- COMMAND [ARGUMENT]...

By a seccomp filter, so it holds for all that the command starts, and for all arguments of a call. `answering`
gives the words before the command.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from vfsd.sandbox import _linux, _seccomp, seccomp
from vfsd.sandbox.calls import numbers

# Which no filter of vfsd's names; the same for every architecture.
NEW_CALLS: Final = {
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
KERNEL_ERRNO_MAX: Final = 4095  # of what the C library takes for an errno


def answering(**errnos: int) -> list[str]:
    """What comes before a command."""
    return [sys.executable, __file__, *(f"{call}={errno}" for call, errno in errnos.items()), "--"]


def program(machine: str, errnos: dict[str, int]) -> bytes:
    number_of = {**numbers(machine), **NEW_CALLS}
    parts = [seccomp.instruction(seccomp.LOAD, seccomp.NUMBER_AT)]
    for call, errno in errnos.items():
        assert 0 < errno <= KERNEL_ERRNO_MAX, errno
        parts.append(seccomp.when_equal(number_of[call], seccomp.answer(seccomp.RET_ERRNO | errno)))
    return b"".join([*parts, seccomp.answer(seccomp.RET_ALLOW)])


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--")
    errnos = {call: int(errno) for call, errno in (word.split("=") for word in words[:end])}
    if os.geteuid() != 0:
        _linux.forbid_new_privileges()
    _seccomp.install(program(os.uname().machine, errnos))
    os.execvp(words[end + 1], words[end + 1 :])


if __name__ == "__main__":
    main()
