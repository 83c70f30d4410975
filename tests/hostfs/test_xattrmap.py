"""The rules of --xattrmap: against a plain model of the language, and through a daemon."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from guests import StartDaemon
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfsd.errors import ConfigError
from vfsd.fuse import abi
from vfsd.hostfs.ids.xattrmap import parse_map

Model = list[tuple[str, str, bytes, bytes]]  # type, scope, key, prepend

CLASSES = (b"user.", b"trusted.", b"security.", b"user.virtiofs.", b"")
MAPS = {
    "all": ":map::user.virtiofs.:",
    "trusted": "/map/trusted./user.virtiofs./",
    "written out": (
        "/prefix/all/trusted./user.virtiofs./\n/bad/server//trusted./\n"
        " /bad/client/user.virtiofs.//\t/ok/all///"
    ),
    "several": ":prefix:client:security.:user.c.:,unsupported,all,trusted.,trusted.,:bad:server::user.no:"
    ":prefix:server::user.c.::ok:all:::",
    "nothing back": ":prefix:client::user.x.::ok:server::user.:",
}


def model_of(text: str) -> Model:
    """The language, as docs and users have it: no more is understood here than is right."""
    rules: Model = []
    while text := text.lstrip():
        kind, *fields = text[1:].split(text[0], 4 if text[1:].startswith("map") is False else 3)
        if kind == "map":
            key, prepend, text = fields
            one, two = key.encode(), prepend.encode()
            rules.append(("prefix", "all", one, two))
            if key:
                rules += [("bad", "server", b"", one), ("bad", "client", two, b""), ("ok", "all", b"", b"")]
            else:
                rules.append(("bad", "all", b"", b""))
        else:
            scope, key, prepend, text = fields
            rules.append((kind, scope, key.encode(), prepend.encode()))
    return rules


def to_host(model: Model, name: bytes) -> bytes | int:
    """The host's name, or the error."""
    if name.startswith((b"system.posix_acl_access", b"system.posix_acl_default")):
        return errno.EOPNOTSUPP
    for kind, scope, key, prepend in model:
        if scope in ("client", "all") and name.startswith(key):
            if kind == "prefix":
                return prepend + name if len(prepend + name) <= 255 else errno.ERANGE
            return {"ok": name, "bad": errno.EPERM, "unsupported": errno.EOPNOTSUPP}[kind]
    return errno.EPERM


def to_guest(model: Model, name: bytes) -> bytes | None:
    for kind, scope, _key, prepend in model:
        if scope in ("server", "all") and name.startswith(prepend):
            shown = {"prefix": name[len(prepend) :], "ok": name}.get(kind)
            return shown or None
    return None


@pytest.fixture(scope="module", params=MAPS)
def mapped(
    request: pytest.FixtureRequest, module_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Guest, int, Path, Model]]:
    """A guest, the nodeid and path of a file without attributes, and the model of the daemon's rules."""
    text = MAPS[request.param]
    share = tmp_path_factory.mktemp("mapped")
    (share / "f").touch()
    options = ["--xattrmap", text, "--modcaps=+sys_admin:+setfcap"]
    with guests_of(module_daemon(share, options=options)) as start:
        guest = start()
        guest.init()
        yield guest, guest.walk("f"), share / "f", model_of(text)


names = st.builds(
    bytes.__add__, st.sampled_from(CLASSES), st.text("abcno.xvirtofs", min_size=1, max_size=9).map(str.encode)
)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(names, min_size=1, max_size=6), host=st.lists(names, max_size=4))
@example([b"trusted.x", b"user.virtiofs.x", b"user.virtiofs.trusted.x"], [b"user.c.", b"user.virtiofs."])
def test_a_round_trip_is_the_models(
    mapped: tuple[Guest, int, Path, Model], names: list[bytes], host: list[bytes]
) -> None:
    guest, nodeid, path, model = mapped
    for name in os.listxattr(path):
        os.removexattr(path, name)
    for name in host:
        with contextlib.suppress(OSError):
            os.setxattr(path, name, b"host")
    expected = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
    for name in names:
        target = to_host(model, name)
        if isinstance(target, int):
            for call in (
                lambda: guest.setxattr(nodeid, name, b"v"),  # noqa: B023
                lambda: guest.getxattr(nodeid, name),  # noqa: B023
                lambda: guest.removexattr(nodeid, name),  # noqa: B023
            ):
                with refused(target):
                    call()
            continue
        try:
            os.setxattr(path, target, b"probe")
        except OSError as problem:
            with refused(problem.errno or 0):
                guest.setxattr(nodeid, name, b"v" + name)
            continue
        guest.setxattr(nodeid, name, b"v" + name)
        expected[target] = b"v" + name
        assert guest.getxattr(nodeid, name) == b"v" + name
    assert {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)} == expected
    listed = guest.listxattr(nodeid, 65536)
    shown = [to_guest(model, os.fsencode(name)) for name in os.listxattr(path)]
    assert listed == b"".join(name + b"\0" for name in shown if name)
    assert guest.listxattr(nodeid, 0) == len(listed).to_bytes(8, "little")
    for name in names:
        target = to_host(model, name)
        if isinstance(target, bytes) and target in expected:
            guest.removexattr(nodeid, name)
            del expected[target]
            with refused(errno.ENODATA):
                guest.getxattr(nodeid, name)


def test_a_mapped_name_may_become_too_long(mapped: tuple[Guest, int, Path, Model]) -> None:
    guest, nodeid, _path, model = mapped
    for size in (240, 241, 242, 243, 248, 255):
        name = b"security.".ljust(size, b"n")
        target = to_host(model, name)
        if isinstance(target, int):
            with refused(target):
                guest.setxattr(nodeid, name, b"v")
        elif target.startswith(b"user."):
            guest.setxattr(nodeid, name, b"v")
            guest.removexattr(nodeid, name)


@pytest.mark.parametrize("change", ["write", "truncate", "chown", "open", "create"])
def test_file_capabilities_by_another_name_go_with_a_change(
    daemon: StartDaemon, tmp_path: Path, change: str
) -> None:
    daemon_ = daemon(tmp_path, options=["--xattrmap", ":map:security.:user.kept.:"])
    (tmp_path / "f").write_bytes(b"content")
    with guests_of(daemon_) as start:
        guest = start()
        guest.init()
        nodeid = guest.walk("f")
        guest.setxattr(nodeid, b"security.capability", b"anything")
        assert os.listxattr(tmp_path / "f") == ["user.kept.security.capability"]
        changes: dict[str, Callable[[], object]] = {
            "write": lambda: guest.write(nodeid, guest.open(nodeid, os.O_WRONLY), 0, b"x"),
            "truncate": lambda: guest.truncate(nodeid, 1),
            "chown": lambda: guest.setattr(nodeid, abi.Fattr.UID, uid=os.geteuid()),
            "open": lambda: guest.open(nodeid, os.O_WRONLY | os.O_TRUNC),
            "create": lambda: guest.create(1, b"f", os.O_WRONLY | os.O_TRUNC),
        }
        changes[change]()
        assert os.listxattr(tmp_path / "f") == []
        changes[change]()


def test_names_and_values_have_linuxs_limits(guest: Guest, share: Path) -> None:
    (share / "f").touch()
    nodeid = guest.walk("f")
    for name in (b"", b"user." + b"n" * 251, b"n" * 70_000):
        for call in (
            lambda: guest.setxattr(nodeid, name, b"v"),  # noqa: B023
            lambda: guest.getxattr(nodeid, name),  # noqa: B023
            lambda: guest.removexattr(nodeid, name),  # noqa: B023
        ):
            with refused(errno.ERANGE):
                call()
    longest = b"user." + b"n" * 250
    guest.setxattr(nodeid, longest, b"v")
    assert guest.getxattr(nodeid, longest) == b"v"
    for size in (65537, 70_000, 131072):
        with refused(errno.E2BIG):
            guest.setxattr(nodeid, b"user.x", bytes(size))
    for size in (2**32 - 1, 2**31, 65537):
        with refused(errno.E2BIG, errno.EINVAL):
            guest.body("SETXATTR", nodeid, abi.SETXATTR_IN.pack(size, 0) + b"user.x\0short")
    for flags in (3, 4, 2**31):
        with refused(errno.EINVAL, errno.EEXIST, errno.ENODATA):
            guest.setxattr(nodeid, b"user.x", b"v", flags)
    assert os.listxattr(share / "f") == [longest.decode()]


# ---- the parser


fields = st.text("abc./,", max_size=4)
separators = st.sampled_from(":;|#")


@st.composite
def maps(draw: st.DrawFn) -> str:
    text = ""
    for _ in range(draw(st.integers(0, 4))):
        separator = draw(separators)
        kind = draw(st.sampled_from(["prefix", "ok", "bad", "unsupported"]))
        scope = draw(st.sampled_from(["client", "server", "all"]))
        text += draw(st.sampled_from(["", " ", "\n\t"]))
        text += separator + separator.join([kind, scope, draw(fields), draw(fields)]) + separator
    separator = draw(separators)
    if not text or draw(st.booleans()):
        text += separator + separator.join(["map", draw(fields), draw(fields)]) + separator
    return text


def plain(text: str) -> Model:
    return [
        (rule.kind.name.lower(), (rule.scope.name or "").lower(), rule.key, rule.prepend)
        for rule in parse_map("--xattrmap", text)
    ]


@given(text=maps())
def test_rules_mean_what_the_model_says(text: str) -> None:
    assert plain(text) == model_of(text)


@given(text=st.one_of(maps(), st.text(":/ mapokbdlserv.", max_size=40)), data=st.data())
def test_any_text_is_rules_or_a_mistake_within_it(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.text(":/x ", max_size=2)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        parse_map("--xattrmap", text)
    except ConfigError as problem:
        words = str(problem).split()
        assert words[:2] == ["--xattrmap:", "character"]
        assert 1 <= int(words[2].rstrip(":")) <= len(text) + 1


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", 1, "there is no rule"),
        ("  \n", 1, "there is no rule"),
        (":ok:all::", 10, "the prepend does not end"),
        (":ok:all:::x", 12, "the type does not end"),
        ("ok:all:::", 10, "the type does not end"),
        (":okay:all:::", 2, "type 'okay'"),
        (":OK:all:::", 2, "type 'OK'"),
        (":ok:both:::", 5, "scope 'both'"),
        (":ok:all:::/bad/all//", 21, "the prepend does not end"),
        (":map:a:b::ok:all:::", 10, "put that one last"),
        (":prefix:all:" + "k" * 256 + "::", 13, "256 bytes"),
        (":prefix:client::user." + "p" * 250 + ":", 17, "274 bytes"),
        (":prefix:all::" + "p" * 237 + ":", 14, "256 bytes"),
        (":map:trusted.:" + "p" * 248 + ":", 15, "256 bytes"),
        (":ok:all:::   ;bad;none;;;", 19, "scope 'none'"),
    ],
)
def test_a_mistake_is_named_by_its_place(text: str, at: int, says: str) -> None:
    with pytest.raises(ConfigError) as info:
        parse_map("--xattrmap", text)
    assert f"character {at}: " in str(info.value) and says in str(info.value)
