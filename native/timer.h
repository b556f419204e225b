/* One-shot timers of an I/O thread. */
#ifndef VMM_TIMER_H
#define VMM_TIMER_H

#include "core.h"

/* Embed it. `expired` runs on the I/O thread; so must whoever sets the timer, or hold a lock that
 * `expired` takes. */
struct vmm_timer {
	struct vmm_source source;
	struct vmm_loop *loop;
	bool set;
	void (*expired)(struct vmm_timer *timer);
};

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t vmm_now(void);

/* 0 or -errno. */
int vmm_timer_init(struct vmm_timer *timer, struct vmm_loop *loop,
		   void (*expired)(struct vmm_timer *timer));
/* Afterwards `expired` does not run any more. Harmless on one that is all zero. */
void vmm_timer_fini(struct vmm_timer *timer);
/* Expires once, ns from now; replaces what was set. 0: never. */
void vmm_timer_set(struct vmm_timer *timer, uint64_t ns);

#endif
