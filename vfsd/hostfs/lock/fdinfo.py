"""The locks that a descriptor holds, as the kernel tells them in /proc/self/fdinfo (show_fd_locks)."""

import fcntl

TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK}
KINDS = ("OFDLCK", "FLOCK")
OFFSET_MAX = (1 << 63) - 1


def locks_of(fdinfo: str) -> list[tuple[int, int, int]]:
    """F_RDLCK or F_WRLCK, first byte, last byte of each: open file description locks and flock(2) locks."""
    found = []
    for line in fdinfo.splitlines():
        name, _, text = line.partition(":")
        words = text.split()
        if name != "lock" or len(words) != 8 or words[1] not in KINDS or words[3] not in TYPES:
            continue
        end = OFFSET_MAX if words[7] == "EOF" else int(words[7])
        found.append((TYPES[words[3]], int(words[6]), end))
    return found
