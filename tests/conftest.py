"""Fixtures for every test: a daemon as a process of its own.

With ``--daemon qemu-virtiofsd`` the same tests run against QEMU's own daemon, as far as it can.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from guests import Daemon, StartDaemon

LIVE: list[Daemon] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--daemon",
        choices=("vfsd", "qemu-virtiofsd"),
        default="vfsd",
        help="the daemon that tests with guests start (default: vfsd)",
    )
    parser.addoption(
        "--dax", action="store_true", help="run what boots a guest with a DAX window (make test-dax)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the running daemons said, with a test that failed."""
    report = yield
    if report.failed:
        for daemon in LIVE:
            report.sections.append((f"stderr of daemon {daemon.pid}", daemon.log[-8000:]))
    return report


def _starter(command: str) -> Iterator[StartDaemon]:
    with ExitStack() as stack:

        def start(shared: Path, **arguments: Any) -> Daemon:
            daemon = Daemon(shared, command=command, **arguments)
            LIVE.append(daemon)
            stack.callback(LIVE.remove, daemon)
            stack.callback(daemon.stop)
            return daemon

        yield start


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[StartDaemon]:
    """Starts daemons; each is stopped, and must end well, at the end of the test."""
    yield from _starter(request.config.getoption("--daemon"))


@pytest.fixture(scope="module")
def module_daemon(request: pytest.FixtureRequest) -> Iterator[StartDaemon]:
    """As `daemon`, for all tests of a file."""
    yield from _starter(request.config.getoption("--daemon"))
