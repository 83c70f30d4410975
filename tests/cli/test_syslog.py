"""--syslog: lines reach the local syslog, and nobody waits for it."""

import logging
import os
import socket
from pathlib import Path

import pytest

from vfsd.daemon import logs


def record(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("vfsd", level, "", 0, text, (), None)


def test_lines_have_priority_program_and_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "DEV_LOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        handler = logs.SyslogHandler("vfsd-virtiofsd", logs.DEBUG_RATE)
        handler.emit(record("one"))
        handler.emit(record("two", logging.DEBUG))
        head = f"vfsd-virtiofsd[{os.getpid()}]: "
        assert syslog.recv(1000).decode() == f"<12>{head}one\n"
        assert syslog.recv(1000).decode() == f"<15>{head}two\n"
        for _ in range(1000):  # a datagram socket takes some ten that nobody has read
            handler.emit(record("more"))
        handler.close()


def test_without_a_syslog_nothing_is_said_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "DEV_LOG", str(tmp_path / "none"))
    handler = logs.SyslogHandler("vfsd", logs.DEBUG_RATE)
    handler.emit(record("lost"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "none"))
        handler.emit(record("lost too, but it looks again"))
        handler.emit(record("heard"))
        assert b"heard" in syslog.recv(1000)
    handler.close()
