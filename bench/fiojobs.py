"""The workloads that are fio jobs: a fixed amount of work, every block of a file once.

What was read is compared by reading the file again the same way; what was written, by the host.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from .fixture import SEED, write_pages
from .model import Sample
from .profiles import Profile
from .tasks import COMMON, Outcome, Task, Work, expect

NEEDS = ("fio", "md5sum", "dd")
BLOCKS = {"4k": 4096, "128k": 1 << 17, "1m": 1 << 20}
KINDS = {
    "randread": ("read", "random"), "randwrite": ("write", "random"),
    "read": ("read", "sequential"), "write": ("write", "sequential"),
}  # fmt: skip


def size(profile: Profile, block: int) -> int:
    return profile.scattered if block == 4096 else profile.big


def file_name(block: int) -> str:
    return "scattered" if block == 4096 else "sequential"


def common(work: Work, block: int) -> Path:
    """The file that is read."""
    amount = size(work.profile, block)
    return work.tree.made(f"fio-{file_name(block)}", lambda new: write_pages(new, amount, SEED))


def own(work: Work, block: int) -> None:
    """The file that is written: there, and whole, so that nothing is allocated meanwhile."""
    (work.host / "data").write_bytes(bytes(size(work.profile, block)))


def pattern(work: Work) -> bytes:
    """Four bytes that no run before has written."""
    return (work.seed & 0x7F7F7F7F | 0x01010101).to_bytes(4, "big")


def job(kind: str, block: int, engine: str, depth: int, direct: bool, work: Work) -> str:
    """The command line."""
    reads = KINDS[kind][0] == "read"
    words = [
        "fio", "--name=job", f"--rw={kind}", f"--bs={block}", f"--size={size(work.profile, block)}",
        f"--ioengine={engine}", f"--iodepth={depth}", f"--direct={int(direct)}", "--thread", "--randseed=7",
        "--fallocate=none", "--output-format=json", "--eta=never", "--percentile_list=50:99:99.9",
        "--filename=" + (f"{COMMON}/fio-{file_name(block)}" if reads else "data"),
    ]  # fmt: skip
    if reads:
        words.append("--readonly")
    else:
        # Until the data has left the guest.
        words += ["--overwrite=1", "--end_fsync=1", "--scramble_buffers=0",
                  f"--buffer_pattern=0x{pattern(work).hex()}"]  # fmt: skip
    return " ".join(words)


def sum_script(block: int, direct: bool) -> str:
    """Of the file that was read, by the same way."""
    flag = " iflag=direct" if direct else ""
    return f"dd if={COMMON}/fio-{file_name(block)} bs=1048576{flag} 2>/dev/null | md5sum"


def read_right(work: Work, block: int, outcome: Outcome) -> None:
    with open(common(work, block), "rb") as stream:
        wanted = hashlib.file_digest(stream, "md5").hexdigest()
    expect(outcome.after.startswith(wanted), "what is read is not what is in the file on the host")


def written_right(work: Work, block: int, _outcome: Outcome) -> None:
    wanted = pattern(work) * (1 << 18)
    with open(work.host / "data", "rb") as stream:
        expect(stream.seek(0, 2) == size(work.profile, block), "the file on the host has another size")
        with mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
            for at in range(0, len(data), len(wanted)):
                right = data[at : at + len(wanted)] == wanted[: len(data) - at]
                expect(right, f"in the MiB from byte {at} the file on the host is not what was written")


def sample(task: Task, work: Work, outcome: Outcome) -> Sample:
    """What fio has measured. Failed: it had errors, or did less than it was told to."""
    document = outcome.output[outcome.output.find("{") :]
    try:
        found: dict[str, Any] = json.loads(document)["jobs"][0]
        side = found["read"] if found["read"]["total_ios"] else found["write"]
        error, done, amount, took = found["error"], side["total_ios"], side["io_bytes"], side["runtime"]
        latency = side["clat_ns"]
        longest = float(latency["max"])
        # Ends of fio's buckets, which may lie beyond what was seen.
        percentiles = {float(key): min(float(value), longest) for key, value in latency["percentile"].items()}
    except (ValueError, KeyError, IndexError) as problem:
        expect(False, f"fio's report can't be read: {problem!r}")
        raise
    expect(error == 0, f"fio had error {error}")
    expect(done == task.items(work.profile), f"fio did {done} of {task.items(work.profile)}")
    return Sample(
        done, max(took, 1) / 1e3, amount,
        p50=percentiles[50.0], p99=percentiles[99.0], p999=percentiles[99.9], max=longest,
    )  # fmt: skip


def task(kind: str, text: str, engine: str, depth: int, direct: bool) -> Task:
    block = BLOCKS[text]
    what, order = KINDS[kind]
    reads = what == "read"
    titles = [f"fio {what} {text.replace('k', ' KiB').replace('m', ' MiB')}", order]
    titles += ["libaio"] * (engine == "libaio") + ["O_DIRECT"] * direct
    return Task(
        name=f"fio-{kind}-{text}" + "-aio" * (engine == "libaio") + "-direct" * direct,
        title=", ".join(titles),
        unit="MB",
        script=lambda work: job(kind, block, engine, depth, direct, work),
        items=lambda profile: size(profile, block) // block,
        prepare=lambda work: common(work, block) if reads else own(work, block),
        check=lambda work, outcome: (read_right if reads else written_right)(work, block, outcome),
        after=lambda _work: sum_script(block, direct) if reads else "",
        needs=NEEDS,
        depth=depth,
        sample=sample,
    )


ROWS = (("4k", "psync", 1), ("4k", "libaio", 16), ("128k", "psync", 1), ("1m", "psync", 1))
JOBS = tuple(
    task(kind, text, engine, depth, direct)
    for text, engine, depth in ROWS
    for direct in (False, True)
    for kind in (("randread", "randwrite") if text == "4k" else ("read", "write"))
)
