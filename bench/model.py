"""What is measured, and what comes out: the types that every level shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .histogram import Histogram

FLOOR = "floor"  # the column of bare system calls


class Failed(Exception):
    """A daemon did not do what it must: its column says so."""


class NotOffered(Exception):
    """A daemon does not have what a measurement is of; nobody's fault, and no figure."""


@dataclass(frozen=True)
class Setting:
    """What a daemon is started with and how it is driven.

    backing: memory, disk or slow. cache: none, auto, always, metadata. completions: poll or event, how
    the front end learns of replies. queue_size: elements of each queue. locks: POSIX locks. dax: with
    a window. guest: uml or qemu at the level guest, qemu-dax at the level dax; its driver decides on
    queues and completions.
    """

    level: str = "wire"
    backing: str = "memory"
    cache: str = "auto"
    completions: str = "poll"
    queues: int = 1
    queue_size: int = 1024
    xattr: bool = False
    writeback: bool = False
    locks: bool = False
    dax: bool = False
    guest: str = ""

    @property
    def on(self) -> list[str]:
        """What is switched on."""
        return [name for name in ("xattr", "writeback", "locks", "dax") if getattr(self, name)]

    @property
    def id(self) -> str:
        """Short, for people and as a key."""
        how = [self.guest] if self.guest else [self.completions, f"{self.queues}x{self.queue_size}"]
        return " ".join([self.level, *how, self.backing, f"cache={self.cache}", *self.on])


@dataclass(frozen=True)
class Cell:
    """One figure of the table, for each daemon. depth: operations under way at a time."""

    setting: Setting
    workload: str
    depth: int = 1

    @property
    def id(self) -> str:
        return f"{self.setting.id} | {self.workload} | qd {self.depth}"


@dataclass
class Sample:
    """One run of a cell. Times in seconds, latencies in nanoseconds."""

    ops: int
    elapsed: float
    bytes: int = 0
    requests: int = 0
    kicks: int = 0
    calls: int = 0
    daemon_cpu: float = 0.0
    foreign: float = 0.0  # share of the CPUs' time that others used meanwhile
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def latencies(self, found: Histogram) -> None:
        """Set the percentiles."""
        self.p50, self.p99, self.p999 = (found.percentile(q) for q in (50, 99, 99.9))
        self.max = float(found.largest)


@dataclass(frozen=True)
class Figure:
    """One daemon in one cell: medians over the rounds. By item (an entry of a listing, else an operation), in
    microseconds.

    us: time by items done, low and high the extremes. Latencies are of a whole operation. noisy: others used
    the machine in most rounds.
    """

    us: float
    low: float
    high: float
    mb_per_second: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0
    cpu: float = 0.0
    requests: float = 0.0
    kicks: float = 0.0  # by request
    calls: float = 0.0
    rounds: int = 1
    noisy: bool = False

    @property
    def per_second(self) -> float:
        return 1e6 / self.us

    def by(self, items: int) -> Figure:
        """The same of one item, where an operation does so many."""
        each = {name: getattr(self, name) / items for name in ("us", "low", "high", "cpu", "requests")}
        return replace(self, **each)


@dataclass
class Result:
    """All of one daemon, or the floor, in one cell.

    summary: what is kept of the samples in a report of medians, by operation. failed: why it is FAILED.
    missing: why there is nothing to show, though nobody failed.
    """

    cell: Cell
    who: str
    samples: list[Sample] = field(default_factory=list)
    summary: Figure | None = None
    failed: str | None = None
    missing: str | None = None


@dataclass
class Blocking:
    """Head-of-line blocking: getattr on a queue while something slow is under way on it.

    slow: seconds the slow request took. Latencies in nanoseconds; alone: p99 with nothing else.
    """

    setting: str
    what: str
    who: str
    slow: float = 0.0
    alone_p99: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0
    ops: int = 0
    failed: str | None = None
    missing: str | None = None


@dataclass
class Caching:
    """What a daemon lets a guest keep, in one cache mode, as its replies say. Times in seconds.

    *_shown: how long after a change on the host a new request sees it, measured; a guest that
    caches may show the old state for the time-out more.
    """

    cache: str
    who: str
    entry: float = 0.0
    attr: float = 0.0
    negative: float = 0.0
    keep_cache: bool = False
    direct_io: bool = False
    cache_dir: bool = False
    no_flush: bool = False
    readdirplus: bool = False
    writeback: bool = False
    attr_shown: float = 0.0
    data_shown: float = 0.0
    failed: str | None = None
    missing: str | None = None


@dataclass
class Start:
    """One start of a daemon. Seconds; memory in bytes, guest memory not counted.

    listening: from exec until it listens. resident: with one guest and nothing looked up.
    """

    setting: str
    listening: float
    resident: int = 0


@dataclass
class Staleness:
    """How long a guest went on seeing what the host had changed. Seconds; None: longer than `limit`.

    attribute: a file's size; content: of a file opened anew; created: a name that was not there;
    removed: a name that was.
    """

    setting: Setting
    who: str
    limit: float = 0.0
    attribute: float | None = None
    content: float | None = None
    created: float | None = None
    removed: float | None = None
    failed: str | None = None
    missing: str | None = None


@dataclass
class PageCache:
    """How often a file of `size` bytes is in memory once a guest has read it, besides on the host. Bytes.

    copied: in the guest's page cache without DAX; own: there with DAX; shared: of the window, in the
    host's page cache, which both see.
    """

    setting: Setting
    who: str
    size: int = 0
    copied: int = 0
    own: int = 0
    shared: int = 0
    failed: str | None = None
    missing: str | None = None


@dataclass
class Memory:
    """What it takes to hold `count` things a guest has asked for. Bytes, guest memory not counted."""

    count: int
    resident: int


@dataclass
class Contestant:
    """A daemon and all that is not in a cell. commands: by setting, exactly what was run.

    inodes, handles: memory for inodes a guest knows, and for files it has open.
    """

    name: str
    version: str = ""
    commands: dict[str, list[str]] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    inodes: list[Memory] = field(default_factory=list)
    handles: list[Memory] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything a run has found; docs/bench.md describes it as JSON."""

    made: str
    command: list[str]
    profile: str
    rounds: int
    seconds: float
    machine: dict[str, str]
    contestants: list[Contestant] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    blocking: list[Blocking] = field(default_factory=list)
    caching: list[Caching] = field(default_factory=list)
    staleness: list[Staleness] = field(default_factory=list)
    pagecache: list[PageCache] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": 1, **asdict(self)}


@dataclass(frozen=True)
class Errand:
    """A measurement outside of the table. what: inodes, handles, caching, staleness, pagecache, or a
    kind of blocking."""

    what: str
    setting: Setting

    @property
    def id(self) -> str:
        return f"{self.setting.id} | {self.what}"
