/* Of debug builds: where a server kills itself, so that tests see what the next one makes of it. */
#ifndef VFSD_FAILPOINT_H
#define VFSD_FAILPOINT_H

#include <stdint.h>

/* By the request of that opcode which gets to that stage after `skip` others. In shared memory. */
typedef struct {
	int deaths; /* that are still to come */
	int crash;  /* by SIGABRT, not SIGKILL */
	int stage;
	uint32_t opcode;
	uint32_t skip;
} failpoint_t;

enum {
	FAIL_TAKEN = 1, /* from the ring, and nothing is done */
	FAIL_BEGUN,     /* its witness is written */
	FAIL_RAN,       /* it is done, and nobody knows */
	FAIL_DONE,      /* its record says so */
	FAIL_PUSHED,    /* the guest has its reply, the record is still there */
	FAIL_CLEARED,
	FAIL_STAGES = FAIL_CLEARED
};

#ifdef NDEBUG
#define reach(failpoint, stage, opcode) ((void)(failpoint), (void)(stage), (void)(opcode))
#else
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline void reach(failpoint_t *f, int stage, uint32_t opcode)
{
	if (!f || __atomic_load_n(&f->deaths, __ATOMIC_ACQUIRE) == 0 || f->stage != stage || f->opcode != opcode)
		return;
	if (__atomic_load_n(&f->skip, __ATOMIC_ACQUIRE) > 0) {
		__atomic_fetch_sub(&f->skip, 1, __ATOMIC_ACQ_REL);
		return;
	}
	__atomic_fetch_sub(&f->deaths, 1, __ATOMIC_ACQ_REL);
	syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), f->crash ? SIGABRT : SIGKILL);
	for (;;)
		pause();
}
#endif

#endif
