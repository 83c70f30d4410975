"""Real programs in a mount and in a guest: every workload, what its check finds, and daemons that fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vfsd_bench import levels, reportfile, runner, sources
from vfsd_bench.catalogue import TASKS
from vfsd_bench.daemons import Pinning, Target, found_targets, parse_target
from vfsd_bench.fixture import Tree
from vfsd_bench.harness import harness
from vfsd_bench.levels import programplan
from vfsd_bench.levels.guest import GuestLevel
from vfsd_bench.levels.kernel import run_here
from vfsd_bench.levels.mount import MountLevel
from vfsd_bench.levels.place import Place
from vfsd_bench.model import FLOOR, Cell, Errand, Failed, NotOffered, Report, Result, Setting
from vfsd_bench.profiles import MIB, PROFILES, Profile
from vfsd_bench.tasks import Outcome, Task, Work

from .test_daemons import DIES, SERVE

TINY = replace(
    PROFILES["quick"], program_rounds=1, big=2 * MIB, scattered=MIB, source=45, packages=60, transactions=5,
    units=2, watch=1.5,
)  # fmt: skip
MOUNT = programplan.mounted()
FIO = ("randread-4k", "randwrite-4k", "randread-4k-direct", "randread-4k-aio-direct",
       "randwrite-4k-aio-direct", "read-128k", "write-1m-direct")  # fmt: skip
NAMES = [name for name in TASKS if not name.startswith(("fio-", "find-again", "git-status-again"))]
NAMES += [f"fio-{name}" for name in FIO]
CELLS = programplan.cells_of(MOUNT, NAMES)
BOOTED = programplan.cells_of(programplan.booted("uml"), ("untar", "sqlite", "fio-randwrite-4k"))
ERRANDS = [Errand("staleness", programplan.mounted(mode)) for mode in ("none", "always")]
VFSD = found_targets()[0]
SERVED = f"{sys.executable} -m vfsd serve --socket {{socket}} --shared-dir {{dir}}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    tree = Tree(tmp_path_factory.mktemp("programs") / "base", TINY.big, TINY.large)
    tree.own(FLOOR)
    yield Place(TINY, {"memory": tree}, {}, Pinning(frozenset(), frozenset()), 10)
    tree.remove()


def measured(
    place: Place, name: str, targets: list[Target], cells: list[Cell], errands: list[Errand]
) -> Report:
    """A run of that level. Skips, and says why, if there can't be one."""
    level = levels.make(name, place)
    if why := level.missing():
        pytest.skip(why)
    found = runner.new_report(place)
    runner.Run(place, targets, level, cells, errands, found, runner.Silent()).all()
    return found


@pytest.fixture(scope="module")
def mounted(place: Place) -> Report:
    there = [cell for cell in CELLS if all(map(shutil.which, TASKS[cell.workload].needs))]
    return measured(place, "mount", [VFSD], there, ERRANDS)


def find(report: Report, who: str, workload: str) -> Result:
    return next(one for one in report.results if one.who == who and one.cell.workload == workload)


@pytest.mark.parametrize("name", NAMES)
def test_a_program_runs_in_a_mount(mounted: Report, name: str) -> None:
    for program in TASKS[name].needs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    result = find(mounted, "vfsd", name)
    assert result.failed is None and result.missing is None, (result.failed, result.missing)
    (sample,) = result.samples
    assert sample.ops == TASKS[name].items(TINY) and sample.elapsed > 0 and sample.daemon_cpu > 0
    assert sample.requests > 0
    if name.startswith("fio"):
        assert sample.bytes in (TINY.big, TINY.scattered) and 0 < sample.p50 <= sample.p99 <= sample.max
    (floor,) = find(mounted, FLOOR, name).samples
    assert floor.ops == sample.ops and floor.requests == 0


def test_cached_reads_ask_for_each_block_once_and_direct_ones_too(mounted: Report) -> None:
    blocks = TINY.scattered // 4096
    direct = find(mounted, "vfsd", "fio-randread-4k-direct").samples[0].requests
    assert blocks <= find(mounted, "vfsd", "fio-randread-4k").samples[0].requests
    assert blocks <= direct < 1.2 * blocks


def test_what_comes_again_asks_for_less(mounted: Report) -> None:
    """And what is read once more to be compared is not counted."""
    first, again = (find(mounted, "vfsd", name).samples[0].requests for name in ("grep", "grep-again"))
    assert 0 < again < first


def test_what_a_guest_sees_late_is_measured(mounted: Report) -> None:
    never, always = mounted.staleness
    assert never.failed is None and always.failed is None, (never.failed, always.failed)
    assert (never.setting.cache, always.setting.cache) == ("none", "always")
    seen = (never.attribute, never.content, never.created, never.removed)
    assert all(one is not None and one < 1 for one in seen), seen
    assert (always.attribute, always.content, always.removed) == (None, None, None)


def test_programs_run_in_user_mode_linux(place: Place) -> None:
    others = [target for target in found_targets() if target.kind == "rust"]  # if there is one
    found = measured(place, "guest", [VFSD, parse_target(f"plain={SERVED}"), *others], BOOTED, [])
    for cell in BOOTED:
        result = find(found, "vfsd", cell.workload)
        assert result.failed is None and len(result.samples) == 1, (result.failed, result.missing)
        assert result.samples[0].ops == TASKS[cell.workload].items(TINY)
        assert "{tag}" in (find(found, "plain", cell.workload).missing or "")
        for target in others:
            assert find(found, target.name, cell.workload).failed is None
        assert find(found, FLOOR, cell.workload).cell.setting.level == "mount"


def test_user_mode_linux_is_taken_from_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFSD_UML", "env A=b /no/such/linux.uml")
    assert "VFSD_UML" in (levels.make("guest", place).missing() or "")
    monkeypatch.setenv("VFSD_UML", "env A=b /bin/true")
    assert harness().uml_command() == ["env", "A=b", "/bin/true"]


# --- checks that find something ---


def spoil_file(work: Work, name: str) -> None:
    path = next(path for path in sorted((work.host / name).rglob("*")) if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def remove_file(work: Work, name: str) -> None:
    next(path for path in sorted((work.host / name).rglob("*")) if path.is_file()).unlink()


def spoil_block(work: Work) -> None:
    with open(work.host / "data", "r+b") as stream:
        stream.seek(TINY.scattered - 1)
        stream.write(b"?")


SPOILT: list[tuple[str, Callable[[Work], None], str]] = [
    ("untar", lambda work: spoil_file(work, "source"), "checksum"),
    ("untar", lambda work: remove_file(work, "source"), "44 files afterwards, not 45"),
    ("rm", lambda work: (work.host / "source").mkdir(), "rm -rf left"),
    ("git-clone", lambda work: spoil_file(work, "clone/part0"), "checksum"),
    ("npm", lambda work: spoil_file(work, "node_modules"), "is not what was written"),
    ("npm", lambda work: remove_file(work, "node_modules"), "59 files afterwards, not 60"),
    ("sqlite", lambda work: (work.host / "data.db").write_bytes(b"?" * 8192), "can't be read"),
    ("fio-randwrite-4k", spoil_block, "not what was written"),
]


def done_here(place: Place, task: Task) -> tuple[Work, Outcome]:
    """On the host, where nothing goes wrong."""
    tree = place.trees["memory"]
    host = tree.base / FLOOR / f"spoilt-{task.name}"
    shutil.rmtree(host, ignore_errors=True)
    host.mkdir()
    work = Work(tree, host, TINY, 12345)
    task.prepare(work)
    tools = Path(sources.__file__).parent / "inside"
    environment = {**os.environ, "PYTHON": sys.executable, "TOOLS": str(tools)}
    said = [
        subprocess.run(["sh", "-ec", script], cwd=host, env=environment, capture_output=True, text=True)
        for script in (task.script(work), task.after(work))
    ]
    return work, Outcome(said[0].returncode, 0.1, said[0].stdout + said[0].stderr, said[1].stdout)


@pytest.mark.parametrize(("name", "spoil", "says"), SPOILT, ids=[f"{one[0]}-{one[2][:8]}" for one in SPOILT])
def test_a_wrong_outcome_is_found(place: Place, name: str, spoil: Callable[[Work], None], says: str) -> None:
    if not all(map(shutil.which, TASKS[name].needs)):
        pytest.skip(f"{TASKS[name].needs} are not installed")
    work, outcome = done_here(place, TASKS[name])
    assert TASKS[name].finish(work, outcome).ops > 0
    spoil(work)
    with pytest.raises(Failed, match=says):
        TASKS[name].finish(work, outcome)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("find", {"output": "44\n"}, "find found 44, not 45"),
        ("grep", {"output": "x: Input/output error\n5\n"}, "grep found x: Input/output error 5, not 5"),
        ("git-status", {"output": ""}, "git status said: it said nothing"),
        ("build", {"output": "1\n"}, "the program says 1"),
        ("untar", {"status": 2, "output": "tar: oh"}, "untar ended with status 2: tar: oh"),
        ("fio-randread-4k", {"after": "0" * 32}, "is not what is in the file"),
        ("fio-randread-4k", {"output": "{}"}, "report can't be read"),
    ],
)
def test_wrong_output_is_found(place: Place, name: str, change: dict[str, object], says: str) -> None:
    if not all(map(shutil.which, TASKS[name].needs)):
        pytest.skip(f"{TASKS[name].needs} are not installed")
    work, outcome = done_here(place, TASKS[name])
    TASKS[name].finish(work, outcome)
    with pytest.raises(Failed, match=says):
        TASKS[name].finish(work, replace(outcome, **change))  # type: ignore[arg-type]


# --- daemons that fail ---

STALLS = (
    SERVE
    + """
import signal
words = ["serve", "--no-keeper", "--socket", sys.argv[1], "--shared-dir", sys.argv[2]]
child = subprocess.Popen([sys.executable, "-m", "vfsd", *words])
while not list(directory.glob("stalls/*/source/*")):
    time.sleep(0.001)
for server in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
    os.kill(int(server), signal.SIGSTOP)
time.sleep(600)
"""
)
LOSES = (
    SERVE
    + """
def watch():
    while not list(directory.glob("loses/*/source/part0/dir1/*")):
        time.sleep(0.001)
    list(directory.glob("loses/*/source/part0/dir0/*"))[0].unlink()
threading.Thread(target=watch, daemon=True).start()
serve(directory)
"""
)
DIES_UNPACKING = DIES.replace('glob("w*")', 'glob("*/source/*")')
SCRIPTS = {"stalls": STALLS, "loses": LOSES, "dies": DIES_UNPACKING}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Report]:
    """All of them, and one that does not fail: exit status and report."""
    if why := MountLevel(Place(TINY, {}, {}, Pinning(frozenset(), frozenset()), 10)).missing():
        pytest.skip(why)
    where = tmp_path_factory.mktemp("failing")
    words = []
    for name, script in SCRIPTS.items():
        (where / f"{name}.py").write_text(script)
        words += ["--daemon", f"{name}={sys.executable} {where / name}.py {{socket}} {{dir}}"]
    done = subprocess.run(
        [sys.executable, "-m", "vfsd", "bench", "--no-found", *words, "--daemon", f"good={SERVED}", "--level",
         "mount", "--only", r"cache=auto \\| (untar|find) ", "--rounds", "1", "--patience", "2.5",
         "--memory-dir", str(where), "--disk-dir", str(where), "--json", str(where / "out.json")],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, reportfile.read("NEW", where / "out.json")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stalls", r"^did not answer for 2\.5 s in the middle of untar"),
        ("loses", r"^source has 299 files afterwards, not 300"),
        ("dies", r"^ended with status 7 in the middle of untar"),
    ],
)
def test_a_column_says_why(failing: tuple[int, Report], name: str, says: str) -> None:
    result = find(failing[1], name, "untar")
    assert result.failed is not None and result.samples == []
    assert re.search(says, result.failed), result.failed


def test_the_others_go_on(failing: tuple[int, Report]) -> None:
    assert failing[0] == 1
    assert find(failing[1], "good", "untar").samples
    mounts = [line.split()[0] for line in Path("/proc/mounts").read_text().splitlines()]
    assert not set(SCRIPTS) & set(mounts)


def test_a_daemon_that_dies_under_a_guest(place: Place, tmp_path: Path) -> None:
    tagged = DIES_UNPACKING.replace('"--log-level"', '"--tag", "bench", "--log-level"')
    (tmp_path / "dies.py").write_text(tagged)
    target = parse_target(f"dies={sys.executable} {tmp_path}/dies.py {{socket}} {{dir}} {{tag}}")
    found = measured(place, "guest", [target], BOOTED[:1], [])
    failed = find(found, "dies", "untar").failed
    assert failed is not None and failed.startswith("ended with status 7 in the middle of untar"), failed


# --- what is not there ---


@pytest.mark.parametrize(
    ("setting", "has"),
    [
        (Setting(cache="metadata"), "cache mode metadata"),
        (Setting(level="guest", guest="uml"), "has no tag"),
        (Setting(dax=True), "DAX"),
    ],
)
def test_what_the_c_daemon_lacks_is_not_offered(setting: Setting, has: str, tmp_path: Path) -> None:
    with pytest.raises(NotOffered, match=has):
        Target("c", "c").command(setting, tmp_path, tmp_path)


def test_options_are_looked_for_in_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "daemon"
    said = "this keeps metadata. --cache <CACHE> (auto, never) --writeback-size"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    target = Target("rust", "rust", (str(program),))
    assert "never" in target.command(Setting(cache="none"), tmp_path, tmp_path)
    with pytest.raises(NotOffered, match="cache mode metadata"):
        target.command(Setting(cache="metadata"), tmp_path, tmp_path)
    with pytest.raises(NotOffered, match="writeback"):
        target.command(Setting(writeback=True), tmp_path, tmp_path)


def test_a_level_that_can_not_be_had_is_skipped(tmp_path: Path) -> None:
    """As not root: the reason is in the report, and nothing has failed."""
    code = (
        "import os, sys; os.geteuid = lambda: 1000; from vfsd_bench.levels import mount; "
        "from vfsd.cli import main; main(['bench', *sys.argv[1:]])"
    )
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", code, "--level", "mount", "--no-found", "--daemon", f"x={SERVED}",
         "--memory-dir", str(tmp_path), "--disk-dir", str(tmp_path), "--json", str(out)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert reportfile.read("NEW", out).skipped == [{"level": "mount", "reason": "only root may mount"}]
    assert "skipped: level mount: only root may mount" in done.stdout


def test_without_fio_its_jobs_are_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "fio" else real(name))
    level = MountLevel(place)
    (why,) = level.left_out()
    assert why.startswith("fio is not installed: without fio-randread-4k, ")
    assert not [cell for cell in level.cells(PROFILES["full"]) if cell.workload.startswith("fio")]


def test_without_a_checkout_there_is_no_guest(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfsd_bench.levels.guest.HARNESS", Path("/no/such/place"))
    monkeypatch.setitem(sys.modules, "guests", None)
    assert "only in a source checkout" in (GuestLevel(place).missing() or "")


def test_a_program_that_does_not_end_is_ended() -> None:
    with pytest.raises(Failed, match=r"did not end within 0\.05 s"):
        run_here(["sleep", "600"], 0.05)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_only_what_there_is(name: str) -> None:
    profile: Profile = PROFILES[name]
    cells = [*programplan.mount_cells(profile), *programplan.guest_cells(profile, "uml")]
    assert len(set(cells)) == len(cells)
    assert {cell.workload for cell in cells} <= set(TASKS)
    if name == "full":
        assert {cell.workload for cell in cells} == set(TASKS)
    assert {cell.setting for cell in cells if programplan.in_cache_table(cell)} == set(
        programplan.cache_settings(profile)
    )
