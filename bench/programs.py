"""The workloads that are real programs: archives, git, searches, small files, a database, a compiler."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

from . import sources
from .inside import database, npm
from .profiles import Profile
from .tasks import COMMON, Outcome, Task, Work, expect, said, script

GIT = " ".join(f"{name}='{value}'" for name, value in sources.GIT.items())


# --- what they work on ---


def source(work: Work) -> Path:
    return work.tree.made("source", lambda new: sources.make_source(new, work.profile.source))


def archive(work: Work) -> None:
    top = source(work)
    work.tree.made("source.tar", lambda new: sources.make_archive(new, top))


def repository(work: Work) -> Path:
    top = source(work)
    return work.tree.made("repository", lambda new: sources.make_repository(new, top))


def bare(work: Work) -> None:
    top = repository(work)
    work.tree.made("repository.git", lambda new: sources.make_bare(new, top))


def copied(work: Work) -> None:
    shutil.copytree(source(work), work.host / "source")


def project(work: Work) -> None:
    top = work.tree.made("project", lambda new: sources.make_project(new, work.profile.units))
    shutil.copytree(top, work.host / "project")


# --- whether they did it ---


def same_as_source(work: Work, there: Path, leave_out: str = "") -> None:
    """Failed: a directory does not have what the source tree has."""
    expect(there.is_dir(), f"there is no {there.name} afterwards")
    found, wanted = sources.digest(there, leave_out), sources.known_digest(source(work))
    expect(found[0] == wanted[0], f"{there.name} has {found[0]} files afterwards, not {wanted[0]}")
    expect(found == wanted, f"the files of {there.name} do not have the right checksum")


def untarred(work: Work, _outcome: Outcome) -> None:
    same_as_source(work, work.host / "source")


def removed(work: Work, _outcome: Outcome) -> None:
    left = sum(len(names) for _, _, names in os.walk(work.host / "source"))
    expect(not (work.host / "source").exists(), f"rm -rf left {left} files and said it had not")


def status_right(_work: Work, outcome: Outcome) -> None:
    wanted = f" M {sources.CHANGED}\n?? {sources.UNTRACKED}\n"
    expect(outcome.output == wanted, f"git status said: {said(outcome.output)}")


def cloned(work: Work, _outcome: Outcome) -> None:
    same_as_source(work, work.host / "clone", ".git")
    try:
        sources.git(work.host / "clone", "fsck", "--strict")
    except subprocess.CalledProcessError as problem:
        expect(False, f"git fsck of the clone says: {said(problem.stderr)}")


def counted(what: str, wanted: int, outcome: Outcome) -> None:
    expect(outcome.output.strip() == str(wanted), f"{what} found {said(outcome.output)}, not {wanted}")


def found_all(work: Work, outcome: Outcome) -> None:
    counted("find", work.profile.source, outcome)


def found_needles(work: Work, outcome: Outcome) -> None:
    counted("grep", -(-work.profile.source // sources.NEEDLE_EACH), outcome)


def written_small(work: Work, _outcome: Outcome) -> None:
    count = work.profile.packages
    there = sum(len(names) for _, _, names in os.walk(work.host / "node_modules"))
    expect(there == count, f"there are {there} files afterwards, not {count}")
    for number in range(count):
        path = work.host / npm.path(number)
        right = path.is_file() and path.read_bytes() == npm.content(number)
        expect(right, f"{npm.path(number)} is not what was written")


def committed(work: Work, _outcome: Outcome) -> None:
    try:
        with sqlite3.connect(work.host / "data.db") as found:
            rows = found.execute("SELECT number, text FROM t ORDER BY number").fetchall()
            verdict = found.execute("PRAGMA integrity_check").fetchone()[0]
        found.close()
    except sqlite3.Error as problem:
        expect(False, f"the database can't be read: {problem}")
        return
    wanted = [database.row(number) for number in range(work.profile.transactions)]
    expect(verdict == "ok" and rows == wanted, f"the database is not what was written: {verdict}")


def built(work: Work, outcome: Outcome) -> None:
    wanted = sources.project_says(work.profile.units)
    expect(outcome.output == wanted, f"the program says {said(outcome.output)}, not {wanted.strip()}")


# --- them ---


def files(profile: Profile) -> int:
    return profile.source


def again(task: Task) -> Task:
    """When its guest has all in its caches that it may keep."""
    return dataclasses.replace(task, name=f"{task.name}-again", title=f"{task.title}, again", again=True)


FIND = Task(
    "find", "find, by size", "file", script(f"find {COMMON}/source -type f -size +0 | wc -l"), files,
    found_all, source,
)  # fmt: skip
GREP = Task(
    "grep", "grep -r", "file", script(f"grep -rl {sources.NEEDLE} {COMMON}/source | wc -l"), files,
    found_needles, source,
)  # fmt: skip
STATUS = Task(
    "git-status", "git status", "file",
    script(f"{GIT} git --no-optional-locks -C {COMMON}/repository status --porcelain"), files,
    status_right, repository, needs=("git",),
)  # fmt: skip
PROGRAMS = (
    Task("untar", "untar", "file", script(f"tar -xf {COMMON}/source.tar"), files, untarred, archive),
    Task("rm", "rm -rf", "file", script("rm -rf source"), files, removed, copied),
    FIND,
    again(FIND),
    GREP,
    again(GREP),
    STATUS,
    again(STATUS),
    Task("git-clone", "git clone", "file",
         script(f"{GIT} git clone --quiet --no-hardlinks {COMMON}/repository.git clone"), files, cloned,
         bare, needs=("git",)),
    Task("npm", "small files, as by npm", "file",
         lambda work: f'"$PYTHON" -S "$TOOLS/npm.py" {work.profile.packages}',
         lambda profile: profile.packages, written_small),
    Task("sqlite", "sqlite, one row each", "transaction",
         lambda work: f'"$PYTHON" -S "$TOOLS/database.py" {work.profile.transactions}',
         lambda profile: profile.transactions, committed),
    Task("build", "C build, make -j2", "C file", script("cd project && make --silent -j2 && ./program"),
         lambda profile: profile.units, built, project, needs=("make", "cc")),
)  # fmt: skip
