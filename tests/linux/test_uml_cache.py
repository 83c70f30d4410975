"""How soon the guest sees the host's changes, and the host the guest's, in each cache mode."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from guests import StartDaemon, UmlGuest, eventually
from share import WORKLOADS, Share

pytestmark = pytest.mark.uml

# Attributes and names are valid for one second under cache=auto. The rest is for starting Python
# in the guest on a busy machine.
AUTO_SECONDS = 1.5


@pytest.fixture(scope="module")
def shares(
    module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Share]]:
    """A share for each mode, not started yet."""
    made = {
        mode: Share(
            tmp_path_factory.mktemp(mode),
            module_daemon,
            lambda daemon: UmlGuest(daemon.socket, files=WORKLOADS),
            cache=mode,
        )
        for mode in ("never", "auto", "always")
    }
    yield made
    for share in made.values():
        share.__exit__(None, None, None)


def replaced(path: Path, content: str) -> None:
    """Write a file in place, as an editor on the host does."""
    path.write_text(content)


def look(share: Share, guest: str) -> str:
    """Size and content of a file, in the guest, with one process."""
    return share.guest.check(f"stat -c %s {guest}; cat {guest}")


def test_never_shows_changes_of_the_host_at_once(shares: dict[str, Share]) -> None:
    share = shares["never"].ready()
    host, guest = share.directory("host-changes")
    for number in range(5):
        text = f"version {number} {'x' * number}\n"
        replaced(host / "file", text)
        assert look(share, f"{guest}/file") == f"{len(text)}\n{text}"
    replaced(host / "next", "by rename\n")
    (host / "next").rename(host / "file")
    assert look(share, f"{guest}/file") == "10\nby rename\n"
    (host / "file").chmod(0o604)
    assert share.guest.check(f"stat -c %a {guest}/file") == "604\n"
    (host / "file").unlink()
    assert share.guest.run(f"stat {guest}/file").status != 0
    assert share.guest.check(f"ls {guest}") == ""
    (host / "file").mkdir()
    assert share.guest.check(f"stat -c %F {guest}/file") == "directory\n"


@pytest.mark.parametrize("mode", ["never", "auto"])
def test_a_file_open_in_the_guest_shows_what_the_host_writes(
    shares: dict[str, Share], mode: str
) -> None:
    share = shares[mode].ready()
    host, guest = share.directory("open-file")
    replaced(host / "file", "first")

    def write_when_open() -> None:
        assert eventually((host / "file.opened").exists)
        replaced(host / "file", "second")

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_when_open)
        seconds = share.workload("watch.py", f"{guest}/file", "open", "second", "10")
        written.result()
    assert seconds is not None
    if mode == "auto":
        assert seconds <= AUTO_SECONDS


@pytest.mark.parametrize("mode", ["never", "auto", "always"])
def test_host_sees_changes_of_the_guest_at_once(shares: dict[str, Share], mode: str) -> None:
    share = shares[mode].ready()
    host, guest = share.directory("guest-changes")
    share.guest.check(f"echo one >{guest}/file")
    assert (host / "file").read_text() == "one\n"
    share.guest.check(f"echo two >>{guest}/file; chmod 600 {guest}/file; mv {guest}/file {guest}/f")
    assert (host / "f").read_text() == "one\ntwo\n"
    assert (host / "f").stat().st_mode & 0o777 == 0o600
    assert not (host / "file").exists()
    share.guest.check(f"rm {guest}/f; mkdir {guest}/d")
    assert [path.name for path in host.iterdir()] == ["d"]


def test_auto_shows_changes_of_the_host_within_a_second(shares: dict[str, Share]) -> None:
    share = shares["auto"].ready()
    host, guest = share.directory("host-changes")
    replaced(host / "file", "short")
    assert look(share, f"{guest}/file") == "5\nshort"
    for content in ("a longer text", "less", "SAME"):
        replaced(host / "file", content)
        seconds = share.workload("watch.py", f"{guest}/file", "content", content, "10")
        assert seconds is not None
        assert seconds <= AUTO_SECONDS
    replaced(host / "next", "by rename")
    (host / "next").rename(host / "file")
    seconds = share.workload("watch.py", f"{guest}/file", "content", "by rename", "10")
    assert seconds is not None
    assert seconds <= AUTO_SECONDS


def test_auto_shows_new_content_when_a_file_is_opened_again(shares: dict[str, Share]) -> None:
    share = shares["auto"].ready()
    host, guest = share.directory("reopen")
    # Equal lengths: nothing but the new open tells the guest that its pages are old.
    for number in range(5):
        replaced(host / "file", f"content {number}")
        assert share.guest.check(f"cat {guest}/file") == f"content {number}"


def test_auto_shows_a_new_file_that_was_looked_for_before(shares: dict[str, Share]) -> None:
    share = shares["auto"].ready()
    host, guest = share.directory("negative")
    assert share.guest.run(f"cat {guest}/file").status != 0
    replaced(host / "file", "now")
    seconds = share.workload("watch.py", f"{guest}/file", "content", "now", "10")
    assert seconds is not None
    assert seconds <= AUTO_SECONDS


def test_always_lets_the_guest_keep_the_attributes_it_knows(shares: dict[str, Share]) -> None:
    share = shares["always"].ready()
    host, guest = share.directory("host-changes")
    replaced(host / "file", "known")
    assert share.guest.check(f"stat -c %s {guest}/file") == "5\n"
    replaced(host / "file", "changed on the host")
    # Longer than the timeout of the other modes: the guest does not ask.
    assert share.workload("watch.py", f"{guest}/file", "size", "19", "2") is None
    # What the guest has never asked for, it sees as it is.
    replaced(host / "new", "new on the host")
    assert look(share, f"{guest}/new") == "15\nnew on the host"
