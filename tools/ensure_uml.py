"""Prints, as a line for a shell, what has to be exported so that user-mode Linux boots here; or nothing.

Nothing where it boots as it is. Where it does not (Debian 12's on a CPU with AMX), bench/get-peers brings
a newer one, and its line is printed. Says on standard error what can't be had, and ends with status 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from guests import UML_VARIABLE, UmlGuest, uml_command

GET_PEERS = Path(__file__).resolve().parent.parent / "bench" / "get-peers"


def main() -> int:
    """The exit status."""
    missing = UmlGuest.missing()
    if missing is None or not uml_command():
        return fail(missing) if missing else 0
    got = subprocess.run([GET_PEERS], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if got.returncode != 0:
        return fail(f"{missing}: {got.stderr.strip().splitlines()[-1]}")
    for line in got.stdout.splitlines():
        if line.startswith(f"export {UML_VARIABLE}="):
            print(line)
    return 0


def fail(reason: str) -> int:
    print(f"ensure_uml: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
