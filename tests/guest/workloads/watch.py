"""How long until the guest sees a file as given: FILE CONTENT SECONDS.

Asks again and again, each time opening anew, with stat first. Prints the seconds it took, or null.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    """Content and size have to be right together."""
    path, wanted, limit = sys.argv[1], sys.argv[2].encode(), float(sys.argv[3])
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < limit:
        try:
            size = os.stat(path).st_size
            with open(path, "rb") as file:
                if file.read() == wanted and size == len(wanted):
                    print(json.dumps(elapsed))
                    return
        except FileNotFoundError:
            continue
    print("null")


if __name__ == "__main__":
    main()
