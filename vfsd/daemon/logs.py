"""The log of the supervisor and its servers: lines on stderr, at a bounded rate, never waited for.

Standard error may be a pipe that nobody reads. It is shared with whoever started the daemon, so its
flags stay as they are.
"""

import logging
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

LINE_MAX: Final = 1 << 16  # bytes; a traceback is one line
FORMAT: Final = "%(levelname)s %(name)s: %(message)s"
SERVER_FORMAT: Final = "%(levelname)s %(name)s[{pid}]: %(message)s"
SECONDS: Final = "%Y-%m-%dT%H:%M:%S"
JSON_TEXT_MAX: Final = LINE_MAX // 32  # characters, of up to 12 bytes each; two such texts are in a line

DEV_LOG: Final = "/dev/log"
FACILITY_USER: Final = 1 << 3
PRIORITIES: Final = {
    logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2,
}  # fmt: skip

Write = Callable[[bytes], int]  # as os.write; BlockingIOError rather than wait


class Output(NamedTuple):
    """Where lines go, and the descriptors that takes."""

    write: Write
    descriptors: set[int]


class Rate(NamedTuple):
    """Lines: so many at once, and so many a second."""

    burst: int
    per_s: float


# Of what front ends and guests can cause. debug: chosen by an operator who looks for something.
SUPERVISOR_RATE: Final = Rate(4000, 100)
SERVER_RATE: Final = Rate(400, 20)
DEBUG_RATE: Final = Rate(100_000, 5000)


class Handler(logging.Handler):
    """Writes to a descriptor. What finds it full, or comes too fast, is left out and counted.

    Critical lines, which are our own bugs, come at any rate.
    """

    def __init__(self, output: Output, rate: Rate) -> None:
        super().__init__()
        self._write, self.descriptors = output
        self.pid = os.getpid()
        self.sandboxed = False
        self.begin(rate)

    def begin(self, rate: Rate) -> None:
        """With that rate, and nothing left from before."""
        self._rate = rate
        self._rest = b""  # of a line that went out in part
        self._tokens = float(rate.burst)
        self._counted_at = time.monotonic()
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Under the handler's lock."""
        if not self._take_token() and record.levelno < logging.CRITICAL:
            self._left_out += 1
            return
        line = self.line(record)
        if self._left_out:
            told = logging.LogRecord(
                "vfsd", logging.WARNING, "", 0, "%d lines left out", (self._left_out,), None
            )
            line = self.line(told) + line
        try:
            self._flush_rest()
            self._rest = line[self._write(line) :]
        except OSError:  # full, or its reader has gone
            self._left_out += 1
        else:
            self._left_out = 0

    def line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace")[: LINE_MAX - 1] + b"\n"

    def _flush_rest(self) -> None:
        while self._rest:
            self._rest = self._rest[self._write(self._rest) :]

    def _take_token(self) -> bool:
        now = time.monotonic()
        refilled = self._tokens + (now - self._counted_at) * self._rate.per_s
        self._tokens = min(self._rate.burst, refilled)
        self._counted_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class JournalHandler(Handler):
    """Writes to systemd's journal, with each line's priority (sd-daemon(3))."""

    def line(self, record: logging.LogRecord) -> bytes:
        head = f"<{priority(record)}>".encode()
        return head + super().line(record)[:-1].replace(b"\n", b"\n" + head) + b"\n"


class SyslogHandler(Handler):
    """Sends to the local syslog(3), as user messages of that program; without one it says nothing."""

    def __init__(self, program: str, rate: Rate) -> None:
        # Connected now, as the path is out of reach in a sandbox.
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.connect_ex(DEV_LOG)
        super().__init__(Output(self._send, {self._sock.fileno()}), rate)
        self._program = program

    def _send(self, line: bytes) -> int:
        try:
            return self._sock.send(line)
        except BlockingIOError:
            raise
        except OSError:
            if not self.sandboxed:  # where connect(2) ends the process
                self._sock.connect_ex(DEV_LOG)  # one that was started anew, or later
            raise

    def close(self) -> None:
        self._sock.close()
        super().close()

    def line(self, record: logging.LogRecord) -> bytes:
        head = f"<{FACILITY_USER | priority(record)}>{self._program}[{self.pid}]: "
        return head.encode() + super().line(record)


class JsonFormatter(logging.Formatter):
    """A line is one JSON object (RFC 8259) in ASCII, its texts cut so that it is whole below LINE_MAX."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        from json import dumps  # only here, not after fork(2) into a sandbox

        self._dumps = dumps
        self._pid = pid

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": f"{time.strftime(SECONDS, time.gmtime(record.created))}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": self._pid,
            "message": record.getMessage()[:JSON_TEXT_MAX],
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)[-JSON_TEXT_MAX:]
        return self._dumps(said)


def priority(record: logging.LogRecord) -> int:
    """Of syslog(3)."""
    return PRIORITIES.get(record.levelno, PRIORITIES[logging.INFO])


def is_journal(fd: int) -> bool:
    """Whether that is the stream to the journal that a service has (systemd.exec(5), JOURNAL_STREAM)."""
    found = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def without_waiting(fd: int) -> Output:
    """Write to what fd is open on, whatever its flags are or become."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return Output(lambda data: sock.send(data, socket.MSG_DONTWAIT), {sock.fileno()})
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return Output(lambda data: os.write(fd, data), {fd})
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # another user's
        return spliced(fd) if stat.S_ISFIFO(mode) else polled(fd)
    return Output(lambda data: os.write(own, data), {own})


def spliced(fd: int) -> Output:
    """Write to a pipe that can't be opened anew: by a pipe of our own, as splice(2) need not wait."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def write(data: bytes) -> int:
        size = os.write(writer, data[: select.PIPE_BUF])
        try:
            return os.splice(reader, fd, size, flags=os.SPLICE_F_NONBLOCK)
        finally:
            discard(reader)

    return Output(write, {fd, reader, writer})


def discard(reader: int) -> None:
    """What is left in a pipe."""
    try:
        while os.read(reader, select.PIPE_BUF):
            pass
    except BlockingIOError:
        pass


def polled(fd: int) -> Output:
    """Write to a terminal that can't be opened anew."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)

    def write(data: bytes) -> int:
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(fd, data[: select.PIPE_BUF])

    return Output(write, {fd})


def start(level: str, log_format: str, syslog: str | None = None) -> None:
    """Log to stderr, or to syslog as that program; as the supervisor. One of LOG_LEVELS, of LOG_FORMATS."""
    if syslog is None:
        stderr = sys.stderr.fileno()
        kind = JournalHandler if is_journal(stderr) else Handler
        handler = kind(without_waiting(stderr), SUPERVISOR_RATE)
    else:
        handler = SyslogHandler(syslog, SUPERVISOR_RATE)
    handler.setFormatter(JsonFormatter(handler.pid) if log_format == "json" else logging.Formatter(FORMAT))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)


def note(lines: Sequence[str]) -> None:
    """What the operator should know of options."""
    for line in lines:
        logging.getLogger("vfsd").warning("%s", line)


def set_level(level: str) -> None:
    """One of LOG_LEVELS, from now on."""
    root = logging.getLogger()
    root.setLevel(logging.CRITICAL + 1 if level == "off" else level.upper())
    (handler,) = root.handlers
    assert isinstance(handler, Handler)
    usual = SERVER_RATE if handler.sandboxed else SUPERVISOR_RATE
    handler.begin(DEBUG_RATE if level == "debug" else usual)


def become_server() -> set[int]:
    """After fork(2): a rate of its own, and lines that say which server they are from.

    The descriptors that are needed for them.
    """
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, Handler)
    # The supervisor's number for it: in its own process namespace it is 1.
    handler.pid = int(os.readlink("/proc/self"))
    handler.sandboxed = True
    as_json = isinstance(handler.formatter, JsonFormatter)
    text = SERVER_FORMAT.format(pid=handler.pid)
    handler.setFormatter(JsonFormatter(handler.pid) if as_json else logging.Formatter(text))
    debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    handler.begin(DEBUG_RATE if debug else SERVER_RATE)
    return handler.descriptors
