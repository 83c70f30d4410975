"""What has to hold on every share, whichever guest and file system: one function for each subject.

Each works in a new directory of the share and compares what the guest did with what the host sees.
"""

from __future__ import annotations

import os
from pathlib import Path

from share import Share
from workloads import append, manifest, metadata, names


def tree_goes_both_ways(share: Share, files: int, *, times: bool = True) -> None:
    """A tree goes from the share into the guest's memory and back; all three are equal.

    Without `times` they are not compared: busybox copies whole seconds.
    """
    host, guest = share.directory("tree")
    (host / "source").mkdir()
    manifest.make_tree(host / "source", files)
    share.guest.check(f"cp -a {guest}/source /tmp/tree && cp -a /tmp/tree {guest}/back", 180)
    expected = manifest.tree_sum(host / "source", times=times)
    how = ["times"] if times else []
    assert share.workload("manifest.py", "/tmp/tree", *how) == expected
    assert share.workload("manifest.py", f"{guest}/back", *how) == expected
    copied = manifest.tree(host / "back", times=times)
    assert copied == manifest.tree(host / "source", times=times)
    share.guest.check(f"rm -rf /tmp/tree {guest}/back", 120)
    assert not (host / "back").exists()


def large_file_goes_both_ways(share: Share, mebibytes: int) -> None:
    """A file goes from the share into the guest's memory and back; all three are equal."""
    host, guest = share.directory("large")
    with (host / "source").open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
    expected = manifest.file_sum(host / "source")
    share.guest.check(
        f"mkdir /tmp/large && mount -t tmpfs -o size={mebibytes + 8}m none /tmp/large"
    )
    share.guest.check(f"cp {guest}/source /tmp/large/copy", 120)
    assert share.guest.check("sha256sum </tmp/large/copy", 120).split()[0] == expected
    share.guest.check(f"cp /tmp/large/copy {guest}/back && umount /tmp/large", 120)
    assert manifest.file_sum(host / "back") == expected
    share.guest.check(f"rm {guest}/source {guest}/back; rmdir /tmp/large")
    assert os.listdir(host) == []


def awkward_names(share: Share) -> None:
    """Names made on either side are found, exactly, on the other."""
    host, guest = share.directory("names")
    (host / "host").mkdir()
    (host / "guest").mkdir()
    names.fill(os.fsencode(host / "host"))
    answer = share.workload("names.py", guest)
    assert answer == {"host": [], "guest": [], "256 bytes": "ENAMETOOLONG"}
    assert names.look(os.fsencode(host / "guest")) == []


def all_true(share: Share, workload: str) -> Path:
    """A workload that answers questions has a yes for each; the value is its directory."""
    host, guest = share.directory(workload.removesuffix(".py"))
    answers = share.workload(workload, guest)
    assert answers
    wrong = [question for question, answer in answers.items() if answer is not True]
    assert not wrong, wrong
    return host


def open_files_lose_their_names(share: Share) -> None:
    """Renaming over and unlinking open files leaves them readable; the host has the result."""
    host = all_true(share, "openfiles.py")
    assert sorted(path.name for path in host.iterdir()) == ["c", "target", "unlinked"]


def links_fifos_sockets_and_errors(share: Share) -> None:
    """Each kind of file works in the guest and is that kind on the host."""
    host = all_true(share, "kinds.py")
    assert os.readlink(host / "relative") == "file"
    assert len(os.readlink(host / "long")) == 4094
    assert (host / "fifo").is_fifo()
    assert (host / "socket").is_socket()
    assert (host / "second").read_text() == "content and more"


def metadata_reaches_the_host(share: Share) -> None:
    """Modes, owners and times set in the guest are on the host's files, to the nanosecond."""
    host, guest = share.directory("metadata")
    answer = share.workload("metadata.py", guest)
    assert [name for name, right in answer["asked"].items() if not all(right)] == []
    assert answer["seen"] == {
        path.name: metadata.seen(os.fspath(path)) for path in host.iterdir()
    }
    for number, (access, modification) in enumerate(metadata.TIMES):
        status = (host / f"times{number}").stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (access, modification)


def holes_stay_holes(share: Share) -> None:
    """A sparse file takes no space on the host and its data lies where the guest put it."""
    host = all_true(share, "sparse.py")
    status = (host / "sparse").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 <= 1 << 20
    with (host / "sparse").open("rb") as file:
        file.seek(1 << 29)
        assert file.read(7) == b"island\0"


def appends_keep_every_record(share: Share, records: int) -> None:
    """Two processes append at once: each record is there, whole, in its writer's order."""
    host, guest = share.directory("append")
    answer = share.workload("append.py", f"{guest}/log", str(records))
    assert answer == {"statuses": [0, 0], "problems": []}
    assert append.problems(host / "log", records) == []


def random_writes_are_read_back(share: Share, blocks: int) -> None:
    """Random writes, through the guest's cache and around it, are what the guest and host read."""
    host, guest = share.directory("random")
    for how in ("cached", "direct"):
        answer = share.workload("randomwrite.py", f"{guest}/{how}", str(blocks), how)
        assert answer["wrong"] == []
        assert manifest.file_sum(host / how) == answer["sha256"]


def smoke(share: Share) -> None:
    """Everything above, small."""
    tree_goes_both_ways(share, 200)
    large_file_goes_both_ways(share, 32)
    awkward_names(share)
    open_files_lose_their_names(share)
    links_fifos_sockets_and_errors(share)
    metadata_reaches_the_host(share)
    holes_stay_holes(share)
    appends_keep_every_record(share, 200)
    random_writes_are_read_back(share, 500)
