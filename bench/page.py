"""A report as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from . import cachetable, catalogue, plots
from .figures import Row, amount, by_setting, names, times
from .levels.blocking import TITLES
from .model import FLOOR, Blocking, Figure, Report, Setting
from .plots import Bar, Marks, Series, short
from .terminal import PAGE_CACHE, PAGE_CACHE_TITLE, page_cache_cells, problems, setting_title, weights

COLOURS = 5
EXPLAINED = (
    "Times are for one operation, one entry of a listing or one file of a program's work: the time that"
    " passed by the operations that were done, the median of the rounds; thin lines are from the best to the"
    " worst round. The floor is the same work without a daemon: bare system calls by one thread, or the same"
    " program in the host's directory. Ratios below 1 to the floor are possible: several queues, or a daemon"
    " that leaves out part of the work, as O_DIRECT. Every reply and every program's outcome was checked."
)

BESIDE = (
    "<p class='soft'>Latencies are as if a getattr came every millisecond: those that could not even be sent"
    " while one was waiting count too.</p>"
)
STALE = (
    "<p class='soft'>Seen after: from a change on the host until a new request shows it. A guest may show the"
    " old state for as long as it may keep it more.</p>"
)


def kind(daemons: Sequence[str], who: str) -> str:
    return "floor" if who == FLOOR else f"s{daemons.index(who) % COLOURS}"


def element(name: str, content: str, kind: str = "") -> str:
    """content: already HTML."""
    return f'<{name} class="{kind}">{content}</{name}>' if kind else f"<{name}>{content}</{name}>"


def table(head: Iterable[str], body: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><table><thead>{"".join(head)}</thead>'
        f"<tbody>{''.join(element('tr', row) for row in body)}</tbody></table></div>"
    )


BRIEF = ("µs", "x floor")
DETAILS = ("a second", "p50", "p99", "p99.9", "max", "cpu", "requests", "kicks", "calls")


def figures_table(rows: Sequence[Row], daemons: Sequence[str], detailed: bool) -> str:
    """Time and ratios; or detailed: the rest of what was measured."""
    first = daemons[0]
    top, second = "<th></th><th></th>", "<th>for one, in µs</th><th>depth</th>"
    if not detailed:
        top, second = top + "<th></th>", second + "<th>floor</th>"
    for name in daemons:
        heads = headings(name, first, detailed)
        top += f'<th class="group left" colspan="{len(heads)}">{escape(name)}</th>'
        second += "".join(element("th", escape(head), "" if at else "group") for at, head in enumerate(heads))
    body = []
    for row in rows:
        title = escape(row.title) + (f" (by {row.by})" if row.by else "")
        cells = f"<th>{title}</th><td>{row.cell.depth}</td>"
        if not detailed:
            cells += element("td", amount(row.floor.us) if row.floor else "")
        body.append(cells + "".join(daemon_cells(row, name, first, detailed) for name in daemons))
    return table((element("tr", top), element("tr", second)), body)


def headings(who: str, first: str, detailed: bool) -> list[str]:
    if detailed:
        return list(DETAILS)
    return [*BRIEF, *([] if who == first else [f"{first} / {who}"])]


def daemon_cells(row: Row, who: str, first: str, detailed: bool) -> str:
    found, result = row.figures.get(who), row.results.get(who)
    if found is None:
        failed = result.failed if result else None
        why = failed or (result.missing if result else None) or "not measured"
        shown = '<b class="bad">FAILED</b>' if failed else "-"
        width = len(headings(who, first, detailed))
        return f'<td class="group left soft" colspan="{width}" title="{escape(why, quote=True)}">{shown}</td>'
    if detailed:
        latencies = (found.p50, found.p99, found.p999, found.max, found.cpu)
        cells = [rate(found, row), *(amount(us) if us else "" for us in latencies)]
        counted = (f"{found.requests:.2f}", f"{found.kicks:.3f}", f"{found.calls:.3f}")
        cells += counted if found.requests else ("", "", "")
        return "".join(element("td", cell, "" if at else "group") for at, cell in enumerate(cells))
    shown = element("td", amount(found.us) + ("~" if found.noisy else ""), "group main")
    shown += element("td", times(row.ratio(who, FLOOR)))
    if who != first:
        ratio = row.ratio(first, who)
        shown += element("td", times(ratio), "" if ratio is None else "good" if ratio < 1 else "bad")
    return shown


def both_tables(rows: Sequence[Row], daemons: Sequence[str]) -> str:
    """One setting's."""
    more = figures_table(rows, daemons, True)
    summary = "operations a second, latencies, CPU time, kicks and calls by request"
    return figures_table(rows, daemons, False) + f"<details><summary>{summary}</summary>{more}</details>"


def rate(found: Figure, row: Row) -> str:
    """What is done in a second."""
    return f"{found.mb_per_second:,.0f} MB" if row.unit == "MB" else short(found.per_second)


def figure(title: str, plot: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{plot}</figure>" if plot else ""


def bar(label: str, found: Figure | None, kind: str) -> Bar:
    if found is None:
        return Bar(label, None, 0, 0, kind, "not measured")
    return Bar(label, found.us, found.low, found.high, kind, amount(found.us) + " µs")


def by_workload(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.cell.workload, []).append(row)
    return found


def time_plots(rows: Sequence[Row], daemons: Sequence[str]) -> str:
    parts = []
    for some in by_workload(rows).values():
        lines = [bar(FLOOR, some[0].floor, FLOOR)] if some[0].floor else []
        for row in some:
            for name in daemons:
                result = row.results.get(name)
                label = f"{name} qd {row.cell.depth}" if len(some) > 1 else name
                one = bar(label, row.figures.get(name), kind(daemons, name))
                if result and result.failed:
                    one = Bar(one.label, None, 0, 0, one.kind, "FAILED", failed=True)
                lines.append(one)
        title = some[0].title + (f", by {some[0].by}" if some[0].by else "")
        parts.append(figure(title, plots.bars(title, lines)))
    return element("div", "".join(parts), "grid-of")


def latency_plots(rows: Sequence[Row], daemons: Sequence[str]) -> str:
    parts = []
    for row in rows:
        if row.cell.depth != 1:
            continue
        lines = []
        for name in (FLOOR, *daemons):
            found = row.floor if name == FLOOR else row.figures.get(name)
            if found and found.p50:
                values = (("p50", found.p50), ("p99", found.p99), ("p99.9", found.p999), ("max", found.max))
                lines.append(Marks(name, values, kind(daemons, name)))
        parts.append(figure(row.title, plots.marks(row.title, lines)))
    return element("div", "".join(parts), "grid-of")


def depth_plots(rows: Sequence[Row], daemons: Sequence[str]) -> str:
    parts = []
    for some in by_workload(rows).values():
        lines = []
        for name in daemons:
            points = [(row.cell.depth, f.per_second) for row in some if (f := row.figures.get(name))]
            if len(points) > 1:
                lines.append(Series(name, points, kind(daemons, name)))
        if lines:
            what = "entries" if some[0].by == "entry" else "operations"
            title = f"{some[0].title}: {what} a second"
            parts.append(figure(title, plots.curves(title, lines)))
    return element("div", "".join(parts), "grid-of")


def cache_table(report: Report) -> str:
    """Cache modes, and what each daemon makes of them."""
    workloads, modes = cachetable.workloads(report), cachetable.modes(report)
    if not modes:
        return ""
    top, second = "<th></th><th></th>", "<th>cache</th><th class='left'>daemon</th>"
    for name in workloads:
        top += f'<th class="group left" colspan="2">{escape(catalogue.title(name))}</th>'
        second += "<th class='group'>a second</th><th>requests</th>"
    top += f'<th class="group left" colspan="{len(cachetable.SEEN)}">a change on the host is seen after</th>'
    second += "".join(
        element("th", title, "" if at else "group") for at, title in enumerate(cachetable.SEEN.values())
    )
    body = []
    for mode in modes:
        row = f"<th>{escape(mode.title)}</th><td class='left'>{escape(mode.who)}</td>"
        if mode.problem is not None:
            failed, why = mode.problem
            width = 2 * len(workloads) + len(cachetable.SEEN)
            text, look = (f"FAILED: {why}", "bad") if failed else (why, "soft")
            body.append(f'{row}<td class="group left {look}" colspan="{width}">{escape(text)}</td>')
            continue
        for name in workloads:
            found = mode.figures.get(name)
            shown = (f"{found.per_second:,.0f}", f"{found.requests:.2f}") if found else ("-", "-")
            row += element("td", shown[0], "group main") + element("td", shown[1])
        for at, text in enumerate(cachetable.seen(mode)):
            row += element("td", escape(text), "" if at else "group")
        body.append(row)
    return table((element("tr", top), element("tr", second)), body)


def mode_plots(report: Report, daemons: Sequence[str]) -> str:
    """One plot: throughput by mode and daemon, with what it costs in requests and in age."""
    parts = []
    for name in cachetable.workloads(report):
        lines = []
        for mode in cachetable.modes(report):
            found = mode.figures.get(name)
            if found is None:
                continue
            shown = f"{short(found.per_second)}/s · {found.requests:.2f} requests"
            shown += f" · old for {mode.oldest}" if mode.oldest else ""
            spread = (1e6 / found.high, 1e6 / found.low)
            color = kind(daemons, mode.who)
            lines.append(Bar(f"{mode.title} {mode.who}", found.per_second, *spread, color, shown))
        title = f"{catalogue.title(name)}: {cachetable.things(name)} a second"
        parts.append(figure(title, plots.bars(title, lines, plots.WIDE)))
    return element("div", "".join(parts), "grid-wide")


def cache_plots(report: Report, daemons: Sequence[str]) -> str:
    """The same workloads under each cache mode, polled, one at a time."""
    settings = [Setting(cache=mode) for mode in ("none", "auto", "always", "metadata")]
    rows = {(row.cell.workload, row.cell.setting): row for some in by_setting(report).values() for row in some
            if row.cell.depth == 1 and row.cell.setting in settings}  # fmt: skip
    workloads = dict.fromkeys(workload for workload, setting in rows if setting.cache == "none")
    parts = []
    for workload in workloads:
        lines, title = [], workload
        for setting in settings:
            row = rows.get((workload, setting))
            for name in daemons:
                found = row.figures.get(name) if row else None
                if row and found:
                    title = row.title
                    lines.append(bar(f"{name} {setting.cache}", found, kind(daemons, name)))
        parts.append(figure(title, plots.bars(title, lines)))
    return element("div", "".join(parts), "grid-of")


def latencies(one: Blocking) -> list[tuple[str, float]]:
    pairs = (("alone p99", one.alone_p99), ("p50", one.p50), ("p99", one.p99), ("max", one.max))
    return [(name, ns / 1e3) for name, ns in pairs]


def blocking(report: Report, daemons: Sequence[str]) -> str:
    parts = []
    for what, title in TITLES.items():
        found = [one for one in report.blocking if one.what == what]
        lines = [
            Marks(one.who, latencies(one), kind(daemons, one.who))
            for one in found
            if not one.failed and not one.missing
        ]
        others = "".join(
            element("p", escape(f"{one.who}: {one.failed or one.missing}"), "bad" if one.failed else "soft")
            for one in found
            if one.failed or one.missing
        )
        took = ", ".join(f"{one.who} {one.slow * 1e3:,.0f} ms" for one in found if one.slow)
        caption = f"<figcaption>it took {escape(took)}</figcaption>" if took else ""
        if found:
            parts.append(
                f"<figure><h3>{escape(title)}</h3>{plots.marks(title, lines)}{caption}{others}</figure>"
            )
    return element("div", "".join(parts), "grid-of")


def caching(report: Report) -> str:
    heads = (
        "cache", "daemon", "names", "attributes", "absent names", "contents in the guest's cache",
        "listings", "readdirplus", "attributes seen after", "contents seen after",
    )  # fmt: skip
    body = []
    for one in report.caching:
        mode = one.cache + (" + writeback" if one.writeback else "")
        start = f"<th>{escape(mode)}</th><td class='left'>{escape(one.who)}</td>"
        if one.failed or one.missing:
            body.append(
                f"{start}<td class='left soft' colspan='8'>{escape(one.failed or one.missing or '')}</td>"
            )
            continue
        contents = "none" if one.direct_io else "kept over opens" if one.keep_cache else "while it is open"
        cells = (
            *(f"{seconds:g} s" for seconds in (one.entry, one.attr, one.negative)),
            contents,
            *("yes" if on else "no" for on in (one.cache_dir, one.readdirplus)),
            *(f"{seconds * 1e3:.1f} ms" for seconds in (one.attr_shown, one.data_shown)),
        )
        body.append(start + "".join(element("td", escape(cell)) for cell in cells))
    return table((element("tr", "".join(element("th", escape(head)) for head in heads)),), body)


def contestants(report: Report) -> str:
    body = []
    for one in report.contestants:
        listening = sorted(start.listening for start in one.starts)
        resident = sorted(start.resident for start in one.starts)
        half = len(listening) // 2
        inodes, handles = weights(one)
        body.append(
            f"<th>{escape(one.name)}</th><td class='wide'>{escape(one.version)}</td>"
            f"<td>{f'{listening[half] * 1e3:.0f} ms' if listening else '-'}</td>"
            f"<td>{f'{resident[half] / 1e6:.1f} MB' if resident else '-'}</td>"
            f"<td>{inodes}</td><td>{handles}</td>"
        )
    heads = ("daemon", "version", "exec to listening", "resident, one guest", "MB for 100,000 inodes",
             "MB for 10,000 open files")  # fmt: skip
    shown = "".join(element("th", head, "wide" if head == "version" else "") for head in heads)
    return table((element("tr", shown),), body)


def commands(report: Report) -> str:
    parts = [f"<pre>{escape(shlex.join(report.command))}</pre>"]
    for one in report.contestants:
        lines = "\n".join(f"# {setting}\n{shlex.join(words)}" for setting, words in one.commands.items())
        parts.append(
            f"<details><summary>{escape(one.name)}: {len(one.commands)} settings</summary>"
            f"<pre>{escape(lines)}</pre></details>"
        )
    return "".join(parts)


def key(daemons: Sequence[str], floor: bool = True) -> str:
    shown = (FLOOR, *daemons) if floor else daemons
    spans = "".join(f'<span class="{kind(daemons, name)}"><b>{escape(name)}</b></span>' for name in shown)
    return element("div", spans, "key")


def facts(report: Report) -> str:
    pairs = {
        "made": report.made,
        "profile": f"{report.profile}: {report.rounds} rounds of {report.seconds:g} s",
        **report.machine,
    }
    return (
        "<dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())
        + "</dl>"
    )


LEVELS = {
    "slow": "A file system whose operations take their time",
    "wire": "On the wire", "dax": "In a DAX window", "mount": "Mounted by /dev/fuse", "guest": "In a guest",
}  # fmt: skip
ONE_PLOT = (
    "<p class='soft'>A second: files, or operations of fio, that are done. Requests: what reaches the daemon"
    " for one of them, counted at our own driver, for every daemon in the same way. Old for: the longest that"
    " a guest went on seeing a size, a content or a name that the host had changed.</p>"
)


def of_level(report: Report, level: str, daemons: Sequence[str]) -> list[tuple[str, str]]:
    """Sections: the level's first setting as a table and as plots, the others as tables."""
    groups = [(setting, some) for setting, some in by_setting(report).items() if setting.level == level]
    if not groups:
        return []
    title, main, legend = LEVELS.get(level, level), groups[0][1], key(daemons)
    found = [
        (f"{title}: {setting_title(groups[0][0]).removeprefix(level + ' · ')}", both_tables(main, daemons)),
        (f"{title}: time, and the floor", legend + time_plots(main, daemons)),
    ]
    for head, plot in (("latency, one at a time: p50, p99, p99.9 and the longest", latency_plots),
                       ("throughput by depth", depth_plots)):  # fmt: skip
        shown = plot(main, daemons)
        if "<svg" in shown:
            found.append((f"{title}: {head}", legend + shown))
    more = "".join(
        f"<details><summary>{escape(setting_title(setting))}</summary>{both_tables(some, daemons)}</details>"
        for setting, some in groups[1:]
    )
    found.append((f"{title}: other settings", more))
    return [*found, (f"{title}: how long a change on the host stays unseen", guests_see(report, level))]


def guests_see(report: Report, level: str) -> str:
    """How long they stay unseen, where that is in no table of cache modes."""
    found = [one for one in report.staleness if one.setting.level == level != "mount"]
    if not found:
        return ""
    heads = ("daemon", *(f"{title} seen after" for title in cachetable.SEEN.values()))
    body = []
    for one in found:
        row = element("th", escape(one.who))
        if one.failed or one.missing:
            text = escape(one.failed or one.missing or "")
            row += f"<td class='left soft' colspan='{len(cachetable.SEEN)}'>{text}</td>"
        else:
            mode = cachetable.Mode(one.setting, one.who, staleness=one)
            row += "".join(element("td", escape(text)) for text in cachetable.seen(mode))
        body.append(row)
    return table((element("tr", "".join(element("th", escape(head)) for head in heads)),), body)


def page_cache(report: Report) -> str:
    """How often a file that a guest has read is in memory, without a DAX window and with it."""
    if not report.pagecache:
        return ""
    body = []
    for one in report.pagecache:
        who, *cells = map(escape, page_cache_cells(one))
        body.append(element("th", who) + "".join(element("td", cell) for cell in cells))
    return table((element("tr", "".join(element("th", escape(head)) for head in PAGE_CACHE)),), body)


def page(report: Report) -> str:
    """The whole page."""
    daemons = names(report)
    title = f"virtio-fs daemons side by side: {', '.join(daemons)}"
    lines = problems(report)
    bad = "".join(
        f"<li{' class=bad' if line.startswith('FAILED') else ''}>{escape(line)}</li>" for line in lines
    )
    modes = cache_table(report)
    replies = caching(report) + STALE + cache_plots(report, daemons) if report.caching else ""
    beside = blocking(report, daemons) + BESIDE if report.blocking else ""
    sections: list[tuple[str, str]] = [
        ("Daemons", contestants(report)),
        ("What failed, and what was left out", f"<ul>{bad}</ul>" if lines else ""),
        ("Cache modes: what they save, and how old a guest's view may be",
         modes + ONE_PLOT + key(daemons, floor=False) + mode_plots(report, daemons) if modes else ""),
        *of_level(report, "wire", daemons),
        *of_level(report, "slow", daemons),
        ("A getattr beside something slow on its queue", beside),
        ("Cache modes on the wire: what replies let a guest keep", replies),
        *of_level(report, "dax", daemons),
        (PAGE_CACHE_TITLE.capitalize(), page_cache(report)),
        *of_level(report, "mount", daemons),
        *of_level(report, "guest", daemons),
        ("Commands", commands(report)),
        ("Machine", facts(report)),
    ]  # fmt: skip
    body = "".join(
        f"<section><h2>{escape(head)}</h2>{content}</section>" for head, content in sections if content
    )
    style = (Path(__file__).parent / "page.css").read_text()
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{EXPLAINED}</p><p class='soft'>{escape(report.made)}, "
        f"{escape(report.machine.get('cpu', ''))}, {escape(report.machine.get('kernel', ''))}</p>"
        f"{body}</body></html>\n"
    )
