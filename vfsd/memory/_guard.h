/* Memory of files that somebody else can cut off: touching a page that is no longer there must not end
 * the process.
 *
 * A copy between the window and a buffer is guarded: SIGBUS (or SIGSEGV, where nothing is mapped) inside
 * of it jumps out, and the copy is short. A sigsetjmp costs 10 ns; process_vm_readv or /proc/self/mem
 * would do without a handler, but cost a system call and a page walk for every 4 KiB.
 *
 * Where no jump is possible, or nothing may be paid for it, the handler puts zeroes into the place of what is
 * missing, and the access goes on. In a view that is read by code not ours that is one page, which is counted.
 * In a guest's memory in the daemon it is the whole area, at its first missing page: page by page, the
 * mappings would come to vm.max_map_count. That guest can't be served any more: the guard's flag says so to
 * the threads that serve it, and its socket is shut for reading, so that its owner wakes up.
 *
 * Any other SIGBUS or SIGSEGV goes to whoever handled it before.
 */
#ifndef VFSD_GUARD_H
#define VFSD_GUARD_H

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define GUARD_PAGE ((uintptr_t)4096)

/* What a guest's memory is guarded by; belongs to all that is mapped of it. */
struct guard {
    int users;
    int sock; /* -1: none any more */
    int torn; /* something was missing */
};

/* Watched memory. Never freed, so that the handler can walk the list; used again when end is 0. */
struct guard_area {
    _Atomic uintptr_t start, end;
    int prot;
    struct guard *guard; /* NULL: page by page */
    _Atomic uint64_t torn; /* pages that were replaced, of an area without */
    struct guard_area *next;
};

static _Atomic(struct guard_area *) guard_areas;
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction guard_before_bus, guard_before_segv;

/* What this thread copies now. */
static __thread sigjmp_buf *volatile guard_jump __attribute__((tls_model("initial-exec")));
static __thread uintptr_t guard_start __attribute__((tls_model("initial-exec")));
static __thread uintptr_t guard_end __attribute__((tls_model("initial-exec")));

static inline int guard_cover(uintptr_t start, uintptr_t end, int prot)
{
    return mmap((void *)start, end - start, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1,
                0) == MAP_FAILED ? -1 : 0;
}

static inline int guard_tear(uintptr_t at)
{
    struct guard_area *a = atomic_load(&guard_areas);
    for (; a; a = a->next) {
        uintptr_t start = atomic_load(&a->start), end = atomic_load(&a->end);
        if (at < start || at >= end)
            continue;
        if (a->guard == NULL) {
            if (guard_cover(at & ~(GUARD_PAGE - 1), (at & ~(GUARD_PAGE - 1)) + GUARD_PAGE, a->prot) < 0)
                return 0;
            atomic_fetch_add(&a->torn, 1);
            return 1;
        }
        /* First the flag: nobody shall take the zeroes for a guest's. */
        __atomic_store_n(&a->guard->torn, 1, __ATOMIC_SEQ_CST);
        if (guard_cover(start, end, a->prot) < 0) {
            if (getpid() == gettid())
                return 0; /* nobody would be left to end the connection */
            shutdown(__atomic_load_n(&a->guard->sock, __ATOMIC_RELAXED), SHUT_RD);
            for (;;) /* this thread can't go on; the others can */
                pause();
        }
        shutdown(__atomic_load_n(&a->guard->sock, __ATOMIC_RELAXED), SHUT_RD);
        return 1;
    }
    return 0;
}

static void guard_handler(int number, siginfo_t *info, void *context)
{
    int error = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    struct sigaction *before = number == SIGBUS ? &guard_before_bus : &guard_before_segv;
    if (info->si_code > 0) { /* from the kernel, with an address */
        if (guard_jump && at >= guard_start && at < guard_end)
            siglongjmp(*guard_jump, 1);
        if (number == SIGBUS && guard_tear(at)) {
            errno = error;
            return;
        }
    }
    if (before->sa_flags & SA_SIGINFO)
        before->sa_sigaction(number, info, context);
    else if (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN)
        before->sa_handler(number);
    else {
        sigaction(number, before, NULL); /* the access is made again, and ends the process */
        if (info->si_code <= 0)
            raise(number);
    }
}

/* Once for the process; it stays. 0 or -1 and errno. */
static inline int guard_install(void)
{
    static int installed;
    struct sigaction ours;
    int rc = 0;
    memset(&ours, 0, sizeof(ours));
    ours.sa_sigaction = guard_handler;
    /* Not blocked within, because a jump does not unblock. */
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    pthread_mutex_lock(&guard_lock);
    if (!installed) {
        rc = sigaction(SIGBUS, &ours, &guard_before_bus);
        if (rc == 0)
            rc = sigaction(SIGSEGV, &ours, &guard_before_segv);
        installed = rc == 0;
    }
    pthread_mutex_unlock(&guard_lock);
    return rc;
}

/* Bytes copied before the first page of the window that is not there. `window` is from or to. */
static inline size_t guard_copy(char *to, const char *from, size_t n, const char *window)
{
    sigjmp_buf jump;
    volatile size_t done = 0;
    guard_start = (uintptr_t)window;
    guard_end = (uintptr_t)window + n;
    if (sigsetjmp(jump, 0) == 0) {
        guard_jump = &jump;
        while (done < n) {
            size_t left = GUARD_PAGE - ((uintptr_t)(window + done) & (GUARD_PAGE - 1));
            size_t part = left < n - done ? left : n - done;
            memcpy(to + done, from + done, part);
            atomic_signal_fence(memory_order_seq_cst);
            done += part;
        }
    }
    guard_jump = NULL;
    return done;
}

/* NULL: no memory. */
static inline struct guard_area *guard_watch(char *start, size_t size, int prot, struct guard *guard)
{
    struct guard_area *a;
    pthread_mutex_lock(&guard_lock);
    for (a = atomic_load(&guard_areas); a && atomic_load(&a->end); a = a->next)
        ;
    if (a == NULL && (a = calloc(1, sizeof(*a))) != NULL) {
        a->next = atomic_load(&guard_areas);
        atomic_store(&guard_areas, a);
    }
    if (a != NULL) {
        a->prot = prot;
        a->guard = guard;
        atomic_store(&a->torn, 0);
        atomic_store(&a->start, (uintptr_t)start);
        atomic_store(&a->end, (uintptr_t)start + size);
    }
    pthread_mutex_unlock(&guard_lock);
    return a;
}

static inline void guard_forget(struct guard_area *a)
{
    pthread_mutex_lock(&guard_lock);
    atomic_store(&a->start, UINTPTR_MAX);
    atomic_store(&a->end, 0);
    pthread_mutex_unlock(&guard_lock);
}

static inline uint64_t guard_torn(struct guard_area *a)
{
    return atomic_load(&a->torn);
}

#endif
