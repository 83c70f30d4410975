"""--log-format, and the priorities that systemd's journal reads."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vfsd.daemon import logs
from vfsd.guest import mount
from vfsd.options.table import LOG_FORMATS


def served(tmp_path: Path, options: Sequence[str] = (), journal: str | None = None) -> list[str]:
    """What a daemon said whose guest came and went: stderr is a stream socket, as systemd's is."""
    (tmp_path / "share").mkdir()
    at = tmp_path / "v.sock"
    ours, its = socket.socketpair()
    with ours, its:
        stream = os.fstat(its.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": journal or f"{stream.st_dev}:{stream.st_ino}"}
        process = subprocess.Popen(
            [sys.executable, "-m", "vfsd", "serve", "--socket", at, "--shared-dir", tmp_path / "share",
             *options],
            stdin=subprocess.DEVNULL, stderr=its, env=environment,
        )  # fmt: skip
        its.close()
        ours.settimeout(20)
        with process, ours.makefile("r") as said:
            try:
                lines = [said.readline()]
                assert "READY" in lines[0]
                with mount(str(at)) as fs:
                    assert fs.listdir() == []
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                return lines + list(said)
            finally:
                process.kill()


def test_each_line_is_an_object(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in served(tmp_path, ["--log-format", "json"], "0:0")]
    assert all(line.keys() == {"time", "level", "logger", "pid", "message"} for line in lines)
    assert {line["level"] for line in lines} == {"info"}
    assert lines[0]["message"].startswith("READY: ")
    assert lines[0]["time"][10] == "T" and lines[0]["time"].endswith("Z")


@pytest.mark.parametrize("log_format", LOG_FORMATS)
def test_the_journal_is_told_priorities(tmp_path: Path, log_format: str) -> None:
    lines = served(tmp_path, ["--log-format", log_format, "--log-level", "debug"])
    assert {line[:3] for line in lines} == {"<6>", "<7>"}
    if log_format == "json":
        # One that the guest's server said: it has its own number.
        assert len({json.loads(line[3:])["pid"] for line in lines}) == 2


def test_another_stream_than_the_journal_is_told_none(tmp_path: Path) -> None:
    assert all(line.startswith("INFO vfsd") for line in served(tmp_path, journal="0:0"))


def test_a_traceback_is_part_of_the_object_and_long_texts_are_cut() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as said, open(writer, "wb") as pipe:
        handler = logs.Handler(logs.without_waiting(pipe.fileno()), logs.SERVER_RATE)
        handler.setFormatter(logs.JsonFormatter(1))
        try:
            raise OSError("\N{GRINNING FACE}" * 100_000)
        except OSError:
            handler.emit(
                logging.LogRecord("vfsd", logging.CRITICAL, "", 0, "\udcff" * 100_000, (), sys.exc_info())
            )
        line = os.read(said.fileno(), 2 * logs.LINE_MAX)
    assert line.endswith(b"}\n") and len(line) <= logs.LINE_MAX
    told = json.loads(line)
    assert told["level"] == "critical"
    assert told["traceback"].endswith("\N{GRINNING FACE}")


def test_each_line_of_a_traceback_has_its_priority() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as said, open(writer, "wb") as pipe:
        handler = logs.JournalHandler(logs.without_waiting(pipe.fileno()), logs.SERVER_RATE)
        handler.emit(logging.LogRecord("vfsd", logging.CRITICAL, "", 0, "one\ntwo", (), None))
        assert os.read(said.fileno(), logs.LINE_MAX) == b"<2>one\n<2>two\n"
