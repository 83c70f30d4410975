"""Random requests to a live daemon: each comes back, nothing outside of the share changes."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guests import Daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfsd.fuse.opcodes import NAME, NUMBER

from . import wire
from .fixtures import StartGuest
from .rawguest import TIMEOUT_S, Guest, linux, scrambled
from .requests import REQUESTS, Held, request_for, snapshot
from .wire import IN_SIZE, ROOT

FILE_BYTES_MAX = 64 << 20  # a random FALLOCATE must not fill the disk
SETLKW = NUMBER["SETLKW"]
NAMES = (b"file", b"dir", b"link", b"out", b"new", b"..", b"out/secret", b"x" * 256, b"\xff")


class Draft(NamedTuple):
    """A request before it is known what the guest holds."""

    opcode: int
    nodeid: int  # index into what is known, or a number
    handle: int
    body: bytes | None  # None: a good one
    patches: list[tuple[int, bytes]]  # at offset modulo length
    cut: int  # bytes off the end
    room: int
    uid: int
    length: int  # what the header's says too much
    queue: int


EDGES = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1)
u64s = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
pieces = (
    st.binary(min_size=1, max_size=8)
    | u64s.map(lambda n: n.to_bytes(8, "little"))
    | st.sampled_from(NAMES).map(lambda name: name + b"\0")
)
drafts = st.builds(
    Draft,
    opcode=st.sampled_from(sorted(NAME)) | st.integers(0, 2**32 - 1),
    nodeid=st.integers(0, 5) | u64s,
    handle=st.integers(0, 3) | u64s,
    body=st.none() | st.binary(max_size=300),
    patches=st.lists(st.tuples(st.integers(0, 300), pieces), max_size=3),
    cut=st.just(0) | st.integers(0, 60),
    room=st.just(160) | st.integers(0, 5000),
    uid=st.sampled_from([0, 0, 1000, 2**32 - 1]),
    length=st.just(0) | st.integers(-60, 60),
    queue=st.integers(0, 2),
)


@pytest.fixture
def outer(outside: Path) -> Path:
    (outside / "tree").mkdir(exist_ok=True)
    (outside / "secret").write_bytes(b"secret")
    (outside / "tree" / "deep").write_bytes(b"deep")
    return outside


@pytest.fixture
def target(start_guest: StartGuest, served: Daemon) -> Iterator[Guest]:
    before = resource.prlimit(served.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (FILE_BYTES_MAX, before[1]))
    yield start_guest(request_queues=2)
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, before)


def furnish(share: Path, outer: Path) -> None:
    """Have on the host what the requests are about, whatever became of it."""
    os.chmod(share, 0o755)
    for path, kind in ((share / "file", "file"), (share / "dir", "dir"), (share / "empty", "dir")):
        if not os.path.lexists(path):
            if kind == "dir":
                path.mkdir()
            else:
                path.write_bytes(b"content")
    for path, to in ((share / "link", Path("file")), (share / "out", outer)):
        if not os.path.lexists(path):
            path.symlink_to(to)


def known(guest: Guest) -> Held:
    """A new session, so that one example does not depend on another."""
    guest.init()
    file, directory, link = (guest.lookup(ROOT, name).nodeid for name in (b"file", b"dir", b"link"))
    try:
        fh = guest.open(file, os.O_RDWR)
    except OSError:  # something else has been put there
        fh = guest.opendir(ROOT)
    return Held(file, directory, link, fh, guest.opendir(ROOT))


def submit(guest: Guest, draft: Draft, held: Held) -> tuple[int, int]:
    """(queue, token)"""
    nodeids = (ROOT, held.file, held.dir, held.link, 0, ROOT)
    handles = (held.fh, held.dir_fh, 0, held.fh + 1)
    nodeid = nodeids[draft.nodeid] if draft.nodeid < len(nodeids) else draft.nodeid
    handle = handles[draft.handle] if draft.handle < len(handles) else draft.handle
    body = draft.body
    if body is None:
        name = NAME.get(draft.opcode)
        body = b"" if name not in REQUESTS else request_for(name, held).body
        if len(body) >= 16 and draft.handle > 1:
            body = handle.to_bytes(8, "little") + body[8:]
    for at, piece in draft.patches:
        at %= len(body) + 1
        body = body[:at] + piece + body[at + len(piece) :]
    body = body[: max(0, len(body) - draft.cut)]
    length = max(0, IN_SIZE + len(body) + draft.length)
    unique = next(guest.uniques)
    request = wire.in_header(draft.opcode, unique, nodeid, 0, draft.uid, draft.uid, length) + body
    queue = guest.queues[draft.queue]
    room = [min(16, draft.room), max(0, draft.room - 16)]
    token = queue.submit_bytes(request, [IN_SIZE, len(body)], [n for n in room if n])
    return draft.queue, token


def test_random_requests(target: Guest, served: Daemon, share: Path, outer: Path) -> None:
    before = snapshot(outer)
    most = len(served.descriptors()) + 200

    @settings(
        max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(batch=st.lists(drafts, min_size=1, max_size=12), seed=st.none() | st.integers(0, 99))
    def run(batch: list[Draft], seed: int | None) -> None:
        furnish(share, outer)
        target.framing = linux
        held = known(target)
        target.framing = linux if seed is None else scrambled(seed, 20)
        tokens = [submit(target, draft, held) for draft in batch]
        # One that waits for a lock is answered at the end of the session at the latest.
        locks = [token for token, draft in zip(tokens, batch, strict=True) if draft.opcode == SETLKW]
        for index, token in tokens:
            if (index, token) not in locks:
                target.queues[index].wait(token, TIMEOUT_S)
        target.framing = linux
        target.init()
        for index, token in locks:
            target.queues[index].wait(token, TIMEOUT_S)
        for index in (0, 1, 2):
            target.on(index).getattr(target.on(index).lookup(ROOT, b"out").nodeid)
            assert not target.queues[index].broken(0)
        assert snapshot(outer) == before
        assert "Traceback" not in served.log
        assert len(served.descriptors()) <= most

    run()
    assert served.running()
    target.destroy()


def test_every_opcode_with_every_number(target: Guest, served: Daemon, share: Path, outer: Path) -> None:
    """Each 32-bit word of each good body, replaced by each number at an edge."""
    before = snapshot(outer)
    for name in sorted(wire.SERVED):
        for number in (0, 1, 2**31 - 1, 2**31, 2**32 - 1):
            furnish(share, outer)
            held = known(target)
            body = request_for(name, held).body
            for at in range(0, len(body), 4):
                bad = body[:at] + number.to_bytes(4, "little") + body[at + 4 :]
                token = target.queue.submit(name, request_for(name, held).nodeid, bad, out=4096)
                if name == "SETLKW":  # it may wait, until the session ends
                    held = known(target)
                target.queue.wait(token)
                if name in ("INIT", "DESTROY"):
                    target.init()
    assert "Traceback" not in served.log
    assert snapshot(outer) == before
