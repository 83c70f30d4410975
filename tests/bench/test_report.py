"""What is written can be read again, and shows what was measured."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from vfsd_bench import model, page, reportfile, terminal
from vfsd_bench.compare import changes
from vfsd_bench.figures import rows, summary
from vfsd_bench.model import FLOOR, Cell, Report, Sample, Setting

from vfsd.errors import ConfigError

from .conftest import sample

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "bench.md"


# --- JSON ---


def test_a_report_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    reportfile.write(report, tmp_path / "report.json")
    assert reportfile.read("OLD", tmp_path / "report.json") == report


def test_a_summary_shows_and_compares_as_the_report_did(report: Report, tmp_path: Path) -> None:
    reportfile.write_summary(report, tmp_path / "summary.json")
    kept = reportfile.read("OLD", tmp_path / "summary.json")
    assert all(one.samples == [] for one in kept.results)
    shown = []
    for one in (report, kept):
        console = Console(record=True, width=150, file=io.StringIO())
        terminal.report(console, one)
        shown.append(console.export_text())
    assert shown[0] == shown[1]
    assert {one.verdict for one in changes(kept, report) if one.ratio} == {"noise"}


def test_the_reports_of_the_documents_are_read() -> None:
    for path in (DOCUMENTED.parent / "bench").glob("*.json"):
        report = reportfile.read("REPORT", path)
        assert rows(report) and page.page(report)


def test_every_key_is_documented() -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", DOCUMENTED.read_text()))
    for kind in vars(model).values():
        if dataclasses.is_dataclass(kind) and kind.__module__ == model.__name__ and kind is not model.Errand:
            missing = {field.name for field in dataclasses.fields(kind)} - documented
            assert not missing, f"{kind.__name__} has {missing}"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["format"], 2, "there is no format 1"),
        (["results", 0, "samples", 0, "ops"], "many", r"results\[0\]\.samples\[0\]\.ops is str, not int"),
        (["results", 0, "cell", "depth"], None, "NoneType, not int"),
        (["results", 0, "cell", "colour"], "red", "colour is not known"),
        (["results", 0, "cell"], {"workload": "getattr"}, "cell.setting is missing"),
        (["seconds"], True, "bool, not float"),
        (["contestants"], {}, "dict, not list"),
    ],
)
def test_what_is_no_report_is_refused(
    report: Report, tmp_path: Path, path: list[Any], value: Any, says: str
) -> None:
    document = json.loads(json.dumps(report.plain()))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=says):
        reportfile.read("NEW", tmp_path / "report.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^OLD: .*report\.json"):
        reportfile.read("OLD", tmp_path / "report.json")


# --- figures ---


def test_the_median_of_the_quiet_rounds_counts() -> None:
    found = summary([sample(2.0), sample(2.2), sample(9.0, foreign=0.5)])
    assert found is not None and found.us == pytest.approx(2.1) and not found.noisy and found.rounds == 2


def test_with_too_few_quiet_rounds_all_count_and_it_is_said() -> None:
    found = summary([sample(2.0), sample(9.0, foreign=0.5), sample(8.0, foreign=0.5)])
    assert found is not None and found.us == pytest.approx(8.0) and found.noisy


def test_listings_are_by_entry() -> None:
    found = summary([sample(100.0)])
    assert found is not None
    found = found.by(10)
    assert found.us == pytest.approx(10.0) and found.p50 == pytest.approx(100.0)


def test_nothing_measured_is_no_figure() -> None:
    assert summary([]) is None
    assert summary([Sample(0, 0.1)]) is None


def test_ratios_are_to_the_floor_and_to_the_others(report: Report) -> None:
    row = next(row for row in rows(report) if row.cell.workload == "getattr")
    assert row.ratio("vfsd", FLOOR) == pytest.approx(4.0)
    assert row.ratio("vfsd", "c") == pytest.approx(0.5)


# --- compare ---


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((10, 10, 10), (10.4, 10.4, 10.4), "noise"),  # apart, but by less than 5 %
        ((10, 10, 10), (12, 12, 12), "slower"),
        ((10, 10, 10), (8, 8, 8), "faster"),
        ((10, 11, 13), (12.5, 14, 15), "noise"),  # a round of the one is as good as one of the other
        ((10, 11, 12), (12.5, 14, 15), "slower"),
        ((10, 10), (20, 20), "too few rounds"),
    ],
)
def test_a_difference_is_one_only_beyond_noise(
    report: Report, before: tuple[float, ...], after: tuple[float, ...], verdict: str
) -> None:
    old, new = copy.deepcopy(report), copy.deepcopy(report)
    old.results[0].samples = [sample(us) for us in before]
    new.results[0].samples = [sample(us) for us in after]
    found = {(one.who, one.row.cell.workload): one for one in changes(old, new)}
    assert found["vfsd", "getattr"].verdict == verdict
    assert found["c", "getattr"].verdict == "noise"


def test_a_failure_is_no_speed(report: Report) -> None:
    old = copy.deepcopy(report)
    old.results[4].samples, old.results[4].failed = [sample(4.0)] * 3, None
    found = {(one.who, one.row.cell.workload): one for one in changes(old, report)}
    assert found["c", "read-4k"].verdict == "FAILED"
    assert found["c", "read-4k"].ratio is None


def test_what_only_one_of_them_has_is_left_out(report: Report) -> None:
    new = copy.deepcopy(report)
    new.results[0].cell = Cell(Setting(queues=4), "getattr")
    assert not any(one.who == "vfsd" and one.row.cell.workload == "getattr" for one in changes(report, new))


def test_compare_says_what_was_not_the_same(report: Report) -> None:
    new = copy.deepcopy(report)
    new.machine["cpu"] = "another"
    new.contestants[1].version = "3.0"
    console = Console(record=True, width=150, file=io.StringIO())
    terminal.comparison(console, report, new)
    said = console.export_text()
    assert "cpu: a <cpu> & more then, another now" in said
    assert "version of c: <b>2.0</b> then, 3.0 now" in said


# --- shown ---


class Page(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action", "xlink:href")
        self.references += [value or "" for name, value in attributes if name in names]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_refers_to_nothing(report: Report) -> None:
    text = page.page(report)
    found = Page()
    found.feed(text)
    assert found.references == []
    assert not re.search(r"url\(|@import|https?://|<script|<link", text)
    assert found.open == []
    assert {"svg", "table", "style"} <= set(found.tags)


def test_the_page_shows_what_the_daemons_said_as_text(report: Report) -> None:
    text = page.page(report)
    assert "<b>2.0</b>" not in text and "&lt;b&gt;2.0&lt;/b&gt;" in text
    assert "FAILED" in text and "READ answered EIO" in text
    assert "there is no user-mode Linux" in text
    assert "prefers-color-scheme: dark" in text


def test_the_terminal_shows_failures_and_ratios(report: Report) -> None:
    console = Console(record=True, width=150, file=io.StringIO())
    terminal.report(console, report)
    said = console.export_text()
    assert "4.00x" in said and "0.50x" in said
    assert "FAILED c: read-4k: READ answered EIO, not success" in said
    assert "skipped: level guest: there is no user-mode Linux" in said
