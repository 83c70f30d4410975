"""What a real kernel asks, mode by mode and switch by switch, and that nothing is lost by not asking.

One guest has a device of each kind mounted; the daemons tell at the end of a session what it had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import checks
import pytest
from guests import Daemon, Guest, StartDaemon, UmlGuest, eventually
from share import WORKLOADS, Share
from workloads import asking, writeback

pytestmark = pytest.mark.uml

# Cache mode and options of each share.
SHARES: dict[str, tuple[str, tuple[str, ...]]] = {
    "never": ("never", ()),
    "auto": ("auto", ()),
    "metadata": ("metadata", ()),
    "always": ("always", ()),
    "flush": ("auto", ("--always-flush",)),
    "links": ("auto", ("--symlink-cache", "always")),
    "absent": ("auto", ("--negative-timeout", "60")),
    "present": ("always", ("--negative-timeout", "0")),
    "brief": ("auto", ("--timeout", "0.3", "--negative-timeout", "0.3")),
    "zero": ("always", ("--zero-message-open",)),
    "writeback": ("auto", ("--writeback",)),
}
# How often `asking` had each of these sent. LOOKUP: of the missing name, of what is there and of the
# file to be made; without a timeout also at each use.
COUNTED = ("LOOKUP", "OPEN", "READ", "FLUSH", "RELEASE", "READLINK", "OPENDIR", "WRITE")
ASKED = {
    "never": (13, 3, 3, 0, 4, 3, 3, 100),
    "auto": (7, 3, 3, 0, 4, 3, 3, 100),
    "metadata": (5, 3, 3, 0, 4, 1, 3, 100),
    "always": (5, 3, 1, 0, 4, 1, 3, 100),
    "flush": (7, 3, 3, 4, 4, 3, 3, 100),
    "links": (7, 3, 3, 0, 4, 1, 3, 100),
    "absent": (5, 3, 3, 0, 4, 3, 3, 100),
    "present": (7, 3, 1, 0, 4, 1, 3, 100),
    "zero": (5, 1, 1, 1, 0, 1, 3, 100),
    "writeback": (7, 3, 3, 4, 4, 3, 3, 1),
}
LISTED = {"never": 6, "auto": 6, "metadata": 2, "always": 2}  # READDIR and READDIRPLUS
SESSION = re.compile(r"the session had (.*)")


class Place(Share):
    """One of several shares of a guest."""

    def __init__(self, host: Path, daemon: Daemon, guest: Guest, name: str) -> None:
        self.host = host
        self.at = f"/tmp/{name}"
        self._daemon = daemon
        self._guest = guest

    def directory(self, name: str) -> tuple[Path, str]:
        path = self.host / name
        path.mkdir()
        return path, f"{self.at}/{name}"


def session(daemon: Daemon) -> dict[str, int]:
    """Requests of its first one, by operation."""
    assert eventually(lambda: SESSION.search(daemon.log) is not None)
    found = SESSION.search(daemon.log)
    assert found is not None
    return {op: int(count) for op, count in (word.split() for word in found[1].split(", "))}


@pytest.fixture(scope="module")
def asked(
    module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Place], dict[str, dict[str, int]]]]:
    """The shares, mounted again, and what `asking` had each daemon asked."""
    daemons: dict[str, Daemon] = {}
    for name, (cache, options) in SHARES.items():
        host = tmp_path_factory.mktemp(name)
        asking.prepare(host)
        daemons[name] = module_daemon(host, tag=name, cache=cache, options=[*options, "--log-level", "debug"])
    first, *others = daemons.values()
    guest = UmlGuest(first.socket, files=WORKLOADS)
    guest.more_sockets = [daemon.socket for daemon in others]
    with ExitStack() as stack:
        guest.start()
        stack.callback(guest.kill)
        places = {name: Place(daemon.shared, daemon, guest, name) for name, daemon in daemons.items()}
        mounts = "".join(f"mount -t virtiofs {name} {place.at};" for name, place in places.items())
        paths = " ".join(place.at for place in places.values())
        guest.check(f"set -e; mkdir {paths}; {mounts}")
        guest.workload("asking.py", *paths.split())
        guest.check(f"set -e; umount {paths}; {mounts}")
        yield places, {name: session(daemon) for name, daemon in daemons.items()}


@pytest.fixture
def places(asked: tuple[dict[str, Place], dict[str, dict[str, int]]]) -> dict[str, Place]:
    return asked[0]


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked(asked: tuple[dict[str, Place], dict[str, dict[str, int]]], name: str) -> None:
    counts = asked[1][name]
    assert tuple(counts.get(op, 0) for op in COUNTED) == ASKED[name]
    if name in LISTED:
        assert counts.get("READDIR", 0) + counts.get("READDIRPLUS", 0) == LISTED[name]


@pytest.mark.parametrize("name", SHARES)
def test_what_was_written_is_on_the_host(places: dict[str, Place], name: str) -> None:
    lines = (places[name].host / "log").read_bytes().splitlines()
    assert lines == [b"%04d" % number for number in range(asking.WRITES)]


@pytest.mark.parametrize(
    ("name", "at_once"), [("auto", True), ("never", True), ("absent", False), ("present", True)]
)
def test_when_a_name_made_on_the_host_is_seen(places: dict[str, Place], name: str, at_once: bool) -> None:
    place = places[name]
    host, guest = place.directory("late")
    assert place.guest.run(f"stat {guest}/name").status != 0
    (host / "name").touch()
    assert (place.guest.run(f"stat {guest}/name").status == 0) == at_once


def test_timeouts_end_when_they_say(places: dict[str, Place]) -> None:
    place = places["brief"]
    host, guest = place.directory("brief")
    (host / "known").write_text("1")
    assert place.guest.run(f"stat {guest}/known && stat {guest}/name").status != 0
    (host / "name").write_text("now")
    (host / "known").write_text("longer")
    for name, content in (("name", "now"), ("known", "longer")):
        seconds = place.workload("watch.py", f"{guest}/{name}", "content", content, "10")
        assert seconds is not None and seconds <= 0.8


@pytest.mark.parametrize(("name", "shown"), [("metadata", "other"), ("always", "known")])
def test_data_is_kept_by_always_alone(places: dict[str, Place], name: str, shown: str) -> None:
    place = places[name]
    host, guest = place.directory("kept")
    (host / "file").write_text("known\n")
    # Not by cat, which asks for attributes: a READ leaves the atime unknown, so Linux fetches them.
    look = f"read -r line <{guest}/file; echo $line"
    assert place.guest.check(look) == "known\n"
    (host / "file").write_text("other\n")
    assert place.guest.check(look) == f"{shown}\n"


def test_writeback_keeps_appends_sizes_and_times(places: dict[str, Place]) -> None:
    place = places["writeback"]
    host, guest = place.directory("kept")
    (host / "old").write_bytes(b"o" * 10000)
    found = place.workload("writeback.py", guest)
    timed, dated = found.pop("timed"), found.pop("dated")
    assert found == dict.fromkeys(found, True)
    assert (host / "log").read_bytes() == b"".join(b"%04d\n" % n for n in range(writeback.LINES))
    assert (host / "old").read_bytes() == b"o" * 5000 + b"new" + b"o" * 4997
    assert (host / "resized").read_bytes() == b"x" * 100 + bytes(7900) + b"end"
    assert (host / "timed").read_bytes() == b"12"
    assert (host / "timed").stat().st_mtime_ns == timed
    assert (host / "dated").stat().st_mtime_ns == dated == writeback.DATE


@pytest.mark.parametrize("name", ["auto", "always", "zero", "writeback"])
def test_data_are_found_that_only_the_guest_has(places: dict[str, Place], name: str) -> None:
    _, guest = places[name].directory("unwritten")
    answers = places[name].workload("copied.py", guest, "mapped")
    assert answers == dict.fromkeys(answers, True)


@pytest.mark.parametrize("name", ["absent", "zero", "writeback"])
def test_programs_get_on_with_it(places: dict[str, Place], name: str) -> None:
    place = places[name]
    checks.open_files_lose_their_names(place)
    if name == "zero":
        # With a writeback cache Linux learns of blocks only after a close, and this asks before.
        checks.holes_stay_holes(place)
        checks.appends_keep_every_record(place, 100)


def test_without_opens_files_are_truncated_executed_and_outlive_names(places: dict[str, Place]) -> None:
    place = places["zero"]
    host, guest = place.directory("zero")
    place.guest.check(
        f"set -e; cd {guest}; printf '#!/bin/sh\\necho ran\\n' >p; chmod 755 p; test $(./p) = ran;"
        " echo 1 >>p; echo 2 >p; test $(cat p) = 2;"
        " exec 3>f 4<f; chmod 000 f; rm p; echo kept >&3; test $(cat <&4) = kept; rm f;"
        " echo more >&3; test $(cat <&4) = more"
    )
    assert list(host.iterdir()) == []
