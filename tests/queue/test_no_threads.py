"""No further thread can be had (TasksMax of systemd, a container's pids limit): requests wait."""

import os
import socket
import sys
from pathlib import Path

import pytest
from fuse.rawguest import Guest
from fuse.wire import ROOT
from guests import Daemon, eventually
from vhost.peers import Guest as Memory

from vfsd.vhost.frontend import Frontend
from vfsd.vhost.messages import PeerClosed

# A daemon each of whose processes can have so many threads beside the first: then CPython says this.
LIMITED = """
import sys, threading
most, start = int(sys.argv[1]), threading.Thread.start
def limited(self):
    if threading.active_count() > most:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
from vfsd.cli import main
main(sys.argv[5:])
"""


def limited(tmp_path: Path, threads: int) -> Daemon:
    program, share = tmp_path / "limited.py", tmp_path / "share"
    program.write_text(LIMITED)
    share.mkdir()
    return Daemon(share, before=[sys.executable, str(program), str(threads)])


@pytest.mark.parametrize("threads", [3, 4, 5])
def test_what_blocks_is_run_by_those_there_are(tmp_path: Path, threads: int) -> None:
    """Two serve the queues and one watches them; the next would stand by, or be the pool's first."""
    with limited(tmp_path, threads) as daemon, Guest(daemon.socket) as guest:
        guest.init()
        entry, fh = guest.create(ROOT, b"file")
        for _ in range(3):
            tokens = [
                guest.queue.submit("FSYNC", entry.nodeid, fh.to_bytes(8, "little") + bytes(8), kick=False)
                for _ in range(8)
            ]
            guest.queue.kick()
            for token in tokens:
                assert guest.queue.wait(token).error == 0
        guest.queue.restart()
        guest.statfs()
        guest.frontend.reset_device(ack=True)
        assert os.listdir(daemon.shared) == ["file"]


def test_a_queue_without_a_thread_ends_its_front_end(tmp_path: Path) -> None:
    with limited(tmp_path, 1) as daemon, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        memory = Memory()
        with Frontend(sock) as frontend:
            frontend.handshake("qemu", memory.setup())
            with pytest.raises(PeerClosed):
                frontend.start("qemu", memory.setup())
        memory.close()
        assert eventually(lambda: "can't be served: can't start new thread" in daemon.log)
