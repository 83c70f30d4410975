"""What the host removes or replaces while the guest has its name: nothing is written where nobody looks."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mounted, mounting

OPENS = 300
NUMBERS = itertools.count()


@pytest.fixture(scope="module", params=["never", "auto", "always"])
def it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    with mounting(tmp_path_factory.mktemp("replaced"), "vfsd", ("--cache", request.param)) as it:
        yield it


@pytest.fixture
def both(it: Mounted) -> Iterator[tuple[Path, Path]]:
    """A new directory with `f` and `d/old`, known to the guest: on the host, in the guest."""
    name = f"place{next(NUMBERS)}"
    host, guest = it.share / name, it.root / name
    (host / "d").mkdir(parents=True)
    (host / "f").write_text("old")
    (host / "d" / "old").write_text("old")
    assert (guest / "f").read_text() == (guest / "d" / "old").read_text() == "old"
    yield host, guest


def remade(path: Path) -> None:
    path.unlink()
    path.write_text("new")


def renamed_over(path: Path) -> None:
    path.with_name("next").write_text("new")
    path.with_name("next").rename(path)


def overwrite(path: Path) -> None:
    path.write_text("guest")


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("guest")


def update(path: Path) -> None:
    with path.open("r+") as file:
        file.write("guest")


@pytest.mark.parametrize("replace", [remade, renamed_over])
@pytest.mark.parametrize(
    ("write", "becomes"),
    [(overwrite, "guest"), (append, "newguest"), (update, "guest"), (lambda p: os.truncate(p, 1), "n")],
    ids=["overwrite", "append", "update", "truncate"],
)
def test_what_is_written_is_in_the_file_of_that_name(
    both: tuple[Path, Path],
    replace: Callable[[Path], None],
    write: Callable[[Path], None],
    becomes: str,
) -> None:
    host, guest = both
    replace(host / "f")
    write(guest / "f")
    assert (host / "f").read_text() == becomes


def test_a_removed_file_is_made_anew(both: tuple[Path, Path]) -> None:
    host, guest = both
    (host / "f").unlink()
    (guest / "f").write_text("guest")
    assert (host / "f").read_text() == "guest"
    (host / "f").unlink()
    with pytest.raises(FileNotFoundError):
        os.truncate(guest / "f", 0)


IN_A_DIRECTORY: dict[str, Callable[[Path], object]] = {
    "create": lambda d: (d / "made").write_text("x"),
    "mkdir": lambda d: (d / "made").mkdir(),
    "mknod": lambda d: os.mkfifo(d / "made"),
    "symlink": lambda d: (d / "made").symlink_to("target"),
    "link": lambda d: os.link(d.parent / "f", d / "made"),
    "rename": lambda d: os.rename(d.parent / "f", d / "made"),
    "rename-out": lambda d: os.rename(d / "new", d / "made"),
}


@pytest.mark.parametrize("how", IN_A_DIRECTORY)
def test_names_are_made_in_the_directory_that_has_taken_the_place(both: tuple[Path, Path], how: str) -> None:
    host, guest = both
    shutil.rmtree(host / "d")
    (host / "d").mkdir()
    (host / "d" / "new").write_text("new")
    IN_A_DIRECTORY[how](guest / "d")
    assert os.path.lexists(host / "d" / "made")


IN_IT: dict[str, Callable[[Path], object]] = {
    "read": lambda d: (d / "new").read_text(),
    "list": os.listdir,
    "unlink": lambda d: (d / "new").unlink(),
}


@pytest.mark.parametrize("use", IN_IT.values(), ids=IN_IT)
def test_what_is_in_such_a_directory_is_found_and_removed(
    both: tuple[Path, Path], use: Callable[[Path], object]
) -> None:
    host, guest = both
    shutil.rmtree(host / "d")
    (host / "d").mkdir()
    (host / "d" / "new").write_text("new")
    assert use(guest / "d") in ("new", ["new"], None)
    assert os.path.exists(host / "d" / "new") == (use is not IN_IT["unlink"])


def test_open_files_without_a_name_go_on(both: tuple[Path, Path]) -> None:
    host, guest = both
    by_host, by_guest = os.open(guest / "f", os.O_RDWR), os.open(guest / "d" / "old", os.O_RDWR)
    nameless = os.open(guest, os.O_RDWR | os.O_TMPFILE, 0o600)
    (host / "f").unlink()
    (guest / "d" / "old").unlink()
    for fd in (by_host, by_guest, nameless):
        os.pwrite(fd, b"kept", 0)
        os.fchmod(fd, 0o640)
        for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND):
            again = os.open(f"/proc/self/fd/{fd}", flags)
            os.write(again, b"more")
            os.close(again)
        os.ftruncate(fd, 6)
        assert os.fstat(fd).st_nlink == 0 and os.pread(fd, 100, 0) == b"moremo"
        os.close(fd)


def test_a_working_directory_that_is_gone_has_nothing_in_it(both: tuple[Path, Path]) -> None:
    host, guest = both
    here = os.open(guest / "d", os.O_RDONLY)
    shutil.rmtree(host / "d")
    for _ in range(2):
        for use in (os.stat, os.mkdir, os.unlink):
            with pytest.raises(FileNotFoundError):
                use("name", dir_fd=here)
    os.close(here)


def test_a_name_that_is_replaced_all_the_time_can_always_be_opened(both: tuple[Path, Path]) -> None:
    host, guest = both
    over = threading.Event()

    def replace() -> None:
        while not over.is_set():
            renamed_over(host / "f")

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(OPENS):
            with contextlib.closing(os.fdopen(os.open(guest / "f", os.O_WRONLY | os.O_APPEND), "ab")) as file:
                file.write(b"x")
    finally:
        over.set()
        thread.join()
