"""Transactions of one row each in a sqlite database, every one of them synced: `database.py COUNT`."""

import sqlite3
import sys


def row(number: int) -> tuple[int, str]:
    return number, f"row {number} " * (1 + number % 30)


def main(count: int) -> None:
    database = sqlite3.connect("data.db", isolation_level=None)
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE t (number INTEGER PRIMARY KEY, text TEXT)")
    for number in range(count):
        database.execute("BEGIN")
        database.execute("INSERT INTO t VALUES (?, ?)", row(number))
        database.execute("COMMIT")
    print(database.execute("SELECT count(*), sum(length(text)) FROM t").fetchone())
    database.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
