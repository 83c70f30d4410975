"""`vfsd bench`: from the operator's words to a report."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vfsd.errors import ConfigError

from . import levels, page, profiles, reportfile, runner, terminal
from .daemons import Pinning, Target, found_targets, parse_target
from .fixture import Tree
from .levels import programplan
from .levels.place import Place
from .model import FLOOR, NotOffered, Report
from .profiles import Profile
from .slowmount import slow_mount

EXIT_FAILED = 1
PIPE_WIDTH = 200


@dataclass(frozen=True)
class Words:
    """What the operator asked for, unchecked. Empty or None where nothing was said."""

    profile: str
    daemons: Sequence[str]
    found: bool
    levels: Sequence[str]
    guest: str
    cache_table: bool
    only: str | None
    rounds: int | None
    seconds: float | None
    patience: float
    delay_us: int
    memory_dir: str
    disk_dir: str
    json: str | None
    html: str | None


def choose_targets(words: Words) -> list[Target]:
    """Those found and those given; a given one takes the place of a found one of its name."""
    given = [parse_target(text) for text in words.daemons]
    names = [target.name for target in given]
    if len(set(names)) < len(names):
        raise ConfigError("--daemon", f"{max(names, key=names.count)!r} is given twice; use different names")
    found = [target for target in found_targets() if target.name not in names] if words.found else []
    if not found and not given:
        raise ConfigError("--daemon", "there is none to measure; give one, or leave out --no-found")
    return found + given


def with_pools(targets: Sequence[Target]) -> list[Target]:
    """The same, and the Rust daemon once more with a pool of threads: what serves its queue otherwise is one.

    The C daemon's pool is ended by its own seccomp filter, which does not know what GLib calls since 2.66
    (sched_getaffinity).
    """
    return [*targets, *(target.with_pool() for target in targets if target.kind == "rust")]


def choose_profile(words: Words) -> Profile:
    profile = profiles.find(words.profile)
    if words.rounds is not None:
        profile = profiles.with_(profile, rounds=words.rounds, program_rounds=words.rounds)
    if words.seconds is not None:
        profile = profiles.with_(profile, seconds=words.seconds, warm=words.seconds / 3)
    return profiles.with_(profile, known=min(profile.known, descriptors() // 2))


def descriptors() -> int:
    """How many a process may have: peers keep one for each inode."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def check_outputs(json: str | None, html: str | None) -> None:
    """Before minutes of work: can the results be written?"""
    for option, path in (("--json", json), ("--html", html)):
        parent = os.path.dirname(path or "") or "."
        if path is not None and not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
            raise ConfigError(option, f"{path} can't be written; make the directory, or name another")


@contextmanager
def trees(words: Words, profile: Profile) -> Iterator[tuple[dict[str, Tree], dict[str, str]]]:
    """The directories to serve, by backing, and why there is none."""
    made: dict[str, Tree] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        if "slow" in chosen_levels(words):
            try:
                made["slow"] = stack.enter_context(slow_tree(words, profile))
            except (NotOffered, OSError) as problem:
                missing["slow"] = str(problem)
        for backing, where in (("memory", words.memory_dir), ("disk", words.disk_dir)):
            try:
                base = Path(tempfile.mkdtemp(prefix="vfsd-bench-", dir=where))
                base.chmod(0o755)
                made[backing] = Tree(base, profile.big, profile.large, profile.known)
                made[backing].own(FLOOR)
            except OSError as problem:
                missing[backing] = f"{where}: {problem.strerror}"
                if backing in made:
                    made.pop(backing).remove()
            else:
                stack.callback(made[backing].remove)
        yield made, missing


@contextmanager
def slow_tree(words: Words, profile: Profile) -> Iterator[Tree]:
    """A directory in memory, served by way of a file system that is slow. NotOffered, OSError."""
    base = Path(tempfile.mkdtemp(prefix="vfsd-bench-", dir=words.memory_dir))
    try:
        base.chmod(0o755)
        with slow_mount(base / "source", base / "mount", words.delay_us) as mount:
            yield Tree(mount.directory, profile.big, profile.large, profile.known, mount.source)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def make_console() -> Console:
    """As wide as the terminal; what is piped into a file is not cut to a terminal's width."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def run(words: Words) -> int:
    """Measure, print, write. The exit status. ConfigError."""
    logging.getLogger("vfsd.guest").setLevel(logging.CRITICAL)  # it would tell of each daemon's end
    profile, targets = choose_profile(words), choose_targets(words)
    check_outputs(words.json, words.html)
    try:
        only = re.compile(words.only or "")
    except re.error as problem:
        raise ConfigError("--only", f"{words.only!r} is no regular expression: {problem}") from problem
    console = make_console()
    pinning = Pinning.here()
    with trees(words, profile) as (made, missing), pinning.use(pinning.front):
        place = Place(profile, made, missing, pinning, words.patience, words.guest)
        report = runner.new_report(place)
        with terminal.Shown(console) as progress:
            for name in chosen_levels(words):
                entrants = with_pools(targets) if name == "slow" else targets
                measure_level(name, place, entrants, only, words.cache_table, report, progress)
    if words.only is not None and not report.contestants:
        raise ConfigError(
            "--only", f"there is no cell like {words.only!r}; --json of a short run has the names"
        )
    terminal.report(console, report)
    write(words, report)
    return EXIT_FAILED if failed(report) else 0


def chosen_levels(words: Words) -> list[str]:
    """In their own order, each once. ConfigError."""
    for name in words.levels:
        if name not in levels.NAMES:
            raise ConfigError("--level", f"{name!r} is unknown; use {', '.join(levels.NAMES)}")
    if words.guest not in levels.GUESTS:
        raise ConfigError("--guest", f"{words.guest!r} is unknown; use {' or '.join(levels.GUESTS)}")
    wanted = {programplan.CACHE_TABLE_LEVEL} if words.cache_table else set(words.levels or levels.NAMES)
    return [name for name in levels.NAMES if name in wanted]


def measure_level(
    name: str, place: Place, targets: list[Target], only: re.Pattern[str], cache_table: bool, report: Report,
    progress: terminal.Shown,
) -> None:  # fmt: skip
    level = levels.make(name, place)
    cells = [cell for cell in level.cells(place.profile) if only.search(cell.id)]
    errands = [errand for errand in level.errands(place.profile) if only.search(errand.id)]
    if cache_table:
        cells = [cell for cell in cells if programplan.in_cache_table(cell)]
    if not cells and not errands:
        return
    why = level.missing()
    if why is not None:
        report.skipped.append({"level": name, "reason": why})
        return
    if not cache_table:
        report.skipped += [{"level": name, "reason": reason} for reason in level.left_out()]
    runner.Run(place, targets, level, cells, errands, report, progress).all()


def failed(report: Report) -> bool:
    """Whether any daemon failed anywhere."""
    return any(one.failures for one in report.contestants)


def write(words: Words, report: Report) -> None:
    if words.json:
        reportfile.write(report, Path(words.json))
    if words.html:
        Path(words.html).write_text(page.page(report))


def summarize(path: str, summary: str | None, html: str | None) -> int:
    """`vfsd bench summarize`. ConfigError."""
    check_outputs(summary, html)
    report = reportfile.read("REPORT", Path(path))
    if summary is None and html is None:
        terminal.report(make_console(), report)
    if summary is not None:
        reportfile.write_summary(report, Path(summary))
    if html is not None:
        Path(html).write_text(page.page(report))
    return 0


def compare(old: str, new: str) -> int:
    """`vfsd bench compare`. 1: something has become slower, or fails now. ConfigError."""
    then, now = reportfile.read("OLD", Path(old)), reportfile.read("NEW", Path(new))
    return EXIT_FAILED if terminal.comparison(make_console(), then, now) else 0
