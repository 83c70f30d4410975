"""Run as a program: what code in a server can do, put there after it has entered its sandbox.

    attempts.py MODE SECCOMP SHARE OUTSIDE [FEATURE...]

For each attempt a process is forked as a server is, enters the sandbox, and tries. What came of it is printed
as JSON, by the attempt's name: "done", an errno's name, or the signal that ended it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from vfsd.sandbox import capabilities
from vfsd.sandbox.calls import numbers
from vfsd.sandbox.sandbox import Sandbox, Walls

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CALLS = numbers(os.uname().machine)
SUPERVISOR = os.getpid()

share = Path(sys.argv[3])
outside = Path(sys.argv[4])
features = sys.argv[5:]
root_fd = os.open(share, os.O_RDONLY | os.O_CLOEXEC)
is_directory = share.is_dir()
own = -1  # /proc/self/fd, in the server
Attempt = Callable[[], object]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    ATTEMPTS[function.__name__] = function
    return function


def call(name: str, *arguments: int | bytes | None) -> int:
    """That system call, by its number. OSError."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(libc.syscall(ctypes.c_long(CALLS[name]), *converted))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# What was there before the sandbox.
inherited = os.open("/", os.O_RDONLY)
secret = outside / "secret"
inside_fd = -1
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
abstract = socket.socket(socket.AF_UNIX)
abstract.bind(f"\0vfsd-test-{os.getpid()}")
abstract.listen()
ADDRESS, ABSTRACT_ADDRESS = listener.getsockname(), abstract.getsockname()
memory = ctypes.create_string_buffer(8)
MEMORY = struct.pack("=QQ", ctypes.addressof(memory), 8)  # struct iovec


def handle_of(path: Path) -> bytes:
    """struct file_handle of a file, or an empty one where its file system has none."""
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    found = libc.name_to_handle_at(-100, os.fsencode(path), buffer, ctypes.byref(mount_id), 0)
    return buffer.raw if found == 0 else b""


handle = handle_of(secret)


# --- paths ---


@attempt
def open_a_path() -> None:
    os.open(secret, os.O_RDONLY)


@attempt
def open_the_password_file() -> None:
    os.open("/etc/passwd", os.O_RDONLY)


@attempt
def climb_from_the_share() -> None:
    os.open("../" * 12 + str(secret)[1:], os.O_RDONLY, dir_fd=root_fd)


@attempt
def climb_from_proc() -> None:
    os.open("../../../" + str(secret)[1:], os.O_RDONLY, dir_fd=own)


@attempt
def open_the_rest_of_proc() -> None:
    os.open("../../sys/kernel/core_pattern", os.O_RDONLY, dir_fd=own)


@attempt
def climb_from_a_subdirectory() -> None:
    below = os.open("sub", os.O_PATH | os.O_DIRECTORY, dir_fd=root_fd)
    os.open("../../" + outside.name + "/secret", os.O_RDONLY, dir_fd=below)


@attempt
def follow_an_absolute_symlink() -> None:
    os.open("absolute", os.O_RDONLY, dir_fd=root_fd)


@attempt
def follow_a_relative_symlink() -> None:
    os.open("relative", os.O_RDONLY, dir_fd=root_fd)


@attempt
def follow_a_symlink_to_proc() -> None:
    os.open("magic", os.O_RDONLY, dir_fd=root_fd)


@attempt
def use_an_inherited_directory() -> None:
    os.open(str(secret)[1:], os.O_RDONLY, dir_fd=inherited)


@attempt
def reopen_an_inherited_directory() -> None:
    os.open(f"{inherited}/{secret}", os.O_RDONLY, dir_fd=own)


@attempt
def rename_out() -> None:
    os.rename("file", str(outside / "moved"), src_dir_fd=root_fd)


@attempt
def link_in() -> None:
    os.link(secret, "linked", dst_dir_fd=root_fd)


@attempt
def make_outside() -> None:
    os.mkdir(outside / "made")


@attempt
def remove_outside() -> None:
    os.unlink(secret)


@attempt
def open_a_device_node() -> None:
    os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3), dir_fd=root_fd)
    try:
        os.open("null", os.O_RDONLY, dir_fd=root_fd)
    finally:
        os.unlink("null", dir_fd=root_fd)


@attempt
def open_by_handle() -> None:
    if not handle:
        raise OSError(errno.EOPNOTSUPP, "")
    os.close(call("open_by_handle_at", root_fd, handle, os.O_RDONLY))


@attempt
def leave_the_root() -> None:
    call("chroot", b".")


# --- mounts and namespaces ---


@attempt
def mount_a_file_system() -> None:
    call("mount", b"none", b"/", b"tmpfs", 0, None)


@attempt
def open_a_mount_of_its_own() -> None:
    os.close(call("fsopen", b"proc", 0))


@attempt
def unmount_the_share() -> None:
    call("umount2", b"/", 2)


@attempt
def copy_a_mount() -> None:
    os.close(call("open_tree", -100, b"/", 1))


@attempt
def pivot() -> None:
    call("pivot_root", b"/", b"/")


@attempt
def make_a_user_namespace() -> None:
    call("unshare", 0x10000000)


@attempt
def make_a_mount_namespace() -> None:
    call("unshare", 0x20000)


@attempt
def enter_a_namespace() -> None:
    call("setns", root_fd, 0)


# --- programs and processes ---


@attempt
def run_a_program() -> None:
    os.execv("/bin/true", ["true"])


@attempt
def run_a_program_of_the_share() -> None:
    os.execve(inside_fd, ["program"], {})


@attempt
def run_a_program_in_memory() -> None:
    memory = os.memfd_create("program")
    os.write(memory, b"#!/bin/true\n")
    call("execveat", memory, b"", None, None, 0x1000)


@attempt
def start_a_process() -> None:
    if call("clone", signal.SIGCHLD, None, None, None, None) == 0:
        os._exit(0)


@attempt
def start_a_process_by_clone3() -> None:
    arguments = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    if call("clone3", arguments, len(arguments)) == 0:
        os._exit(0)


@attempt
def start_a_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


@attempt
def signal_the_supervisor() -> None:
    os.kill(SUPERVISOR, 0)


@attempt
def signal_a_thread_of_the_supervisor() -> None:
    call("tgkill", SUPERVISOR, SUPERVISOR, 0)


@attempt
def trace_the_supervisor() -> None:
    call("ptrace", 16, SUPERVISOR, None, None)  # PTRACE_ATTACH


@attempt
def read_the_supervisors_memory() -> None:
    call("process_vm_readv", SUPERVISOR, MEMORY, 1, MEMORY, 1, 0)


@attempt
def name_the_supervisor() -> None:
    os.close(call("pidfd_open", SUPERVISOR, 0))


@attempt
def map_code() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)


@attempt
def become_dumpable() -> None:
    call("prctl", 4, 1, 0, 0, 0)


@attempt
def catch_its_refusals() -> None:
    call("rt_sigaction", signal.SIGSYS, bytes(32), None, 8)


@attempt
def take_back_a_capability() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    call("capset", header, struct.pack("=6I", 1 << 21, 1 << 21, 0, 0, 0, 0))


# --- the network and the kernel ---


@attempt
def open_a_socket() -> None:
    socket.socket().close()


@attempt
def reach_the_hosts_network() -> None:
    with socket.socket() as sock:
        sock.connect(ADDRESS)


@attempt
def reach_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(ABSTRACT_ADDRESS)


@attempt
def load_a_kernel_program() -> None:
    call("bpf", 0, None, 0)


@attempt
def set_up_io_uring() -> None:
    os.close(call("io_uring_setup", 1, bytes(120)))


@attempt
def use_a_keyring() -> None:
    call("keyctl", 0, -1, 1)


@attempt
def type_into_a_terminal() -> None:
    fcntl.ioctl(2, 0x5412, b"x")  # TIOCSTI


@attempt
def make_an_unknown_call() -> None:
    if libc.syscall(ctypes.c_long(1000)) < 0:
        raise OSError(ctypes.get_errno(), "")


@attempt
def make_a_call_of_x32() -> None:
    if libc.syscall(ctypes.c_long(0x40000000 | 39)) < 0:
        raise OSError(ctypes.get_errno(), "")


def outcome(sandbox: Sandbox, function: Attempt, report: int) -> str:
    global own
    told, tell = os.pipe()
    pid = sandbox.fork()
    if pid == 0:
        result = "not entered"
        try:
            sandbox.enter({1, 2, tell, report, inside_fd}, (report, b""))
            own = sandbox.own_descriptors
            try:
                function()
                result = "done"
            except OSError as problem:
                result = errno.errorcode.get(problem.errno or 0, "?")
        finally:
            os.write(tell, result.encode())
            os._exit(0)
    os.close(tell)
    _, status = os.waitpid(pid, 0)
    with open(told) as said:
        result = said.read()
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else result


def main() -> None:
    global inside_fd
    mode, action = sys.argv[1:3]
    handles = "handles" in features
    walls = Walls(mode, action, capabilities.kept(file_handles=handles), handles)  # type: ignore[arg-type]
    sandbox = Sandbox(walls, root_fd)
    sandbox.prepare()
    if is_directory:
        inside_fd = os.open(share / "program", os.O_RDONLY)
    results = {}
    for name, function in ATTEMPTS.items():
        report, tell = os.pipe()
        results[name] = outcome(sandbox, function, tell)
        os.close(tell)
        with open(report) as said:
            if number := said.read():
                results[name] += f" {number}"
    sandbox.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
