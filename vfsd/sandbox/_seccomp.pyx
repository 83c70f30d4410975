"""seccomp(2), and what a refused system call leaves behind."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from vfsd.sys cimport _syscalls as h

import os

__all__ = ("action_available", "install", "report_to")

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #ifndef SYS_SECCOMP
    #define SYS_SECCOMP 1 /* si_code, else somebody has sent the signal */
    #endif
    enum { PREFIX_BYTES_MAX = 64, DIGITS_MAX = 10 };

    static struct {
        int fd;          /* where to tell of a refused call */
        size_t length;   /* of what comes before its number */
        char text[PREFIX_BYTES_MAX + DIGITS_MAX];
    } report;

    /* In the thread that made the call, which was not done. Other threads run on until it is over: the call
     * at the end is one for which every filter of ours ends the process.
     */
    static void on_refused(int number, siginfo_t *info, void *context)
    {
        char digits[DIGITS_MAX];
        size_t n = 0, length = report.length;
        unsigned int call = (unsigned int)info->si_syscall;
        (void)number;
        (void)context;
        do {
            digits[n++] = (char)('0' + call % 10);
            call /= 10;
        } while (call && n < sizeof(digits));
        while (n)
            report.text[length++] = digits[--n];
        if (info->si_code == SYS_SECCOMP)
            (void)write(report.fd, report.text, length); /* it may be that nobody reads it any more */
        syscall(SYS_kexec_load, 0ul, 0ul, NULL, 0ul);
    }

    static int catch_refused(void)
    {
        struct sigaction action;
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = on_refused;
        action.sa_flags = SA_SIGINFO;
        sigfillset(&action.sa_mask);
        sigdelset(&action.sa_mask, SIGSYS);
        return sigaction(SIGSYS, &action, NULL);
    }
    """
    struct sock_filter:
        pass
    struct sock_fprog:
        unsigned short len
        sock_filter *filter
    const size_t PREFIX_BYTES_MAX
    int catch_refused()
    int report_fd "report.fd"
    size_t report_length "report.length"
    char *report_text "report.text"
    long SYS_seccomp
    unsigned int SECCOMP_SET_MODE_FILTER
    unsigned int SECCOMP_GET_ACTION_AVAIL
    unsigned int SECCOMP_FILTER_FLAG_SPEC_ALLOW


def action_available(uint32_t action):
    return h.syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0


def report_to(int fd, bytes prefix not None):
    global report_fd, report_length
    if <size_t>len(prefix) > PREFIX_BYTES_MAX:
        raise ValueError(prefix)
    report_fd = fd
    report_length = len(prefix)
    memcpy(report_text, <const char *>prefix, len(prefix))
    if catch_refused() < 0:
        raise OSError(errno, os.strerror(errno))


def install(bytes program not None):
    cdef sock_fprog prog
    prog.len = <unsigned short>(len(program) // sizeof(sock_filter))
    prog.filter = <sock_filter *><const char *>program
    # What a process can learn of its own memory by speculation is its own guest's.
    if h.syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &prog) < 0:
        raise OSError(errno, os.strerror(errno))
