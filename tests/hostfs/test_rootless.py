"""A daemon that is not root: as a user with one id, and in a user namespace with several."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon

from vfsd.errors import ConfigError
from vfsd.fuse.abi import Fattr, Init
from vfsd.sandbox.userns import parse_ranges

from .test_identity import groups_ext

OWN, FIRST, COUNT = 1234, 300000, 65536

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a daemon as somebody else")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that every user may reach; below it `share` is the user's own."""
    with tempfile.TemporaryDirectory(prefix="vfsd-rootless-") as name:
        path = Path(name)
        path.chmod(0o755)
        for directory, mode in (("share", 0o755), ("run", 0o755)):
            (path / directory).mkdir()
            (path / directory).chmod(mode)
            os.chown(path / directory, OWN, OWN)
        for file in ("subuid", "subgid"):
            (path / file).write_text(f"rootless:{FIRST}:{COUNT}\n")
        shutil.copy("/etc/passwd", path / "passwd")
        with (path / "passwd").open("a") as passwd:
            passwd.write(f"rootless:x:{OWN}:{OWN}::/:/bin/sh\n")
        yield path


def as_user(base: Path) -> list[str]:
    """Before a command: the user OWN in a mount namespace where FIRST and the ids after it are its own."""
    binds = "; ".join(f"mount --bind {base / file} /etc/{file}" for file in ("passwd", "subuid", "subgid"))
    user = ["setpriv", "--reuid", str(OWN), "--regid", str(OWN), "--clear-groups", "--"]
    return ["unshare", "-m", "sh", "-c", f'set -e; {binds}; exec "$@"', "sh", *user]


@contextlib.contextmanager
def guest_of(base: Path, *options: str) -> Iterator[Guest]:
    daemon = Daemon(base / "share", options=options, before=as_user(base), owner=OWN)
    with daemon, guests_of(daemon) as start:
        guest = start()
        guest.init()
        yield guest


def owners(path: Path) -> tuple[int, int]:
    return os.lstat(path).st_uid, os.lstat(path).st_gid


def make_all(guest: Guest, name: bytes, uid: int, gid: int) -> list[tuple[int, int]]:
    entries = [
        guest.mkdir(ROOT, name + b"d", uid=uid, gid=gid),
        guest.mknod(ROOT, name + b"n", stat.S_IFREG | 0o600, uid=uid, gid=gid),
        guest.symlink(ROOT, name + b"l", b"t", uid=uid, gid=gid),
        guest.create(ROOT, name + b"f", uid=uid, gid=gid)[0],
    ]
    return [(entry.attr.uid, entry.attr.gid) for entry in entries]


@pytest.mark.parametrize(("options", "others"), [((), 65534), (("--sandbox", "none"), 0)])
def test_one_user_owns_all_it_makes(base: Path, options: Sequence[str], others: int) -> None:
    """In its user namespace there is no other user."""
    (base / "share/theirs").touch()
    with guest_of(base, *options) as guest:
        for uid, gid in ((0, 0), (OWN, OWN), (5555, 6666)):
            assert make_all(guest, str(uid).encode(), uid, gid) == [(OWN, OWN)] * 4
        assert guest.getattr(guest.walk("theirs")).uid == others
        mine = guest.walk("0f")
        guest.setattr(mine, Fattr.UID | Fattr.GID, uid=OWN, gid=OWN)
        for valid in (Fattr.UID, Fattr.GID):
            with refused(errno.EPERM, errno.EINVAL):
                guest.setattr(mine, valid, uid=0, gid=0)
        with refused(errno.EPERM):
            guest.setattr(guest.walk("theirs"), Fattr.MODE, mode=0o777)
        # Nobody but root keeps set-id bits of what it writes to.
        guest.setattr(mine, Fattr.MODE, mode=0o4755)
        guest.write(mine, guest.open(mine, os.O_WRONLY), 0, b"x", write_flags=4)
        assert stat.S_IMODE(os.stat(base / "share/0f").st_mode) == 0o755


@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="there is no newuidmap")
def test_a_user_namespace_makes_files_for_all_its_ids(base: Path) -> None:
    ids = [f"--uid-map=:0:{OWN}:1:", f"--gid-map=:0:{OWN}:1:", f"--uid-map=/1/{FIRST}/1000/",
           f"--gid-map=/1/{FIRST}/1000/"]  # fmt: skip
    (base / "share/theirs").touch()
    share = base / "share"
    with guest_of(base, *ids, "--xattr") as guest:
        for uid, gid, host in (
            (0, 0, (OWN, OWN)),
            (1, 1000, (FIRST, FIRST + 999)),
            (1000, 0, (FIRST + 999, OWN)),
            (0, 5, (OWN, FIRST + 4)),
        ):
            name = f"{uid}-{gid}".encode()
            os.chmod(share, 0o777)
            assert make_all(guest, name, uid, gid) == [(uid, gid)] * 4
            for kind in "dnlf":
                assert owners(share / f"{uid}-{gid}{kind}") == host
            nodeid = guest.mkdir(ROOT, name).nodeid
            attr = guest.setattr(nodeid, Fattr.UID | Fattr.GID, uid=uid, gid=gid)
            assert (attr.uid, attr.gid) == (uid, gid)
            assert owners(share / name.decode()) == host
        # Ids that the namespace has not.
        assert guest.getattr(guest.walk("theirs")).uid == 65534
        for uid, gid in ((1001, 0), (0, 1001), (OWN, OWN), (FIRST, FIRST)):
            with refused(errno.EOVERFLOW):
                guest.mkdir(ROOT, b"not", uid=uid, gid=gid)
            with refused(errno.EINVAL):
                guest.setattr(guest.walk("0-0"), Fattr.UID | Fattr.GID, uid=uid, gid=gid)
        with refused(errno.EPERM):
            guest.setattr(guest.walk("theirs"), Fattr.UID, uid=1)
        guest.setxattr(guest.walk("1-1000f"), b"user.x", b"y")
        assert os.getxattr(share / "1-1000f", "user.x") == b"y"
        assert not (share / "not").exists()


@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="there is no newuidmap")
def test_the_user_need_not_be_the_namespaces_root(base: Path) -> None:
    os.chmod(base / "share", 0o777)
    with guest_of(base, f"--uid-map=:0:{FIRST}:10:", f"--gid-map=:0:{FIRST}:10:") as guest:
        os.chmod(guest.path.parent, 0o777)  # or the socket would have to stay
        assert make_all(guest, b"x", 3, 4) == [(3, 4)] * 4
        assert owners(base / "share/xf") == (FIRST + 3, FIRST + 4)


def test_a_namespace_of_one_id_needs_no_privilege(base: Path) -> None:
    with guest_of(base, f"--uid-map=:0:{OWN}:1:", f"--gid-map=:0:{OWN}:1:") as guest:
        assert make_all(guest, b"x", 0, 0) == [(0, 0)] * 4
        assert owners(base / "share/xf") == (OWN, OWN)
        with refused(errno.EOVERFLOW):
            guest.mkdir(ROOT, b"not", uid=1)


def test_groups_are_not_asked_for_where_none_can_be_set(base: Path) -> None:
    """A namespace with one group denies setgroups(2)."""
    os.chmod(base / "share", 0o777)
    daemon = Daemon(base / "share", options=[f"--uid-map=:0:{OWN}:1:"], before=as_user(base), owner=OWN)
    with daemon, guests_of(daemon) as start:
        guest, other = start(), start()
        for each in (guest, other):
            assert not each.init().flags & Init.CREATE_SUPP_GROUP
        for uid, gid in ((1, 1), (0, 7), (1, OWN)):
            with refused(errno.EINVAL):  # not agreed
                guest.mkdir(ROOT, b"not", uid=uid, gid=gid, ext=groups_ext(7))
            with refused(errno.EOVERFLOW):
                guest.mkdir(ROOT, b"not", uid=uid, gid=gid)
        guest.mkdir(ROOT, b"d", uid=0, gid=OWN)
        assert owners(base / "share/d") == (OWN, OWN)
        other.statfs()


@pytest.mark.parametrize("names", [["setgid"], ["setuid"], ["setuid", "setgid"]], ids="+".join)
def test_root_without_the_right_to_be_others_is_told(base: Path, names: list[str]) -> None:
    less = ",".join(f"-{name}" for name in names)
    said = refusal(["setpriv", "--bounding-set", less, "--inh-caps", less, "--"], base)
    assert said.startswith("vfsd: capabilities: root without ") and said.count("\n") == 1
    assert all(f"CAP_{name.upper()}" in said for name in names)


def refusal(before: list[str], base: Path, *options: str) -> str:
    done = subprocess.run(
        [*before, sys.executable, "-m", "vfsd", "serve", "--socket", base / "run/v",
         "--shared-dir", base / "share", *options],
        capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert not (base / "run/v").exists()
    return done.stderr


def test_maps_that_cannot_be(base: Path) -> None:
    user = as_user(base)
    assert "is for a daemon that is not root" in refusal([], base, "--uid-map", ":0:1:1:")
    if shutil.which("newuidmap"):
        said = refusal(user, base, "--uid-map", f":0:{FIRST}:{COUNT + 1}:")
        assert "/etc/subuid" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", 1), ("0:1:2:", 1), (":0:1:2", 7), (":0:1:", 6), (":0:x:1:", 4), (":0:1:2:3:", 8),
        (":0:1:0:", 2), (":0:4294967295:1:", 4), (":0:4294967290:9:", 2), (":-1:1:1:", 2),
    ],
)  # fmt: skip
def test_a_mistake_in_a_map_is_named_by_its_place(text: str, at: int) -> None:
    with pytest.raises(ConfigError) as info:
        parse_ranges("--uid-map", [":0:1:1:", text])
    assert str(info.value).startswith(f"--uid-map: rule 2, character {at}: "), info.value
