__all__ = ("action_available", "install", "report_to")

def action_available(action: int) -> bool:
    """Whether the kernel has SECCOMP_RET_*."""

def report_to(fd: int, prefix: bytes) -> None:
    """Write prefix and number of the first refused call to that descriptor, then end the process by SIGSYS.

    For a filter that answers SECCOMP_RET_TRAP, and ends the process at kexec_load(2).
    """

def install(program: bytes) -> None:
    """Of `struct sock_filter`, for this thread and those it starts. OSError."""
