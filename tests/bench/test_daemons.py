"""Daemons that fail: their column says how, the others go on, and the status is 1."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vfsd_bench import reportfile
from vfsd_bench.daemons import Pinning, Running, found_targets, parse_target
from vfsd_bench.fixture import Tree
from vfsd_bench.model import Failed, NotOffered, Report, Result, Setting

from vfsd.errors import ConfigError

ONLY = r"wire poll 1x1024 memory cache=auto \| (getattr|create) \| qd 1$"

# Each is run as: python SCRIPT SOCKET DIRECTORY
EXITS = "raise SystemExit('no such option --frobnicate')"
NEVER_LISTENS = "import time; time.sleep(600)"
HANGS = """
import socket, sys, time
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
kept = listening.accept()
time.sleep(600)
"""
SERVE = """
import os, subprocess, sys, threading, time
from pathlib import Path
directory = Path(sys.argv[2])
def serve(shared):
    from vfsd.cli import main
    main(["serve", "--socket", sys.argv[1], "--shared-dir", str(shared), "--log-level", "error"])
"""
WRONG = (
    SERVE
    + """
other = Path(sys.argv[1]).with_name("other")
for number in range(1024):
    path = other / "common" / "files" / f"f{number:08x}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"short")
(other / "wrong").mkdir()
(other / "wrong" / "file").write_bytes(bytes(8192))
serve(other)
"""
)
DIES = (
    SERVE
    + """
def watch():
    while not list((directory / "dies").glob("w*")):
        time.sleep(0.001)
    os._exit(7)
threading.Thread(target=watch, daemon=True).start()
serve(directory)
"""
)
SCRIPTS = {"exits": EXITS, "never": NEVER_LISTENS, "hangs": HANGS, "wrong": WRONG, "dies": DIES}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Report, str]:
    """One run with all of them and vfsd: status, report, what was said."""
    place = tmp_path_factory.mktemp("daemons")
    words = []
    for name, script in SCRIPTS.items():
        (place / f"{name}.py").write_text(script)
        words += ["--daemon", f"{name}={sys.executable} {place / name}.py {{socket}} {{dir}}"]
    serve = f"{sys.executable} -m vfsd serve --socket {{socket}} --shared-dir {{dir}}"
    done = subprocess.run(
        [sys.executable, "-m", "vfsd", "bench", "--no-found", *words, "--daemon", f"good={serve}",
         "--rounds", "2", "--seconds", "0.005", "--patience", "2.5", "--only", ONLY,
         "--memory-dir", str(place),
         "--json", str(place / "out.json"), "--html", str(place / "out.html")],
        capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert "FAILED" in (place / "out.html").read_text()
    return done.returncode, reportfile.read("NEW", place / "out.json"), done.stdout


def results(report: Report, who: str) -> dict[str, Result]:
    return {result.cell.workload: result for result in report.results if result.who == who}


def test_the_status_tells_of_failures(outcome: tuple[int, Report, str]) -> None:
    assert outcome[0] == 1


@pytest.mark.parametrize(
    ("name", "workload", "says"),
    [
        ("exits", "getattr", r"^ended with status 1 before it listened: .*--frobnicate"),
        ("exits", "create", r"--frobnicate"),
        ("never", "getattr", r"^did not listen within 2\.5 s"),
        ("hangs", "getattr", r"timed out|broke off the handshake"),
        ("wrong", "getattr", r"^GETATTR answered size 5, not 4096$"),
        ("dies", "create", r"^ended with status 7 in the middle of create"),
    ],
)
def test_a_column_says_why(outcome: tuple[int, Report, str], name: str, workload: str, says: str) -> None:
    result = results(outcome[1], name)[workload]
    assert result.failed is not None and re.search(says, result.failed), result.failed
    assert result.samples == []
    assert f"FAILED {name}: " in outcome[2]


def test_the_others_go_on(outcome: tuple[int, Report, str]) -> None:
    for name, workload in (("good", "getattr"), ("good", "create"), ("wrong", "create"), ("dies", "getattr")):
        result = results(outcome[1], name)[workload]
        assert result.failed is None and len(result.samples) == 2, (name, workload, result.failed)
    assert all(len(result.samples) == 2 for result in results(outcome[1], "floor").values())


def test_what_was_run_is_in_the_report(outcome: tuple[int, Report, str]) -> None:
    good = next(one for one in outcome[1].contestants if one.name == "good")
    assert [words[1:4] for words in good.commands.values()] == [["-m", "vfsd", "serve"]]
    assert len(good.starts) == 2 and all(start.listening > 0 and start.resident > 0 for start in good.starts)


# --- the command line ---


def said(*words: str, code: str = "") -> tuple[int, str]:
    """Status and what stderr got, of `vfsd bench`; code runs before it."""
    program = f"import sys; {code or 'pass'}; from vfsd.cli import main; main(['bench', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--profile", "huge"], "--profile"),
        (["--daemon", "x"], "--daemon"),
        (["--daemon", "a=y {socket} {dir}", "--daemon", "a=z {socket} {dir}"], "--daemon"),
        (["--no-found"], "--daemon"),
        (["--level", "moon"], "--level"),
        (["--only", "("], "--only"),
        (["--only", "no such cell"], "--only"),
        (["--json", "/no/such/place"], "--json"),
        (["compare", "/no/such/old", "/no/such/new"], "OLD"),
    ],
)
def test_a_mistake_is_named_in_one_line(words: list[str], names: str) -> None:
    status, line = said(*words)
    assert status == 2, line
    assert line.startswith(f"vfsd: {names}: ") and line.count("\n") == 1


def test_what_is_not_installed_is_named_in_one_line() -> None:
    status, line = said(code="sys.modules['rich'] = sys.modules['rich.console'] = None")
    assert status == 2, line
    assert "rich" in line and "vfsd[bench]" in line and line.count("\n") == 1


# --- one at a time ---


def running(tmp_path: Path, script: str) -> Running:
    (tmp_path / "script.py").write_text(script)
    target = parse_target(f"x={sys.executable} {tmp_path}/script.py {{socket}} {{dir}}")
    return Running(target, Setting(), tmp_path, Pinning(frozenset(), frozenset()), 10)


def test_a_thread_that_dies_is_noticed(tmp_path: Path) -> None:
    waits = (
        "import threading; e = threading.Event(); threading.Thread(target=e.wait).start()\nlistening.listen"
    )
    script = HANGS.replace("listening.listen", waits).replace("time.sleep(600)", "e.set()\ntime.sleep(600)")
    found = running(tmp_path, script)
    try:
        found.expect_threads("while it waits")
        assert len(found.threads()) == 2
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(found.socket))
            with pytest.raises(Failed, match=r"its threads .* died"):
                for _ in range(1000):
                    found.expect_threads("while it waits")
    finally:
        found.end()
    assert not found.socket.parent.exists()


def test_a_daemon_that_can_not_be_run(tmp_path: Path) -> None:
    target = parse_target("x=/no/such/program {socket} {dir}")
    with pytest.raises(Failed, match=r"can't be run: No such file"):
        Running(target, Setting(), tmp_path, Pinning(frozenset(), frozenset()), 1)


def test_the_children_of_a_daemon_count(tmp_path: Path) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '600'])\n" + HANGS
    found = running(tmp_path, script)
    try:
        assert len(found.processes()) == 2
        assert found.cpu() > 0 and found.resident() > 0
    finally:
        found.end()


@pytest.mark.parametrize(
    "text", ["", "x", "x=", "=y {socket} {dir}", "x=y {dir}", "x=y {socket}", "floor=y {socket} {dir}",
             "a b=y {socket} {dir}"],
)  # fmt: skip
def test_a_command_that_can_not_be_one_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--daemon: "):
        parse_target(text)


def test_a_given_command_is_measured_only_as_it_is() -> None:
    target = parse_target("x=y {socket} {dir}")
    with pytest.raises(NotOffered):
        target.command(Setting(cache="always"), Path("s"), Path("d"))
    target = parse_target("x=y {socket} {dir} --cache={cache}")
    assert target.command(Setting(cache="always"), Path("s"), Path("d")) == ["y", "s", "d", "--cache=always"]


@pytest.mark.parametrize(
    ("says", "word"),
    [
        ("--cache <CACHE> the policy (auto, always, never, metadata)", "never"),
        ("-o cache=<mode> could be one of 'auto, always, none'\n--sandbox=namespace|none", "none"),
        ("--cache never|auto  --sandbox none|chroot", "never"),
        ("nothing about it", "none"),
        ("--cache <CACHE> (auto, metadata)", None),
    ],
)
def test_a_cache_mode_is_spelled_as_the_daemon_does(tmp_path: Path, says: str, word: str | None) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = '--long --help' ] && cat <<'EOF'\n{says}\nEOF\n")
    program.chmod(0o755)
    target = parse_target(f"x={program} --long --socket {{socket}} --dir={{dir}} --cache={{cache}}")
    if word is None:
        with pytest.raises(NotOffered, match="cache mode none"):
            target.command(Setting(cache="none"), Path("s"), Path("d"))
        return
    found = target.command(Setting(cache="none"), Path("s"), Path("d"))
    assert found[1:] == ["--long", "--socket", "s", "--dir=d", f"--cache={word}"]


def test_vfsd_is_always_found() -> None:
    assert found_targets()[0].name == "vfsd"


def test_a_tree_is_made_in_parts_and_removed(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "base", 8192, 3, 4)
    tree.own("x")
    assert len(list((tree.part("large-new") / "d00000000").iterdir())) == 3
    assert len(list((tree.part("known") / "d00000000").iterdir())) == 4
    assert tree.part("big").stat().st_size == tree.own_big("x").stat().st_size == 8192
    assert not (tree.own("x") / "big").exists()
    tree.remove()
    assert not tree.base.exists()
