"""SQLite on the share: FILE JOURNAL-MODE ROWS. One writer is killed inside a transaction."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys


def fill(path: str, mode: str, rows: int) -> str:
    """Transactions of ten rows, each fifth rolled back; the value is the journal mode in use."""
    database = sqlite3.connect(path, isolation_level=None)
    used = str(database.execute(f"PRAGMA journal_mode={mode}").fetchone()[0])
    database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
    for first in range(0, rows, 10):
        database.execute("BEGIN IMMEDIATE")
        database.executemany(
            "INSERT INTO t VALUES (?, ?)", [(first + i, f"row {first + i}") for i in range(10)]
        )
        database.execute("ROLLBACK" if first // 10 % 5 == 4 else "COMMIT")
    database.close()
    return used


def die_inside(path: str) -> bool:
    """A process ends by SIGKILL with its changes in the file but not committed."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        database = sqlite3.connect(path, isolation_level=None)
        # So small a cache that changed pages go to the file before the commit.
        database.execute("PRAGMA cache_size=2")
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE t SET text = 'lost' || text")
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    journal = os.path.exists(path + "-journal")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return journal


def main() -> None:
    """Fill, die, and look whether the journal has undone what was not committed."""
    path, mode, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    used = fill(path, mode, rows)
    journal = die_inside(path)
    database = sqlite3.connect(path)
    answer = {
        "mode": used,
        "journal": journal,
        "integrity": database.execute("PRAGMA integrity_check").fetchone()[0],
        "rows": database.execute("SELECT count(*) FROM t").fetchone()[0],
        "lost": database.execute("SELECT count(*) FROM t WHERE text LIKE 'lost%'").fetchone()[0],
    }
    database.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
