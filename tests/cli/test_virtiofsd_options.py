"""The command line of vfsd-virtiofsd: all that virtiofsd knows, read as virtiofsd reads it."""

import os
import re
from pathlib import Path

import pytest

from vfsd.errors import ConfigError, HostError
from vfsd.options.resolve import check_options
from vfsd.options.table import ServeOptions
from vfsd.options.virtiofsd import CommandLine, parse
from vfsd.virtiofsd.main import rust_log
from vfsd.virtiofsd.usage import usage

TABLE = Path(__file__).with_name("virtiofsd-1.14.tsv")
ROWS = [line.split("\t") for line in TABLE.read_text().splitlines() if not line.startswith("#")]
MANUAL = Path(__file__).resolve().parents[2] / "docs" / "virtiofsd.md"


def read(*words: str) -> ServeOptions:
    line = parse(words)
    given = dict(line.given)
    if not {"fd", "socket"} & given.keys():
        given |= parse(["--socket-path=/tmp/v.sock"]).given
    if "shared_dir" not in given:
        given |= parse(["--shared-dir=/"]).given
    return check_options(given)


@pytest.fixture
def ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.mark.usefixtures("ordinary_user")  # --uid-map is for those
@pytest.mark.parametrize(
    ("words", "key", "value", "default", "ours"), ROWS, ids=[row[0].replace("/", "") for row in ROWS]
)
def test_each_option_of_virtiofsd_is_there(
    tmp_path: Path, words: str, key: str, value: str, default: str, ours: str
) -> None:
    option = words.split("=")[0].split()[0]
    assert option in re.split(r"[\s,\[=]+", usage())
    line = parse(words.format(dir=tmp_path).split(" ", 1))
    if key == "-":
        assert line.own or line.notes
        return
    found = getattr(read(*words.format(dir=tmp_path).split(" ", 1)), key)
    found = found.decode() if isinstance(found, bytes) else found
    if value == "*":
        assert found
    else:
        assert str(found) == value.format(dir=tmp_path)
    if default:
        assert str(getattr(read(), key)) == (ours or default)
    if ours:
        assert f"--{key.replace('_', '-')}" in MANUAL.read_text()


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--cache", "always", "--cache=never"], "cache", "never"),
        (["--xattr", "--xattr"], "xattr", True),
        (["--announce-submounts", "--no-announce-submounts"], "announce_submounts", False),
        (["--cache=always", "-o", "cache=none"], "cache", "never"),
        (["-o", "cache=none", "--cache=always"], "cache", "never"),
        (["-oxattr,no_flock", "-o=writeback"], "writeback", True),
        (["-dfoxattr"], "xattr", True),
        (["-df"], "log_level", "debug"),
        (["--inode-file-handles", "never"], "inode_file_handles", "never"),
        (["--posix-acl", "--xattr"], "posix_acl", "always"),
        (["--modcaps-is-not-mistaken-for-this"], None, "is unknown"),
        (["--shared-dir=/tmp"], "shared_dir", "/tmp"),
        (["--tag", "-"], "tag", b"-"),
    ],
)
def test_words_are_read_as_clap_reads_them(words: list[str], key: str | None, value: object) -> None:
    if key is None:
        with pytest.raises(ConfigError, match=str(value)):
            parse(words)
    else:
        assert getattr(read(*words), key) == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--bogus"], "--bogus: is unknown; see vfsd-virtiofsd --help"),
        (["--cach=never"], "--cach: is unknown"),
        (["-x"], "-x: is unknown"),
        (["-dx"], "-x: is unknown"),
        (["/srv"], "/srv: is no option"),
        (["--", "--xattr"], "--: is no option"),
        (["--xattr=yes"], "--xattr: takes no value; leave out '=yes'"),
        (["--cache"], "--cache: needs a value; write --cache=never|auto"),
        (["--cache", "--xattr"], "--cache: needs a value"),
        (["-o"], "-o: needs a value"),
        (["--posix-acl", "auto"], "auto: is no option"),
        (["--posix-acl="], "--posix-acl: '' is unknown; use never, auto or always"),
        (["--thread-pool-size=1025"], "--thread-pool-size: '1025' is no number from 0 to 1024"),
        (["--fd=3", "--socket-path=/tmp/s"], "--fd: there is --socket too"),
        (["--fd=3", "--socket-group=0"], "--socket-group: the socket of --fd was made by others"),
        (["--migration-mode=by-magic"], "--migration-mode: 'by-magic' is unknown"),
        (["--migration-mode=file-handles", "--migration-confirm-paths"], "--migration-mode: file-handles"),
        (["-o", "source=/,bogus"], "-o bogus: is unknown"),
        (["--uid-map=0:1:2"], "--uid-map: rule 1, character 1"),
        (["--translate-uid=map:0:1"], "--translate-uid: rule 1, character 8: the count is missing"),
        (["--xattrmap=:bad:"], "--xattrmap: character 6"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert str(caught.value).startswith(says)
    assert not isinstance(caught.value, HostError)


def test_what_the_host_lacks_is_another_kind_of_mistake() -> None:
    for word in ("--shared-dir=/nonexistent", "--socket-path=/nonexistent/s", "--socket-group=no such"):
        with pytest.raises(HostError):
            read(word)


def test_commas_in_a_path_are_doubled_in_o_only(tmp_path: Path) -> None:
    odd = tmp_path / "a,b,,c"
    odd.mkdir()
    doubled = str(odd).replace(",", ",,")
    assert read("-o", f"source={doubled},cache=always").shared_dir == str(odd)
    assert read("--shared-dir", str(odd)).shared_dir == str(odd)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("ERROR", "error"),
        ("trace", "debug"),
        ("warn,virtiofsd=debug", "debug"),
        ("vhost=debug", None),
        ("", None),
        ("nonsense", None),
    ],
)
def test_rust_log_is_read_as_far_as_it_is_for_the_daemon(text: str, level: str | None) -> None:
    assert rust_log(text) == level


def test_what_has_no_effect_says_why() -> None:
    line: CommandLine = parse(["--migration-on-error=guest-error", "-o", "max_idle_threads=3"])
    assert [note.split(" has no effect: ")[0] for note in line.notes] == [
        "--migration-on-error",
        "-o max_idle_threads",
    ]
