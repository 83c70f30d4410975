"""Whose a new file is, which rights go with a change, and ids that are translated: by raw requests."""

import contextlib
import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import LINUX_FLAGS, refused
from fuse.rawguest import Guest
from fuse.wire import GETATTR_IN, ROOT, Entry
from guests import StartDaemon

from vfsd.fuse import abi
from vfsd.fuse.abi import Fattr, Init

USER, GROUP, EXTRA = 1234, 2345, 3456
NO_ID = 0xFFFFFFFF
WRITE_KILL, OPEN_KILL, ACL_KILL_SGID = 4, 1, 1
# Version 2, the effective bit, CAP_NET_RAW (linux/capability.h).
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")

Make = Callable[..., Entry]
MAKERS: dict[str, Callable[[Guest], Make]] = {
    "MKDIR": lambda guest: guest.mkdir,
    "MKNOD": lambda guest: (
        lambda parent, name, **more: guest.mknod(parent, name, stat.S_IFREG | 0o666, **more)
    ),
    "SYMLINK": lambda guest: lambda parent, name, **more: guest.symlink(parent, name, b"t", **more),
    "CREATE": lambda guest: lambda parent, name, **more: guest.create(parent, name, **more)[0],
}


def groups_ext(*groups: int) -> bytes:
    """fuse_ext_header and fuse_supp_groups"""
    body = struct.pack(f"=I{len(groups)}I", len(groups), *groups)
    body += bytes(-len(body) % 8)
    return struct.pack("=II", 8 + len(body), 32) + body


def context_ext(*contexts: tuple[bytes, bytes]) -> bytes:
    """fuse_secctx_header and a fuse_secctx for each"""
    body = b""
    for name, value in contexts:
        body += struct.pack("=II", len(value), 0) + name + b"\0" + value
        body += bytes(-len(body) % 8)
    return struct.pack("=II", 8 + len(body), len(contexts)) + body


def acl(*entries: tuple[int, int, int]) -> bytes:
    """linux/posix_acl_xattr.h: (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, ACL_USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 16, 32
DEFAULT_ACL = acl(
    (USER_OBJ, 7, NO_ID), (ACL_USER, 6, 777), (GROUP_OBJ, 5, NO_ID), (MASK, 7, NO_ID), (OTHER, 5, NO_ID)
)


@pytest.fixture
def guest_with(daemon: StartDaemon, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Starts a daemon with these options on the directory `share`, and a guest that has said INIT."""
    share = tmp_path / "share"
    share.mkdir()
    share.chmod(0o777)
    with contextlib.ExitStack() as stack:

        def start(*options: str, flags: int = LINUX_FLAGS) -> Guest:
            guest = stack.enter_context(guests_of(daemon(share, options=options)))()
            guest.init(flags=flags)
            return guest

        yield start


def owner(path: Path) -> tuple[int, int, str]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, oct(stat.S_IMODE(st.st_mode))


# ---- who makes a file


@pytest.mark.parametrize("op", MAKERS)
def test_the_group_that_linux_sends_lets_its_members_in(guest: Guest, share: Path, op: str) -> None:
    make = MAKERS[op](guest)
    (share / "team").mkdir()
    os.chown(share / "team", 0, EXTRA)
    os.chmod(share / "team", 0o770)
    team = guest.walk("team")
    with refused(errno.EACCES):
        make(team, b"x", uid=USER, gid=GROUP)
    with refused(errno.EACCES):
        make(team, b"x", uid=USER, gid=GROUP, ext=groups_ext(EXTRA + 1))
    entry = make(team, b"x", uid=USER, gid=GROUP, ext=groups_ext(EXTRA))
    assert (entry.attr.uid, entry.attr.gid) == (USER, GROUP)
    # The thread has left the group.
    with refused(errno.EACCES):
        make(team, b"y", uid=USER, gid=GROUP)


def test_a_directory_with_setgid_gives_its_group_and_its_bit(guest: Guest, share: Path) -> None:
    (share / "set").mkdir()
    os.chown(share / "set", 0, EXTRA)
    os.chmod(share / "set", 0o2777)
    parent = guest.walk("set")
    who = {"uid": USER, "gid": GROUP}
    for op, make in MAKERS.items():
        make(guest)(parent, op.encode(), **who)
        assert owner(share / "set" / op)[:2] == (USER, EXTRA)
    assert owner(share / "set" / "MKDIR")[2] == "0o2755"
    # Who is no member can't make a set-group-id program of that group (CVE-2022-0358), a member can.
    guest.create(parent, b"stranger", mode=0o2755, **who)
    guest.create(parent, b"member", mode=0o2755, **who, ext=groups_ext(EXTRA))
    guest.create(parent, b"root", mode=0o2755, gid=GROUP)
    assert owner(share / "set" / "stranger") == (USER, EXTRA, "0o755")
    assert owner(share / "set" / "member") == (USER, EXTRA, "0o2755")
    assert owner(share / "set" / "root") == (0, EXTRA, "0o2755")


def test_without_the_extension_a_guests_own_check_is_believed(
    guest_with: Callable[..., Guest], tmp_path: Path
) -> None:
    guest = guest_with(flags=LINUX_FLAGS & ~Init.CREATE_SUPP_GROUP)
    (tmp_path / "share/team").mkdir(mode=0o750)
    team = guest.walk("team")
    for op, make in MAKERS.items():
        entry = make(guest)(team, op.encode(), uid=USER, gid=GROUP)
        assert (entry.attr.uid, entry.attr.gid) == (USER, GROUP)


@pytest.mark.parametrize(
    "ext",
    [
        bytes(8),
        struct.pack("=II", 4, 32),
        struct.pack("=II", 0, 32),
        struct.pack("=II", 16, 32),
        struct.pack("=II", 2**32 - 1, 32),
        struct.pack("=IIII", 16, 32, 2, 5),
        struct.pack("=IIII", 16, 32, 2**31, 5),
        struct.pack("=IIII", 16, 32, 1, NO_ID),
        struct.pack("=II", 8, 33),
        struct.pack("=II", 8, 2**32 - 1),
        context_ext((b"security.selinux", b"not agreed")),
        bytes(8 * 1000),
    ],
    ids=lambda ext: ext[:24].hex(),
)
def test_extensions_that_lie_make_nothing(guest: Guest, share: Path, ext: bytes) -> None:
    for op, make in MAKERS.items():
        with refused(errno.EINVAL):
            make(guest)(ROOT, op.encode(), ext=ext)
    assert os.listdir(share) == []
    guest.mkdir(ROOT, b"fine", ext=struct.pack("=II", 8, 0))


def test_an_extension_length_that_lies_makes_nothing(guest: Guest, share: Path) -> None:
    for extlen in (1, 3, 0xFFFF):
        reply = guest.queue.ask("MKDIR", ROOT, abi.MKDIR_IN.pack(0o700, 0) + b"x\0", extlen=extlen)
        assert reply.error == errno.EINVAL
    reply = guest.queue.ask(
        "MKDIR", ROOT, abi.MKDIR_IN.pack(0o700, 0) + b"x\0", ext=groups_ext(EXTRA), extlen=1
    )
    assert reply.error == errno.EINVAL
    assert os.listdir(share) == []


def test_no_id_is_nobodys_file(guest: Guest, share: Path) -> None:
    os.chmod(share, 0o777)
    for ids in ({"uid": NO_ID, "gid": NO_ID}, {"uid": NO_ID}, {"gid": NO_ID}):
        for op, make in MAKERS.items():
            with refused(errno.EOVERFLOW):
                make(guest)(ROOT, op.encode(), **ids)
    assert os.listdir(share) == []
    # What does not create is not asked who it is (FUSE_ALLOW_IDMAP).
    (share / "f").write_text("x")
    nodeid = guest.walk("f")
    guest.body("SETATTR", nodeid, abi.SETATTR_IN.pack(Fattr.MODE, *[0] * 10, 0o600, 0, 0, 0, 0), uid=NO_ID)
    with refused(errno.EINVAL):
        guest.setattr(nodeid, Fattr.UID, uid=NO_ID)
    with refused(errno.EINVAL):
        guest.setattr(nodeid, Fattr.UID | Fattr.GID, uid=1, gid=NO_ID)
    assert owner(share / "f") == (0, 0, "0o600")


# ---- set-id bits and file capabilities


def setuid_file(share: Path, mode: int = 0o6755) -> Path:
    path = share / "program"
    path.write_bytes(b"content")
    os.chown(path, USER, GROUP)
    os.chmod(path, mode)
    os.setxattr(path, "security.capability", CAPABILITY)
    return path


Change = Callable[[Guest, int, bool], object]
CHANGES: dict[str, Change] = {
    "write": lambda guest, nodeid, kill: guest.write(
        nodeid, guest.open(nodeid, os.O_WRONLY), 0, b"x", write_flags=WRITE_KILL if kill else 0
    ),
    "append": lambda guest, nodeid, kill: guest.write(
        nodeid, guest.open(nodeid, os.O_WRONLY), 0, b"x", flags=os.O_APPEND,
        write_flags=WRITE_KILL if kill else 0,
    ),
    "synchronous": lambda guest, nodeid, kill: guest.write(
        nodeid, guest.open(nodeid, os.O_WRONLY), 0, b"x", flags=os.O_DSYNC,
        write_flags=WRITE_KILL if kill else 0,
    ),
    "truncate": lambda guest, nodeid, kill: guest.setattr(
        nodeid, Fattr.SIZE | (Fattr.KILL_SUIDGID if kill else 0), size=1
    ),
    "ftruncate": lambda guest, nodeid, kill: guest.setattr(
        nodeid, Fattr.SIZE | Fattr.FH | (Fattr.KILL_SUIDGID if kill else 0), size=1,
        fh=guest.open(nodeid, os.O_RDWR),
    ),
    "open": lambda guest, nodeid, kill: guest.open(
        nodeid, os.O_WRONLY | os.O_TRUNC, OPEN_KILL if kill else 0
    ),
    "create": lambda guest, nodeid, kill: guest.create(
        ROOT, b"program", os.O_WRONLY | os.O_TRUNC, open_flags=OPEN_KILL if kill else 0
    ),
    "fallocate": lambda guest, nodeid, kill: guest.fallocate(
        nodeid, guest.open(nodeid, os.O_WRONLY), 0, 4096, uid=USER if kill else 0
    ),
    "fallocate of nobody": lambda guest, nodeid, kill: (
        kill and guest.setattr(nodeid, Fattr(0)),
        guest.fallocate(nodeid, guest.open(nodeid, os.O_WRONLY), 0, 4096, uid=NO_ID),
    ),
    "copy of nobody": lambda guest, nodeid, kill: (
        kill and guest.setattr(nodeid, Fattr(0)),
        guest.copy_file_range(
            nodeid, guest.open(nodeid, os.O_RDONLY), 0, nodeid, guest.open(nodeid, os.O_WRONLY), 4096, 4,
            uid=NO_ID,
        ),
    ),
    "copy": lambda guest, nodeid, kill: guest.copy_file_range(
        nodeid, guest.open(nodeid, os.O_RDONLY), 0, nodeid, guest.open(nodeid, os.O_WRONLY), 4096, 4,
        uid=USER if kill else 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_set_id_bits_go_when_the_guest_says_so(guest: Guest, share: Path, change: str) -> None:
    for kill, mode, left in (
        (True, 0o6755, "0o755"),
        (False, 0o6755, "0o6755"),
        (True, 0o755, "0o755"),
        (False, 0o4711, "0o4711"),
    ):
        path = setuid_file(share, mode)
        CHANGES[change](guest, guest.walk("program"), kill)
        assert owner(path) == (USER, GROUP, left)
        assert "security.capability" not in os.listxattr(path)


@pytest.mark.parametrize("change", CHANGES)
def test_set_group_id_goes_where_the_group_may_execute(guest: Guest, share: Path, change: str) -> None:
    """fuse.h's rule; the host's own would ask whether the daemon is in the file's group."""
    for mode, left in (
        (0o2664, "0o2664"),
        (0o2745, "0o2745"),
        (0o6764, "0o2764"),
        (0o2770, "0o770"),
        (0o6710, "0o710"),
        (0o4664, "0o664"),
    ):
        path = setuid_file(share, mode)
        CHANGES[change](guest, guest.walk("program"), True)
        assert owner(path) == (USER, GROUP, left), oct(mode)


def test_an_owners_change_takes_what_it_takes_on_the_host(guest: Guest, share: Path) -> None:
    """Of an owner in the file's group, as the guest's own kernel has no other word for it."""
    script = "import sys; file = open(sys.argv[1], 'r+b', 0); eval(sys.argv[2])"
    user = ["setpriv", "--reuid", str(USER), "--regid", str(GROUP), "--clear-groups", "--"]
    share.chmod(0o777)
    share.parent.chmod(0o755)
    for mode in (0o2664, 0o2775, 0o6764, 0o6775, 0o4755, 0o2700):
        for change, call in (("write", "file.write(b'x')"), ("truncate", "file.truncate(1)")):
            path = setuid_file(share, mode)
            with path.open("r+b") as file:
                words = [*user, "/usr/bin/python3", "-c", script, f"/proc/self/fd/{file.fileno()}", call]
                subprocess.run(words, check=True, pass_fds=[file.fileno()])
            on_host = owner(path)
            setuid_file(share, mode)
            CHANGES[change](guest, guest.walk("program"), True)
            assert owner(path) == on_host, (oct(mode), change)


def test_attributes_with_set_id_bits_are_not_kept(
    guest_with: Callable[..., Guest], tmp_path: Path, daemon: StartDaemon
) -> None:
    """The guest is not told when they go with a write of its."""
    share = tmp_path / "share"
    guest = guest_with("--attr-timeout", "100")
    for mode, kept in ((0o755, True), (0o4755, False), (0o2755, False), (0o2664, False)):
        path = setuid_file(share, mode)
        nodeid = guest.lookup(ROOT, b"program").nodeid
        listed = [dirent.entry for dirent in guest.listing(ROOT, plus=True)]
        found = {
            "LOOKUP": guest.lookup(ROOT, b"program").attr_ns,
            "READDIRPLUS": listed[0].attr_ns if listed[0] else None,
            "GETATTR": attr_s(guest.body("GETATTR", nodeid, GETATTR_IN.pack(0, 0, 0))),
            "SETATTR": attr_s(guest.body("SETATTR", nodeid, abi.SETATTR_IN.pack(*[0] * 16))),
            "STATX": guest.statx(nodeid).attr_s,
            "LINK": guest.link(nodeid, ROOT, b"link").attr_ns,
            "CREATE": guest.create(ROOT, b"new", mode=mode)[0].attr_ns,
            "MKNOD": guest.mknod(ROOT, b"node", stat.S_IFREG | mode).attr_ns,
            "TMPFILE": guest.tmpfile(ROOT, mode=mode)[0].attr_ns,
        }
        assert {op: bool(time) for op, time in found.items()} == dict.fromkeys(found, kept), oct(mode)
        for name in ("program", "link", "new", "node"):
            (share / name).unlink()
        assert not path.exists()
    (share / "dir").mkdir()
    os.chmod(share / "dir", 0o2755)
    assert guest.lookup(ROOT, b"dir").attr_ns


def attr_s(body: bytes) -> int:
    return int.from_bytes(body[:8], "little")


def test_set_id_bits_stay_without_the_agreement(guest_with: Callable[..., Guest], tmp_path: Path) -> None:
    guest = guest_with("--no-killpriv-v2")
    share = tmp_path / "share"
    for change in CHANGES.values():
        path = setuid_file(share)
        change(guest, guest.walk("program"), True)
        assert owner(path)[2] == "0o6755"


def test_setting_nothing_takes_nothing_away(guest: Guest, share: Path) -> None:
    """Linux sends it for a chown(-1, -1) of anybody's, too."""
    path = setuid_file(share)
    assert stat.S_IMODE(guest.setattr(guest.walk("program"), Fattr(0)).mode) == 0o6755
    assert owner(path)[2] == "0o6755" and "security.capability" in os.listxattr(path)


def test_a_new_owner_takes_set_id_bits_and_capabilities(guest: Guest, share: Path) -> None:
    for valid in (Fattr.UID, Fattr.GID, Fattr.UID | Fattr.GID):
        for kill in (0, Fattr.KILL_SUIDGID):
            path = setuid_file(share)
            attr = guest.setattr(guest.walk("program"), valid | kill, uid=0, gid=0)
            assert stat.S_IMODE(attr.mode) == 0o755
            assert "security.capability" not in os.listxattr(path)
    (share / "dir").mkdir()
    os.chmod(share / "dir", 0o6755)
    guest.setattr(guest.walk("dir"), Fattr.UID, uid=USER)
    assert owner(share / "dir") == (USER, 0, "0o6755")


def test_chmod_may_set_them_for_any_group(guest: Guest, share: Path) -> None:
    path = setuid_file(share, 0o755)
    nodeid = guest.walk("program")
    # After a write that needed to be without the right.
    guest.write(nodeid, guest.open(nodeid, os.O_WRONLY), 0, b"x", write_flags=WRITE_KILL)
    guest.setattr(nodeid, Fattr.MODE, mode=0o6755)
    assert owner(path)[2] == "0o6755"


# ---- ACLs


@pytest.fixture
def acl_guest(guest_with: Callable[..., Guest]) -> Guest:
    return guest_with("--posix-acl", "--security-label=auto", "--modcaps=+sys_admin")


def test_umask_and_default_acls(acl_guest: Guest, tmp_path: Path) -> None:
    guest, share = acl_guest, tmp_path / "share"
    for name in ("plain", "default"):
        (share / name).mkdir()
        os.chmod(share / name, 0o777)
    default = guest.walk("default")
    guest.setxattr(default, b"system.posix_acl_default", DEFAULT_ACL, setxattr_flags=0)
    assert os.getxattr(share / "default", "system.posix_acl_default") == DEFAULT_ACL
    assert b"system.posix_acl_default\0" in guest.listxattr(default)
    for who in ({}, {"uid": USER, "gid": GROUP}):
        for i, umask in enumerate((0o022, 0o077, 0, 0o022)):
            name = f"{len(who)}{i}".encode()
            for parent, modes in (
                ("plain", {"MKDIR": 0o777 & ~umask, "MKNOD": 0o666 & ~umask, "CREATE": 0o666 & ~umask}),
                ("default", {"MKDIR": 0o775, "MKNOD": 0o664, "CREATE": 0o664}),
            ):
                nodeid = guest.walk(parent)
                for op, mode in modes.items():
                    more = {"mode": 0o777 if op == "MKDIR" else 0o666, "umask": umask, **who}
                    if op == "MKNOD":
                        entry = guest.mknod(nodeid, b"N" + name, stat.S_IFREG | more.pop("mode"), **more)
                    elif op == "MKDIR":
                        entry = guest.mkdir(nodeid, b"D" + name, **more)
                    else:
                        entry, _ = guest.create(nodeid, b"C" + name, **more)
                    assert oct(stat.S_IMODE(entry.attr.mode)) == oct(mode), (parent, op, oct(umask))
    # The daemon's other files are not made by the last umask.
    guest.symlink(ROOT, b"link", b"target")
    assert os.stat(share / "default/D00").st_mode & 0o777 == 0o775
    assert os.getxattr(share / "default/D00", "system.posix_acl_default") == DEFAULT_ACL


def test_an_acl_takes_setgid_from_who_is_not_in_the_group(acl_guest: Guest, tmp_path: Path) -> None:
    guest, share = acl_guest, tmp_path / "share"
    access = acl((USER_OBJ, 7, NO_ID), (GROUP_OBJ, 5, NO_ID), (OTHER, 5, NO_ID))
    # The daemon is in group 0.
    for group in (0, GROUP):
        for flags, left in ((ACL_KILL_SGID, "0o755"), (0, "0o2755")):
            (share / "f").write_text("x")
            os.chown(share / "f", USER, group)
            os.chmod(share / "f", 0o2755)
            guest.setxattr(guest.walk("f"), b"system.posix_acl_access", access, setxattr_flags=flags)
            assert owner(share / "f") == (USER, group, left)


def test_an_acls_groups_are_the_guests_to_know(acl_guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "share/closed").mkdir(mode=0o700)
    entry = acl_guest.mkdir(acl_guest.walk("closed"), b"d", uid=USER, gid=GROUP)
    assert (entry.attr.uid, entry.attr.gid) == (USER, GROUP)


@pytest.mark.parametrize("op", MAKERS)
def test_the_security_label_comes_with_the_file(acl_guest: Guest, tmp_path: Path, op: str) -> None:
    guest, share = acl_guest, tmp_path / "share"
    ext = context_ext((b"security.vfsd", b"label")) + groups_ext(EXTRA)
    entry = MAKERS[op](guest)(ROOT, b"labelled", uid=USER, gid=GROUP, ext=ext)
    assert os.getxattr(share / "labelled", "security.vfsd", follow_symlinks=False) == b"label"
    assert (entry.attr.uid, entry.attr.gid) == (USER, GROUP)
    for contexts, error in (
        ([(b"nonsense", b"label")], errno.EOPNOTSUPP),
        ([(b"security." + b"n" * 250, b"label")], errno.EINVAL),
        ([(b"", b"label")], errno.EINVAL),
        ([(b"security.a", b"1"), (b"security.b", b"2")], errno.EINVAL),
    ):
        with refused(error):
            MAKERS[op](guest)(ROOT, b"not", ext=context_ext(*contexts))
    if op == "CREATE":
        # A file that gets its name later.
        entry, fh = guest.tmpfile(ROOT, mode=0o666, umask=0o027, uid=USER, gid=GROUP, ext=ext)
        assert (entry.attr.uid, entry.attr.gid, entry.attr.mode & 0o777) == (USER, GROUP, 0o640)
        assert guest.getxattr(entry.nodeid, b"security.vfsd") == b"label"
        guest.release(entry.nodeid, fh)
        with refused(errno.EOPNOTSUPP):
            guest.tmpfile(ROOT, ext=context_ext((b"nonsense", b"label")))
    # The value is said to be longer than the extension.
    lie = struct.pack("=IIII", 32, 1, 100, 0) + b"security.vfsd\0\0\0"
    with refused(errno.EINVAL):
        MAKERS[op](guest)(ROOT, b"not", ext=lie)
    assert os.listdir(share) == ["labelled"]


def test_a_guest_without_acls_is_refused_or_served_without(
    guest_with: Callable[..., Guest], tmp_path: Path
) -> None:
    flags = LINUX_FLAGS & ~Init.POSIX_ACL
    with refused(errno.EPROTO):
        guest_with("--posix-acl=always", flags=flags)
    guest = guest_with("--posix-acl=auto", flags=flags)
    (tmp_path / "share/f").touch()
    nodeid = guest.walk("f")
    os.setxattr(tmp_path / "share/f", "system.posix_acl_access", DEFAULT_ACL)
    with refused(errno.EOPNOTSUPP):
        guest.getxattr(nodeid, b"system.posix_acl_access")
    assert guest.listxattr(nodeid) == b""


# ---- translation


def test_ids_are_translated_both_ways(guest_with: Callable[..., Guest], tmp_path: Path) -> None:
    share = tmp_path / "share"
    guest = guest_with(
        "--translate-uid", "map:1000:2000:10", "--translate-uid", "squash-guest:5000:77:100",
        "--translate-uid", "forbid-guest:6000:1", "--translate-uid", "host:3000:9000:1",
        "--translate-gid", "guest/1000/4000/10", "--translate-gid", "squash-host:4000:1:1000",
    )  # fmt: skip
    for uid, gid, host, shown in (
        (1000, 1000, (2000, 4000), (1000, 1)),
        (1009, 1009, (2009, 4009), (1009, 1)),
        (1010, 1010, (1010, 1010), (1010, 1010)),
        (999, 999, (999, 999), (999, 999)),
        (5050, 7, (77, 7), (77, 7)),
        (0, 0, (0, 0), (0, 0)),
    ):
        name = f"{uid}-{gid}".encode()
        for op, make in MAKERS.items():
            entry = make(guest)(ROOT, name + op.encode(), uid=uid, gid=gid)
            assert owner(share / (name + op.encode()).decode())[:2] == host
            assert (entry.attr.uid, entry.attr.gid) == shown
        nodeid = guest.mkdir(ROOT, name).nodeid
        attr = guest.setattr(nodeid, Fattr.UID | Fattr.GID, uid=uid, gid=gid)
        assert owner(share / name.decode())[:2] == host
        assert (attr.uid, attr.gid) == shown
        assert (guest.getattr(nodeid).uid, guest.getattr(nodeid).gid) == shown
    os.chown(share, 3000, 4999)
    assert (guest.getattr(ROOT).uid, guest.getattr(ROOT).gid) == (9000, 1)
    listed = {entry.name: entry.entry for entry in guest.listing(ROOT, plus=True)}
    made = listed[b"1000-1000"]
    assert made is not None and (made.attr.uid, made.attr.gid) == (1000, 1)
    with refused(errno.EPERM):
        guest.mkdir(ROOT, b"forbidden", uid=6000)
    with refused(errno.EPERM):
        guest.setattr(ROOT, Fattr.UID, uid=6000)
    assert not (share / "forbidden").exists()


def test_the_supplementary_group_is_translated_too(guest_with: Callable[..., Guest], tmp_path: Path) -> None:
    guest = guest_with("--translate-gid", f"map:{EXTRA}:{EXTRA + 1000}:1")
    team = tmp_path / "share/team"
    team.mkdir()
    os.chown(team, 0, EXTRA + 1000)
    os.chmod(team, 0o770)
    nodeid = guest.walk("team")
    assert guest.getattr(nodeid).gid == EXTRA
    guest.mkdir(nodeid, b"d", uid=USER, gid=GROUP, ext=groups_ext(EXTRA))
