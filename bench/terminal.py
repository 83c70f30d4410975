"""What is shown on the terminal: progress, tables, comparisons (rich)."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from . import cachetable
from .compare import changes, differences
from .figures import Row, amount, by_setting, names, times
from .levels.blocking import TITLES
from .model import FLOOR, Contestant, Figure, Memory, PageCache, Report, Setting

TITLE_WIDTH = 40
DAEMON_WIDTH = 46
BULK = ("read-128k", "write-128k", "read-1m", "write-1m")
BACKINGS = {
    "memory": "files in memory", "disk": "files on a disk", "slow": "files on a slow file system"
}  # fmt: skip
GUESTS = {"uml": "user-mode Linux", "qemu": "QEMU without KVM", "qemu-dax": "Linux in QEMU without KVM"}
COLOURS = {"faster": "green", "slower": "red", "FAILED": "bold red", "noise": "dim"}


class Shown:
    """A progress bar, drawn between measurements only: a thread that draws would be measured too."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=console, auto_refresh=False, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, total: int) -> None:
        self._bar.reset(self._task, total=total)

    def step(self, text: str) -> None:
        self._bar.update(self._task, advance=1, description=text, refresh=True)


def setting_title(setting: Setting) -> str:
    queues = "1 queue" if setting.queues == 1 else f"{setting.queues} queues"
    backing = BACKINGS.get(setting.backing, setting.backing)
    how = "polling for replies" if setting.completions == "poll" else "sleeping until called"
    if setting.guest:
        driver = [GUESTS[setting.guest]]
    elif setting.level in ("wire", "slow"):
        driver = [how, f"{queues} of {setting.queue_size}"]
    else:
        driver = [f"{queues} of {setting.queue_size}"]
    parts = [
        setting.level,
        *driver,
        backing,
        f"cache={setting.cache}",
        *setting.on,
    ]
    return " · ".join(parts)


def figure_cells(row: Row, who: str, first: str, wide: bool) -> list[Text]:
    """Under headings()."""
    found, result = row.figures.get(who), row.results.get(who)
    if found is None:
        failed = result is not None and result.failed is not None
        shown = Text("FAILED", style="bold red") if failed else Text("-", style="dim")
        return [shown, *[Text("")] * (len(headings(who, first, wide)) - 1)]
    cells = [Text(value(found, row, wide)), Text(times(row.ratio(who, FLOOR)), style="dim")]
    if wide:
        cells += [Text(amount(found.p99) if found.p99 else ""), Text(amount(found.cpu))]
    if who != first:
        ratio = row.ratio(first, who)
        cells.append(Text(times(ratio), style="" if ratio is None else "green" if ratio < 1 else "red"))
    return cells


def headings(who: str, first: str, wide: bool) -> list[str]:
    """A daemon's columns: time, times the floor, p99, CPU, and the first daemon's time by its."""
    return [who, "x floor", *(("p99", "cpu") if wide else ()), *(() if who == first else (f"{first}/{who}",))]


def value(found: Figure, row: Row, wide: bool) -> str:
    """Time for one, and the throughput where that says more."""
    noise = "~" if found.noisy else ""
    if wide and row.cell.workload.startswith(BULK):
        return f"{amount(found.us)}{noise} {found.mb_per_second:,.0f} MB/s"
    return amount(found.us) + noise


def table(setting: Setting, found: list[Row], daemons: list[str], wide: bool) -> Table:
    shown = Table(title=setting_title(setting), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
                  pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    shown.add_column("µs for one", no_wrap=True, max_width=TITLE_WIDTH)
    shown.add_column("qd", justify="right")
    shown.add_column(FLOOR, justify="right", no_wrap=True)
    first = daemons[0]
    for name in daemons:
        for heading in headings(name, first, wide):
            shown.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == name else "")
    for row in found:
        title = row.title + (f" ({row.by})" if row.by else "")
        cells = [cell for name in daemons for cell in figure_cells(row, name, first, wide)]
        shown.add_row(title, str(row.cell.depth), amount(row.floor.us) if row.floor else "", *cells)
    return shown


def report(console: Console, found: Report) -> None:
    """Everything worth a look."""
    daemons = names(found)
    wide = console.width >= TITLE_WIDTH + 16 + DAEMON_WIDTH * len(daemons)
    for setting, some in by_setting(found).items():
        console.print(table(setting, some, daemons, wide))
    console.print(
        "time by operations done (median of the rounds); p99 of an operation's latency; cpu: the daemon's"
        " time for one; x floor: times the bare system calls; ~ others used the machine meanwhile",
        style="dim",
    )
    for shown in (starts(found), blocking(found), caching(found), cache_table(found), guests_see(found),
                  page_cache(found)):  # fmt: skip
        if shown.row_count:
            console.print(shown)
    for line in problems(found):
        console.print(line, highlight=False, markup=False)


PAGE_CACHE_TITLE = "a file that a guest has read, in memory"
PAGE_CACHE = ("daemon", "MB of the file", "MB more in the guest", "MB more with DAX", "counted")


def page_cache_cells(one: PageCache) -> tuple[str, ...]:
    """Under PAGE_CACHE. Counted: how often the file is in memory, without a window and with it."""
    if one.failed or one.missing:
        return one.who, "FAILED" if one.failed else "-", "", "", ""
    sizes = (f"{size / 1e6:.1f}" for size in (one.size, one.copied, one.own))
    times = (1 + round(size / max(one.size, 1)) for size in (one.copied, one.own))
    return one.who, *sizes, " -> ".join(map(str, times))


def page_cache(found: Report) -> Table:
    shown = titled(PAGE_CACHE_TITLE)
    for heading in PAGE_CACHE:
        shown.add_column(heading, justify="left" if heading == "daemon" else "right")
    for one in found.pagecache:
        shown.add_row(*page_cache_cells(one))
    return shown


def titled(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def starts(found: Report) -> Table:
    shown = titled("start and memory")
    for heading in ("daemon", "ms from exec to listening", "MB resident", "MB more for 100,000 inodes",
                    "MB more for 10,000 open files"):  # fmt: skip
        shown.add_column(heading, justify="left" if heading == "daemon" else "right")
    for one in found.contestants:
        if not one.starts:
            continue
        listening = sorted(start.listening for start in one.starts)[len(one.starts) // 2]
        resident = sorted(start.resident for start in one.starts)[len(one.starts) // 2]
        more = weights(one)
        shown.add_row(one.name, f"{listening * 1e3:.0f}", f"{resident / 1e6:.1f}", *more)
    return shown


def weights(one: Contestant) -> tuple[str, str]:
    """MB for 100,000 inodes, and for 10,000 open files."""

    def text(found: list[Memory], by: int) -> str:
        return ", ".join(f"{n.resident / n.count * by / 1e6:.1f} (from {n.count:,})" for n in found) or "-"

    return text(one.inodes, 100_000), text(one.handles, 10_000)


def blocking(found: Report) -> Table:
    shown = titled("getattr beside something slow on its queue")
    for heading in ("slow", "daemon", "takes ms", "p99 alone µs", "p50 µs", "p99 µs", "max µs"):
        shown.add_column(heading, justify="left" if heading in ("slow", "daemon") else "right")
    for one in found.blocking:
        if one.failed or one.missing:
            shown.add_row(TITLES[one.what], one.who, *problem_cells(one.failed, one.missing, 5))
            continue
        shown.add_row(TITLES[one.what], one.who, f"{one.slow * 1e3:,.0f}",
                      *(amount(ns / 1e3) for ns in (one.alone_p99, one.p50, one.p99, one.max)))  # fmt: skip
    return shown


def problem_cells(failed: str | None, missing: str | None, width: int) -> list[Text]:
    first = Text("FAILED", style="bold red") if failed else Text(missing or "-", style="dim")
    return [first, *[Text("")] * (width - 1)]


def caching(found: Report) -> Table:
    shown = titled("what a guest may keep")
    for heading in ("cache", "daemon", "names s", "attributes s", "absent s", "contents", "listings",
                    "readdirplus", "change seen ms"):  # fmt: skip
        shown.add_column(heading, justify="right" if heading.endswith(("s", "ms")) else "left")
    for one in found.caching:
        mode = one.cache + ("+writeback" if one.writeback else "")
        if one.failed or one.missing:
            shown.add_row(mode, one.who, *problem_cells(one.failed, one.missing, 7))
            continue
        contents = "not at all" if one.direct_io else "over opens" if one.keep_cache else "while open"
        later = max(one.attr_shown, one.data_shown) * 1e3
        kept, plus = ("yes" if on else "no" for on in (one.cache_dir, one.readdirplus))
        times_kept = (f"{one.entry:g}", f"{one.attr:g}", f"{one.negative:g}")
        shown.add_row(mode, one.who, *times_kept, contents, kept, plus, f"{later:.1f}")
    return shown


def cache_table(found: Report) -> Table:
    shown = titled("cache modes, in a mount: done a second, requests that reach the daemon for one;"
                   " and how long a change on the host stays unseen")  # fmt: skip
    names = cachetable.workloads(found)
    for heading in ("cache", "daemon"):
        shown.add_column(heading)
    for name in names:
        shown.add_column(f"{name} /s", justify="right")
        shown.add_column("requests", justify="right")
    for heading in cachetable.SEEN.values():
        shown.add_column(heading, justify="right")
    for mode in cachetable.modes(found):
        problem = mode.problem
        if problem is not None:
            failed, why = problem
            width = 2 * len(names) + len(cachetable.SEEN)
            shown.add_row(mode.title, mode.who, *problem_cells(why if failed else None, why, width))
            continue
        figures = []
        for name in names:
            one = mode.figures.get(name)
            result = mode.results.get(name)
            nothing = "FAILED" if result and result.failed else "-"
            figures += [f"{one.per_second:,.0f}", f"{one.requests:.2f}"] if one else [nothing, ""]
        shown.add_row(mode.title, mode.who, *figures, *cachetable.seen(mode))
    return shown


def guests_see(found: Report) -> Table:
    """Of other levels than the table of cache modes."""
    shown = titled("how long a change on the host stays unseen in a guest")
    for heading in ("where", "daemon", *cachetable.SEEN.values()):
        shown.add_column(heading, justify="left" if heading in ("where", "daemon") else "right")
    for one in found.staleness:
        if one.setting.level != "mount":
            cells = (problem_cells(one.failed, one.missing, len(cachetable.SEEN)) if one.failed or one.missing
                     else cachetable.seen(cachetable.Mode(one.setting, one.who, staleness=one)))  # fmt: skip
            shown.add_row(setting_title(one.setting), one.who, *cells)
    return shown


def problems(found: Report) -> list[str]:
    """Lines: what failed, what was skipped, what to know."""
    lines = [f"FAILED {one.name}: {why}" for one in found.contestants for why in one.failures]
    lines += [f"skipped: level {skip['level']}: {skip['reason']}" for skip in found.skipped]
    missing = {(r.who, r.missing) for r in found.results if r.missing and r.who != FLOOR}
    lines += [f"not measured: {who}: {why}" for who, why in sorted(missing, key=str)]
    return lines + [f"note: {note}" for note in found.notes]


def comparison(console: Console, old: Report, new: Report) -> int:
    """What `vfsd bench compare` prints: how many are slower, or fail now."""
    for line in differences(old, new):
        console.print(f"not the same: {line}", highlight=False, markup=False)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("daemon", "cell", "old µs", "new µs", "new/old", ""):
        shown.add_column(heading, justify="right" if "µs" in heading or "/" in heading else "left")
    found = changes(old, new)
    for one in found:
        cell = f"{one.row.title} qd {one.row.cell.depth} · {one.row.cell.setting.id}"
        before, after = (amount(figure.us) if figure else "" for figure in (one.old, one.new))
        said = Text(one.verdict, style=COLOURS.get(one.verdict, ""))
        shown.add_row(one.who, cell, before, after, times(one.ratio), said)
    console.print(shown)
    counts = {
        verdict: sum(one.verdict == verdict for one in found)
        for verdict in ("faster", "slower", "noise", "FAILED")
    }
    console.print(f"{counts['faster']} faster, {counts['slower']} slower, {counts['noise']} within noise,"
                  f" {counts['FAILED']} failed", highlight=False)  # fmt: skip
    return counts["slower"] + counts["FAILED"]
