"""Shares where file handles don't work: evicted inodes come back by directory and name."""

import contextlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from errno import ENFILE, ENOENT, ESTALE
from pathlib import Path

import pytest
from fuse.fixtures import guests_of
from fuse.ops import refused
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, StartDaemon
from guests.daemon import DaemonError

BUDGET = 100
SECONDS = 1.5
PUSHERS = 300  # files whose anchors push out every other one

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and giving up rights need root")


def fill(share: Path, files: int, directories: int = 3) -> None:
    for i in range(directories):
        (share / f"dir {i}").mkdir()
    for i in range(files):
        (share / f"dir {i % directories}" / f"file {i}").write_bytes(b"%d" % i)


def run(*argv: object) -> None:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"the machine does not let us {argv[0]}: {done.stderr}")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, in memory, where many files are made in no time."""
    memory = "/dev/shm"
    path = Path(tempfile.mkdtemp(prefix="vfsd-", dir=memory if os.path.isdir(memory) else None))
    path.chmod(0o777)
    yield path
    for sub in ("merged", "mnt"):
        subprocess.run(["umount", "--lazy", path / sub], check=False, capture_output=True)
    shutil.rmtree(path)


def overlay(place: Path, files: int) -> Path:
    """An overlayfs without index, nfs_export: it has no file handles. Some files are in the upper layer."""
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    fill(place / "lower", files)
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work,index=off,nfs_export=off"
    run("mount", "-t", "overlay", "vfsd-test", "-o", options, place / "merged")
    for i in range(0, files, 10):
        (place / "merged" / f"dir {i % 3}" / f"file {i}").write_bytes(b"%d" % i)
    return place / "merged"


@contextlib.contextmanager
def fuse(place: Path, files: int, daemon: StartDaemon) -> Iterator[Path]:
    """What `vfsd mount` mounts: handles are found there only in memory."""
    (place / "origin").mkdir()
    fill(place / "origin", files)
    with mounted(daemon(place / "origin"), place / "mnt") as mnt:
        yield mnt


@contextlib.contextmanager
def mounted(served: Daemon, mnt: Path) -> Iterator[Path]:
    """What a daemon serves, by `vfsd mount`; another daemon may share it."""
    mnt.mkdir()
    command = [sys.executable, "-m", "vfsd", "mount", "--socket", str(served.socket), str(mnt)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        if "READY" not in line:
            process.kill()
        assert "READY" in line, line + process.stderr.read()
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        try:
            yield mnt
        finally:
            # The daemon that shares it has it open still.
            run("umount", "--force", "--lazy", mnt)
            process.wait(20)
            drain.join()


@contextlib.contextmanager
def as_user(place: Path) -> Iterator[None]:
    """Daemons started here are another user's: one that may enter any directory, so that it finds Python."""
    script = place / "python"
    user = "--reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override"
    script.write_text(f'#!/bin/sh\nexec setpriv {user} {shlex.quote(sys.executable)} "$@"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        yield


@pytest.fixture(params=["overlay 20000", "fuse 2000", "user 4000", "never 4000"])
def big(request: pytest.FixtureRequest, place: Path, daemon: StartDaemon) -> Iterator[tuple[Daemon, int]]:
    """A daemon with few descriptors on a share with many files: their number."""
    kind, number = request.param.split()
    files = int(number)
    options = ["--fd-budget", str(BUDGET)]
    with contextlib.ExitStack() as stack:
        if kind == "overlay":
            share = overlay(place, files)
        elif kind == "fuse":
            share = stack.enter_context(fuse(place, files, daemon))
        else:
            share = place / "share"
            share.mkdir()
            fill(share, files)
        if kind == "user":
            stack.enter_context(as_user(place))
        if kind == "never":
            options += ["--inode-file-handles", "never"]
        served = daemon(share, options=options)
        yield served, files


def test_every_file_of_a_share_without_handles(big: tuple[Daemon, int]) -> None:
    served, files = big
    with guests_of(served) as start:
        guest = start()
        guest.init()
        found: dict[bytes, tuple[int, int]] = {}  # nodeid, ino
        for i in range(3):
            directory = guest.walk(f"dir {i}")
            for dirent in guest.listing(directory, size=1 << 18, plus=True):
                assert dirent.entry is not None and dirent.entry.nodeid, "an entry without an inode"
                found[dirent.name] = dirent.entry.nodeid, dirent.entry.attr.ino
        assert sorted(found) == sorted(b"file %d" % i for i in range(files))
        assert len({nodeid for nodeid, _ in found.values()}) == files
        assert len(anchors(served)) <= BUDGET + 16
        for i in range(0, files, files // 500):
            nodeid, ino = found[b"file %d" % i]
            attr = guest.getattr(nodeid)
            assert (attr.ino, attr.size) == (ino, len(str(i)))
            fh = guest.open(nodeid)
            assert guest.read(nodeid, fh, 0, 100) == b"%d" % i
            guest.release(nodeid, fh)
            assert guest.lookup(guest.walk(f"dir {i % 3}"), b"file %d" % i).nodeid == nodeid
        assert len(anchors(served)) <= BUDGET + 16


def anchors(served: Daemon) -> list[str]:
    return [path for path in served.descriptors() if path.startswith(f"{served.shared}/")]


# ---- one inode after another


class Evicting:
    """A guest on a directory whose other files can push any anchor out."""

    def __init__(self, served: Daemon, guest: Guest) -> None:
        self.served = served
        self.guest = guest
        self.share = served.shared
        self.pushers = [guest.walk("pushers")]
        self.pushers += [guest.lookup(self.pushers[0], b"%d" % i).nodeid for i in range(PUSHERS)]

    def evict(self, *paths: str) -> None:
        """Until the daemon has none of these (as they are called now) open by an anchor."""
        gone = {str(self.share / path) for path in paths}
        for _ in range(20):
            for nodeid in self.pushers:
                self.guest.getattr(nodeid)
            if not gone & set(self.served.descriptors()):
                return
        pytest.fail(f"the daemon keeps {gone & set(self.served.descriptors())}")


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("named") / "share"
    (path / "pushers").mkdir(parents=True)
    for i in range(PUSHERS):
        (path / "pushers" / str(i)).touch()
    return path


@pytest.fixture(scope="module")
def few(module_daemon: StartDaemon, share: Path) -> Daemon:
    return module_daemon(share, options=["--inode-file-handles", "never", "--fd-budget", str(BUDGET)])


@pytest.fixture
def it(few: Daemon) -> Iterator[Evicting]:
    with guests_of(few) as start:
        guest = start()
        guest.init()
        yield Evicting(few, guest)


def test_an_inode_comes_back_as_itself(it: Evicting, share: Path) -> None:
    directory = share / "comes back"
    directory.mkdir()
    names = ["short", "l" * 43, "m" * 44, "n" * 255, "with\nnewline", "gone (deleted)"]
    for name in names:
        (directory / name).write_text(name)
    (directory / "link").symlink_to("nowhere")
    parent = it.guest.walk("comes back")
    nodeids = {name: it.guest.lookup(parent, os.fsencode(name)).nodeid for name in [*names, "link"]}
    for _ in range(2):
        it.evict("comes back", *(f"comes back/{name}" for name in nodeids))
        for name in names:
            assert it.guest.getattr(nodeids[name]).ino == (directory / name).stat().st_ino
            assert it.guest.lookup(parent, os.fsencode(name)).nodeid == nodeids[name]
        assert it.guest.readlink(nodeids["link"]) == b"nowhere"


def test_a_whole_path_comes_back(it: Evicting, share: Path) -> None:
    depth = 100
    path = "/".join(["deep", *(f"d{i}" for i in range(depth))])
    (share / path).mkdir(parents=True)
    (share / path / "file").write_bytes(b"deep")
    nodeid = it.guest.walk(f"{path}/file")
    above = [path.rsplit("/", n)[0] for n in range(depth)]
    it.evict(f"{path}/file", path, *above)
    assert it.guest.getattr(nodeid).size == 4


def test_a_replaced_file_is_another_one(it: Evicting, share: Path) -> None:
    """The new one may well get the old one's number."""
    for name in (b"removed first", b"renamed over"):
        path = share / os.fsdecode(name)
        path.write_bytes(b"old")
        old = it.guest.lookup(ROOT, name)
        it.evict(os.fsdecode(name))
        if name == b"removed first":
            path.unlink()
            path.write_bytes(b"newer")
        else:
            (share / "new").write_bytes(b"newer")
            (share / "new").rename(path)
        with refused(ESTALE):
            it.guest.getattr(old.nodeid)
        new = it.guest.lookup(ROOT, name)
        assert new.nodeid != old.nodeid and new.attr.size == 5
        assert it.guest.getattr(new.nodeid).size == 5
        with refused(ESTALE):
            it.guest.getattr(old.nodeid)


def test_one_the_host_has_moved_is_found_where_it_is(it: Evicting, share: Path) -> None:
    (share / "before" / "inner").mkdir(parents=True)
    (share / "before" / "inner" / "file").write_bytes(b"moved")
    outer, nodeid = it.guest.walk("before"), it.guest.walk("before/inner/file")
    it.evict("before", "before/inner", "before/inner/file")
    (share / "elsewhere").mkdir()
    (share / "before").rename(share / "elsewhere" / "after")
    with refused(ESTALE):
        it.guest.getattr(nodeid)
    assert it.guest.lookup(it.guest.walk("elsewhere"), b"after").nodeid == outer
    assert it.guest.getattr(nodeid).size == 5, "below it nothing has changed"


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
@pytest.mark.parametrize("cache", ["auto", "always", "always --zero-message-open"])
def test_a_program_stays_in_what_the_host_renames(place: Path, cache: str) -> None:
    """Linux looks nothing up again for the directory a program is in: an error there would last."""
    share = place / "share"
    (share / "before" / "inner").mkdir(parents=True)
    (share / "before" / "inner" / "file").write_bytes(b"moved")
    (share / "pushers").mkdir()
    for i in range(PUSHERS):
        (share / "pushers" / str(i)).touch()
    cache, *options = cache.split()
    options += ["--inode-file-handles", "never", "--fd-budget", str(BUDGET)]
    with Daemon(share, cache=cache, options=options) as served, mounted(served, place / "mnt") as mnt:
        outer = os.open(mnt / "before", os.O_PATH)
        inner = os.open("inner", os.O_PATH, dir_fd=outer)
        file = os.open("file", os.O_RDONLY, dir_fd=inner)
        for _ in range(2):
            for i in range(PUSHERS):
                os.chmod(mnt / "pushers" / str(i), 0o600)
        held = [path for path in served.descriptors() if path.startswith(f"{share}/before")]
        assert held in ([], [f"{share}/before/inner/file"])
        (share / "before").rename(share / "after")
        (share / "before").mkdir()
        assert sorted(os.listdir(f"/proc/self/fd/{inner}")) == ["file"]
        (share / "after" / "inner").rename(share / "after" / "within")
        for name in ("file", "new"):
            fd = os.open(name, os.O_CREAT | os.O_RDWR, dir_fd=inner)
            assert os.read(fd, 10) == (b"moved" if name == "file" else b"")
            os.close(fd)
        assert (share / "after/within/new").exists()
        # By path it is what the host has now.
        assert os.listdir(mnt / "after") == ["within"]
        (share / "after/within/file").rename(share / "after/within/other")
        assert os.pread(file, 10, 0) == b"moved"
        assert sorted(os.listdir(f"/proc/self/fd/{inner}")) == ["new", "other"]
        for fd in (file, inner, outer):
            os.close(fd)


def test_one_the_guest_moves_is_kept_in_sight(it: Evicting, share: Path) -> None:
    for name in ("moved", "over"):
        (share / name).write_text(name)
    moved, over = it.guest.walk("moved"), it.guest.walk("over")
    it.evict("moved", "over")
    it.guest.rename(ROOT, b"moved", ROOT, b"over")
    assert it.guest.getattr(moved).nlink == 1
    assert it.guest.getattr(over).nlink == 0, "what was there is still there for who has it"
    it.evict("over")
    assert it.guest.getattr(moved).ino == (share / "over").stat().st_ino
    assert it.guest.lookup(ROOT, b"over").nodeid == moved


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_one_the_guest_removes_is_kept(it: Evicting, share: Path, kind: str) -> None:
    name = f"removed {kind}"
    if kind == "file":
        (share / name).write_bytes(b"content")
    else:
        (share / name).mkdir()
    nodeid = it.guest.walk(name)
    it.evict(name)
    (it.guest.unlink if kind == "file" else it.guest.rmdir)(ROOT, os.fsencode(name))
    for _ in range(2):
        assert it.guest.getattr(nodeid).nlink == 0
        for pusher in it.pushers:
            it.guest.getattr(pusher)
    if kind == "file":
        fh = it.guest.open(nodeid)
        assert it.guest.read(nodeid, fh, 0, 100) == b"content"
        it.guest.release(nodeid, fh)
    it.guest.forget(nodeid)


def test_one_the_host_removes_is_kept_while_the_guest_has_it_open(it: Evicting, share: Path) -> None:
    (share / "open").write_bytes(b"content")
    nodeid = it.guest.walk("open")
    fh = it.guest.open(nodeid, os.O_RDWR)
    it.evict("missing")
    before = len(it.served.descriptors())
    (share / "open").unlink()
    assert it.guest.getattr(nodeid).nlink == 0
    assert it.guest.write(nodeid, fh, 7, b"!") == 1
    with refused(ESTALE):  # as by a name that may be another file's now
        it.guest.truncate(nodeid, 5)
    assert it.guest.truncate(nodeid, 5).size == 5
    again = it.guest.open(nodeid)
    assert it.guest.read(nodeid, again, 0, 100) == b"conte"
    for handle in (again, fh):
        it.guest.release(nodeid, handle)
    it.guest.forget(nodeid)
    with refused(ENOENT):
        it.guest.lookup(ROOT, b"open")
    assert len(it.served.descriptors()) <= before


def test_a_name_of_two(it: Evicting, share: Path) -> None:
    """A hard link whose other name goes: looked up, it is the same inode still."""
    (share / "first").write_bytes(b"linked")
    os.link(share / "first", share / "second")
    nodeid = it.guest.walk("first")
    it.evict("first")
    (share / "first").unlink()
    assert it.guest.lookup(ROOT, b"second").nodeid == nodeid
    assert it.guest.getattr(nodeid).nlink == 1


# ---- budget and options


def test_open_files_take_the_place_of_inodes_and_leave_some(it: Evicting) -> None:
    handles: list[tuple[int, int]] = []
    with refused(ENFILE):
        for nodeid in it.pushers[1:]:
            handles.append((nodeid, it.guest.open(nodeid)))  # noqa: PERF401
    assert len(handles) == BUDGET * 7 // 8
    for nodeid in it.pushers[1:]:
        it.guest.getattr(nodeid)
    assert len(anchors(it.served)) <= BUDGET + 16
    with refused(ENFILE):
        it.guest.create(ROOT, b"one too many")
    with refused(ENOENT):
        it.guest.lookup(ROOT, b"one too many")
    for nodeid, fh in handles:
        it.guest.release(nodeid, fh)
    it.guest.open(it.pushers[1])


def test_each_guest_has_a_budget_of_its_own(few: Daemon) -> None:
    def opened(guest: Guest, most: int) -> list[int]:
        pushers = guest.walk("pushers")
        found = []
        with contextlib.suppress(OSError):
            for i in range(most):
                nodeid = guest.lookup(pushers, b"%d" % i).nodeid
                found.append(guest.open(nodeid))
        return found

    with guests_of(few) as start:
        first, second = start(), start()
        first.init()
        second.init()
        assert len(opened(first, PUSHERS)) == len(opened(second, PUSHERS)) == BUDGET * 7 // 8
        second.close()
        assert opened(first, 1) == [], "another's end gives it no more"


def test_mandatory_refuses_what_has_no_handles(place: Path, daemon: StartDaemon) -> None:
    share = overlay(place, 0)
    with pytest.raises(DaemonError, match="--inode-file-handles: file handles can't be opened"):
        daemon(share, options=["--inode-file-handles", "mandatory"])
    daemon(place / "lower", options=["--inode-file-handles=mandatory"])


class Worker:
    """On one queue: its own files come and go and move, everybody reads those of all."""

    def __init__(self, guest: Guest, queue: int, places: list[tuple[int, int]]) -> None:
        self.ops = guest.on(queue)
        self.places = places  # nodeids of directories, number of files in each
        self.choose = random.Random(queue)
        self.queue = queue
        self.failed: BaseException | None = None

    def read_some(self) -> None:
        directory, files = self.choose.choice(self.places)
        i = self.choose.randrange(files)
        entry = self.ops.lookup(directory, b"%d" % i)
        assert entry.attr.size == len(str(i))
        assert self.ops.getattr(entry.nodeid).ino == entry.attr.ino
        fh = self.ops.open(entry.nodeid)
        assert self.ops.read(entry.nodeid, fh, 0, 100) == b"%d" % i
        self.ops.release(entry.nodeid, fh)
        if self.choose.random() < 0.5:
            self.ops.forget(entry.nodeid)

    def make_and_move(self) -> None:
        (one, _), (other, _) = self.choose.sample(self.places, 2)
        name, moved = b"mine %d" % self.queue, b"moved %d" % self.queue
        entry, fh = self.ops.create(one, name)
        self.ops.write(entry.nodeid, fh, 0, name)
        self.ops.rename(one, name, other, moved)
        if self.choose.random() < 0.5:
            self.read_some()
        assert self.ops.lookup(other, moved).nodeid == entry.nodeid
        self.ops.unlink(other, moved)
        assert self.ops.getattr(entry.nodeid).nlink == 0
        assert self.ops.read(entry.nodeid, fh, 0, 100) == name
        self.ops.release(entry.nodeid, fh)
        self.ops.forget(entry.nodeid, 2)

    def run(self, until: float) -> None:
        try:
            while time.monotonic() < until:
                self.choose.choice((self.read_some, self.read_some, self.make_and_move))()
        except BaseException as problem:
            self.failed = problem


@pytest.mark.parametrize("handles", ["never", "prefer"])
def test_evictions_from_several_queues_at_once(daemon: StartDaemon, place: Path, handles: str) -> None:
    share = place / "share"
    for i in range(8):
        (share / f"dir {i}").mkdir(parents=True)
        for k in range(60):
            (share / f"dir {i}" / str(k)).write_bytes(b"%d" % k)
    served = daemon(share, options=["--fd-budget", "64", "--inode-file-handles", handles])
    with guests_of(served) as start:
        guest = start(request_queues=3)
        guest.init()
        before = len(served.descriptors())
        places = [(guest.walk(f"dir {i}"), 60) for i in range(8)]
        workers = [Worker(guest, queue, places) for queue in (1, 2, 3)]
        threads = [threading.Thread(target=w.run, args=(time.monotonic() + SECONDS,)) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [worker.failed for worker in workers] == [None] * 3
        assert len(anchors(served)) <= 64 + 16
        guest.destroy()
        assert anchors(served) == []
        # A second thread of a queue and the mounts' descriptors may stay.
        assert len(served.descriptors()) <= before + 1
