"""The security label of a new file is there before its name is, on each kind of file system."""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import LINUX_FLAGS, refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import QEMU_VIRTIOFSD, Daemon
from guests.filesystems import CannotMount, file_system

from .test_by_name import mounted
from .test_identity import DEFAULT_ACL, GROUP, MAKERS, USER, context_ext

SELINUX = "security.selinux"
LABEL = b"system_u:object_r:virt_content_t:s0\0"
FILES = 40
IN_ATTRIB, IN_MOVED, IN_CREATE = 4, 0xC0, 0x100

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting, and labels, need root")

# Reads what is in a directory, over and over, until its standard input ends: names it saw without a label.
WATCHER = """
import os, select, sys
directory, label = sys.argv[1:]
seen, bare = set(), set()
print("READY", flush=True)
ended = False
while not ended:  # once more after the end: it may have had no turn before
    ended = bool(select.select([0], [], [], 0)[0])
    for name in set(os.listdir(directory)) - seen:
        try:
            os.getxattr(f"{directory}/{name}", label, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError:
            bare.add(name)
        seen.add(name)
print(len(seen), *sorted(bare))
"""


@contextlib.contextmanager
def seen_unlabelled(directory: Path, attribute: str) -> Iterator[list[str]]:
    """Afterwards, what another process saw there without its label."""
    found: list[str] = []
    words = [sys.executable, "-c", WATCHER, directory, attribute]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None and watcher.stdin is not None
        assert watcher.stdout.readline() == "READY\n"
        yield found
        watcher.stdin.close()
        count, *bare = watcher.stdout.read().split()
    assert int(count), "it saw nothing at all"
    found += bare


class Events:
    """What inotify(7) tells of a directory's entries."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        added = libc.inotify_add_watch(self.fd, os.fsencode(directory), IN_ATTRIB | IN_MOVED | IN_CREATE)
        assert self.fd >= 0 and added >= 0, os.strerror(ctypes.get_errno())

    def take(self) -> list[tuple[int, bytes]]:
        """Mask and name of each. Once."""
        data, found = os.read(self.fd, 1 << 16), []
        while data:
            _, mask, _, n = struct.unpack_from("iIII", data)
            found.append((mask, data[16 : 16 + n].rstrip(b"\0")))
            data = data[16 + n :]
        os.close(self.fd)
        # Files without a name are told of, too, by their number.
        return [event for event in found if not event[1].startswith(b"#")]


@pytest.fixture(scope="module", params=["tmpfs", "ext4", "xfs", "overlay"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    try:
        with file_system(request.param, tmp_path_factory.mktemp("labels")) as place:
            yield place
    except CannotMount as problem:
        pytest.skip(str(problem))


@contextlib.contextmanager
def guest_on(share: Path, *options: str) -> Iterator[Guest]:
    share.mkdir(exist_ok=True)
    share.chmod(0o777)
    words = ("--posix-acl", "--security-label", *options)
    with Daemon(share, options=words) as daemon, guests_of(daemon) as start:
        guest = start()
        guest.init(flags=LINUX_FLAGS)
        yield guest


@pytest.fixture(scope="module")
def guest(place: Path) -> Iterator[Guest]:
    with guest_on(place / "share") as guest:
        yield guest


def labelled(guest: Guest, op: str, parent: int, name: str, **more: int) -> int:
    """Make it: its nodeid."""
    make = MAKERS[op](guest)
    return make(parent, name.encode(), ext=context_ext((SELINUX.encode(), LABEL)), **more).nodeid


def test_nobody_sees_a_file_without_its_label(guest: Guest, place: Path) -> None:
    directory = place / "share" / "watched"
    parent = guest.mkdir(ROOT, b"watched").nodeid
    events = Events(directory)
    with seen_unlabelled(directory, SELINUX) as bare:
        for i in range(FILES):
            labelled(guest, "CREATE" if i % 2 else "MKNOD", parent, f"f{i}", uid=USER, gid=GROUP)
    assert bare == []
    # A label that came later would be a change of attributes.
    assert events.take() == [(IN_CREATE, b"f%d" % i) for i in range(FILES)]
    assert {os.getxattr(path, SELINUX) for path in directory.iterdir()} == {LABEL}


def test_a_file_is_what_it_would_be_without_a_label(guest: Guest, place: Path) -> None:
    share = place / "share"
    for name, mode in (("plain", 0o777), ("acl", 0o777), ("team", 0o2777), ("sticky", 0o1777)):
        (share / name).mkdir()
        os.chown(share / name, 0, GROUP + 1)
        os.chmod(share / name, mode)
    os.setxattr(share / "acl", "system.posix_acl_default", DEFAULT_ACL)
    for directory in ("plain", "acl", "team", "sticky"):
        parent = guest.walk(directory)
        for op in ("CREATE", "MKNOD"):
            for mode in (0o666, 0o2775, 0o4711, 0):
                for umask in (0o022, 0):
                    for who in ({}, {"uid": USER, "gid": GROUP}):
                        kind = stat.S_IFREG if op == "MKNOD" else 0
                        found = []
                        for label in (True, False):
                            name = f"{op}{mode}{umask}{len(who)}{label}"
                            make = MAKERS[op](guest) if op == "CREATE" else guest.mknod
                            ext = context_ext((SELINUX.encode(), LABEL)) if label else b""
                            more = {"mode": mode | kind, "umask": umask, **who}
                            attr = make(parent, name.encode(), ext=ext, **more).attr
                            path = share / directory / name
                            acls = {x: os.getxattr(path, x) for x in os.listxattr(path) if x != SELINUX}
                            st = os.stat(path)
                            found.append(
                                (attr.mode, attr.uid, attr.gid, st.st_mode, st.st_nlink, st.st_size, acls)
                            )
                            assert (SELINUX in os.listxattr(path)) == label
                        assert found[0] == found[1], (directory, op, oct(mode), oct(umask), who)


def test_it_is_open_as_the_guest_asked(guest: Guest, place: Path) -> None:
    ext = context_ext((SELINUX.encode(), LABEL))
    for i, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)):
        entry, fh = guest.create(ROOT, f"open{i}".encode(), flags, mode=0o755, ext=ext, uid=USER, gid=GROUP)
        if flags == os.O_RDONLY:
            with refused(errno.EBADF):
                guest.write(entry.nodeid, fh, 0, b"data")
        else:
            assert guest.write(entry.nodeid, fh, 0, b"data") == 4
        if flags == os.O_WRONLY:
            with refused(errno.EBADF):
                guest.read(entry.nodeid, fh, 0, 4)
        else:
            assert guest.read(entry.nodeid, fh, 0, 4) == (b"data" if flags else b"")
        guest.release(entry.nodeid, fh)


def test_a_name_that_the_host_has_made_meanwhile(guest: Guest, place: Path) -> None:
    ext = context_ext((SELINUX.encode(), LABEL))
    theirs = place / "share" / "theirs"
    theirs.write_bytes(b"theirs")
    with refused(errno.EEXIST):
        guest.create(ROOT, b"theirs", os.O_RDWR | os.O_EXCL, ext=ext)
    with refused(errno.EEXIST):
        guest.mknod(ROOT, b"theirs", stat.S_IFREG | 0o644, ext=ext)
    entry, fh = guest.create(ROOT, b"theirs", os.O_RDWR, ext=ext)
    assert guest.read(entry.nodeid, fh, 0, 10) == b"theirs"
    guest.release(entry.nodeid, fh)
    assert SELINUX not in os.listxattr(theirs)


def test_what_cannot_be_labelled_is_not_there(guest: Guest, place: Path) -> None:
    (place / "share" / "empty").mkdir()
    parent = guest.walk("empty")
    for name, error in ((b"nonsense", errno.EOPNOTSUPP), (b"security.capability", errno.EPERM)):
        for op, make in MAKERS.items():
            with refused(error):
                make(guest)(parent, op.encode(), ext=context_ext((name, b"no capability")))
    assert os.listdir(place / "share/empty") == []


@pytest.mark.parametrize("prefix", ["trusted.vfsd.", "user.vfsd."])
def test_a_label_kept_under_another_name(place: Path, prefix: str) -> None:
    share = place / f"share-{prefix}"
    rules = f":map:security.selinux:{prefix}:"
    with guest_on(share, f"--xattrmap={rules}", "--modcaps=+sys_admin") as guest:
        events = Events(share)
        for op in MAKERS:
            if op == "SYMLINK" and prefix == "user.vfsd.":
                with refused(errno.EPERM):  # xattr(7): only files and directories have user attributes
                    labelled(guest, op, ROOT, op)
                continue
            nodeid = labelled(guest, op, ROOT, op)
            assert guest.getxattr(nodeid, SELINUX.encode()) == LABEL
            assert os.getxattr(share / op, prefix + SELINUX, follow_symlinks=False) == LABEL
            assert SELINUX not in os.listxattr(share / op, follow_symlinks=False)
        changed = [name for mask, name in events.take() if mask & IN_ATTRIB]
        assert set(changed) <= {b"MKDIR", b"SYMLINK"}


@pytest.mark.skipif(not os.path.exists(QEMU_VIRTIOFSD), reason=f"there is no {QEMU_VIRTIOFSD}")
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
def test_where_every_file_has_a_name_from_the_start(tmp_path: Path) -> None:
    """The share is what another mount shows of the C virtiofsd, which knows no O_TMPFILE."""
    (tmp_path / "origin").mkdir()
    origin = Daemon(
        tmp_path / "origin", command="qemu-virtiofsd", before=["sh", "-c", 'exec "$@" -o xattr', "sh"]
    )
    with origin, mounted(origin, tmp_path / "mnt") as share:
        with pytest.raises(OSError) as info:
            os.open(share, os.O_TMPFILE | os.O_RDWR)
        assert info.value.errno == errno.EOPNOTSUPP
        with guest_on(share) as guest:
            for op, make in MAKERS.items():
                labelled(guest, op, ROOT, op)
                assert os.getxattr(share / op, SELINUX, follow_symlinks=False) == LABEL
                with refused(errno.EOPNOTSUPP):
                    make(guest)(ROOT, b"not", ext=context_ext((b"nonsense", LABEL)))
            assert sorted(os.listdir(share)) == sorted(MAKERS)
