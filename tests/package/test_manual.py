"""The manual pages and the shells' completions, as tools/manpages.py writes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from manpages import COMPLETIONS, main

from vfsd.cli import COMMANDS
from vfsd.hostfs.ids.xattrmap import Kind, Scope
from vfsd.options.table import SERVE_OPTIONS, Option
from vfsd.options.virtiofsd import OWN_OPTIONS

MAN = Path(__file__).resolve().parent.parent.parent / "man"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manual")
    main(folder)
    return folder


def entries(page: Path) -> list[str]:
    """What a page explains: the tag of each tagged paragraph, without fonts."""
    tags = re.findall(r"^\.TP\n(.*)", page.read_text(), re.M)
    return [re.sub(r"\\f.", "", tag.removeprefix(".B ")).replace("\\-", "-") for tag in tags]


def pages(made: Path) -> list[Path]:
    return [*made.glob("*.[15]"), *MAN.glob("*.7")]


def test_each_command_has_a_page(made: Path) -> None:
    assert {f"vfsd-{name}.1" for name in COMMANDS} <= {page.name for page in pages(made)}


@pytest.mark.parametrize(
    ("page", "options"),
    [("vfsd-serve.1", SERVE_OPTIONS), ("vfsd-virtiofsd.1", (*SERVE_OPTIONS, *OWN_OPTIONS))],
)
def test_each_option_is_on_its_page(made: Path, page: str, options: Sequence[Option]) -> None:
    words = {word for entry in entries(made / page) for word in re.split(r"[ ,\[]+", entry)}
    for option in options:
        negated = {f"--no-{option.name[2:]}"} if option.on else set()
        assert {option.name, *option.aliases} | negated <= words


def test_each_key_of_a_file_is_on_its_page(made: Path) -> None:
    keys = {entry.partition(" = ")[0] for entry in entries(made / "vfsd.toml.5")}
    assert keys == {option.name[2:] for option in SERVE_OPTIONS} - {"fd"}


def test_each_word_of_a_rule_is_on_the_page_of_rules() -> None:
    words = {name.lower() for name in (*Kind.__members__, *Scope.__members__)}
    assert words | {"map"} == set(entries(MAN / "vfsd-xattrmap.7"))


@pytest.mark.parametrize(
    "check", (["mandoc", "-T", "lint", "-W", "warning"], ["man", "--warnings", "-P", "cat", "-l"]),
    ids=("mandoc", "man"),
)  # fmt: skip
def test_pages_are_accepted(made: Path, check: list[str]) -> None:
    if shutil.which(check[0]) is None:
        pytest.skip(f"{check[0]} is not installed")
    for page in pages(made):
        done = subprocess.run([*check, page], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        said = done.stderr + (done.stdout if check[0] == "mandoc" else "")
        assert (done.returncode, said) == (0, ""), page.name


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_a_shell_reads_its_completion(made: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = made / shell / COMPLETIONS[shell]
    done = subprocess.run([shell, "-n", script], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_words_are_completed(made: Path) -> None:
    asked = os.environ | {"_VFSD_COMPLETE": "bash_complete", "COMP_WORDS": "vfsd se", "COMP_CWORD": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("vfsd")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=asked,
    )  # fmt: skip
    assert done.stdout.split() == ["plain,serve"], done.stderr
