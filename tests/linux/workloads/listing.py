"""List a directory three ways and say what was seen: DIRECTORY."""

from __future__ import annotations

import hashlib
import json
import os
import sys


def listing_sum(directory: str | os.PathLike[str]) -> dict[str, object]:
    """Number of entries and a checksum over name, mode, links, size and modification time."""
    lines = []
    with os.scandir(directory) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            lines.append(
                f"{entry.name} {entry.is_file()} {status.st_mode:o} {status.st_nlink} "
                f"{status.st_size} {status.st_mtime_ns}"
            )
    text = "\n".join(sorted(lines)).encode()
    return {"entries": len(lines), "sha256": hashlib.sha256(text).hexdigest()}


def main() -> None:
    """Names alone, then every entry's attributes, then a listing read while files come and go."""
    directory = sys.argv[1]
    names = os.listdir(directory)
    first = listing_sum(directory)
    second = listing_sum(directory)
    # Entries that exist all the time must come up exactly once, whatever happens beside them.
    seen: list[str] = []
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count % 1000 == 0:
                with open(f"{directory}/passing", "w"):
                    pass
                os.unlink(f"{directory}/passing")
    seen = [name for name in seen if name != "passing"]
    print(
        json.dumps(
            {
                "names": len(names),
                "distinct": len(set(names)),
                "first": first,
                "second": second,
                "while_changing": len(seen),
                "while_changing_distinct": len(set(seen)),
            }
        )
    )


if __name__ == "__main__":
    main()
