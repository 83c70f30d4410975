"""SQLite in WAL mode, whose index is a shared mapping: FILE ROWS, by two processes at once."""

from __future__ import annotations

import json
import os
import sqlite3
import sys

WRITERS = 2


def fill(path: str, writer: int, rows: int) -> None:
    """Transactions of ten rows, with a look at the sum of the others' in each."""
    database = sqlite3.connect(path, isolation_level=None, timeout=60)
    for first in range(0, rows, 10):
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT INTO t VALUES (?, ?)", [(writer, first + i) for i in range(10)])
        count = database.execute("SELECT count(*) FROM t").fetchone()[0]
        assert count % 10 == 0, count
        database.execute("COMMIT")
    database.close()


def main() -> None:
    """Make the table, have it filled, and look at the result."""
    path, rows = sys.argv[1], int(sys.argv[2])
    database = sqlite3.connect(path, isolation_level=None)
    mode = database.execute("PRAGMA journal_mode=wal").fetchone()[0]
    database.execute("CREATE TABLE t (writer INTEGER, number INTEGER)")
    children = []
    for writer in range(WRITERS):
        child = os.fork()
        if child == 0:
            try:
                fill(path, writer, rows)
            except BaseException as problem:
                print(repr(problem), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    answer = {
        "mode": mode,
        "statuses": [os.waitpid(child, 0)[1] for child in children],
        "index": os.path.exists(path + "-shm"),
        "rows": database.execute("SELECT count(DISTINCT writer * 1000000 + number) FROM t").fetchone()[0],
        "integrity": database.execute("PRAGMA integrity_check").fetchone()[0],
    }
    database.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
