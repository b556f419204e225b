/* virtio-balloon (virtio-v1.3 §5.5): memory the guest does without goes back to the host. */
#ifndef VMM_BALLOON_H
#define VMM_BALLOON_H

#include "pagemap.h"
#include "service.h"
#include "timer.h"

/* cdef: begin */

/* What a queue is for; the numbers are the specification's queue indices. */
enum {
	VMM_BALLOON_INFLATE,
	VMM_BALLOON_DEFLATE,
	VMM_BALLOON_STATS,
	VMM_BALLOON_HINT,
	VMM_BALLOON_REPORT,
	VMM_BALLOON_NR_QUEUES,
};

enum { VMM_BALLOON_MAX_STATS = 32, VMM_BALLOON_PAGE = 4096 };

/* virtio-v1.3 §5.5.6.3 */
struct vmm_balloon_stat {
	uint16_t tag;
	uint64_t value;
};

/* Since the device was made. Bytes, and for `ignored` the pages named that are not RAM. */
struct vmm_balloon_counts {
	uint64_t inflated, reported, ignored, failed;
};

struct vmm_balloon;

/* mem is borrowed. NULL with errno set. */
struct vmm_balloon *vmm_balloon_create(struct vmm_loop *loop, const struct vmm_mem *mem,
				       uint16_t queue_size);
void vmm_balloon_destroy(struct vmm_balloon *balloon);
/* role: what the queue is for. tells: the driver says when it takes a page back, before it does
 * (VIRTIO_BALLOON_F_MUST_TELL_HOST). */
int vmm_balloon_start(struct vmm_balloon *balloon, const struct vmm_service_config *config,
		      uint32_t role, int tells);
void vmm_balloon_stop_queue(struct vmm_balloon *balloon, uint32_t role);
/* All of them; the balloon is empty then. */
void vmm_balloon_stop(struct vmm_balloon *balloon);

/* The rest: any thread. */

/* Reported pages keep what is in them: the guest relies on it (poisoning). */
void vmm_balloon_keep_reported(struct vmm_balloon *balloon, int keep);
/* Nobody waits any more, now or later. */
void vmm_balloon_cancel(struct vmm_balloon *balloon);
/* Ask the driver for statistics now. */
void vmm_balloon_ask(struct vmm_balloon *balloon);
/* And every period_ms from now on, unless it is 0. */
void vmm_balloon_every(struct vmm_balloon *balloon, uint32_t period_ms);
/* How many answers there were. */
uint64_t vmm_balloon_answers(struct vmm_balloon *balloon);
/* Waits until there are more than `answers`; 0, -ETIMEDOUT or -ECANCELED. */
int vmm_balloon_wait(struct vmm_balloon *balloon, uint64_t answers, int timeout_ms);
/* The last answer; returns how many of its (at most VMM_BALLOON_MAX_STATS) entries. */
uint32_t vmm_balloon_stats(struct vmm_balloon *balloon, struct vmm_balloon_stat *out);
void vmm_balloon_counts(struct vmm_balloon *balloon, struct vmm_balloon_counts *out);

/* Collect what the driver says is free under this command id, from nothing; id 0 stops. -ENOMEM. */
int vmm_balloon_collect(struct vmm_balloon *balloon, uint32_t id);
/* Waits until the driver said all there is; 0, -ETIMEDOUT, or -ECANCELED when nothing is collected
 * (any more: a reset ends it). */
int vmm_balloon_collected(struct vmm_balloon *balloon, int timeout_ms);
/* The first run of hinted pages at or above gpa: 1, or 0 when there are no more. */
int vmm_balloon_hinted(struct vmm_balloon *balloon, uint64_t gpa, uint64_t *start, uint64_t *len);

/* cdef: end */

/* The rest is between balloon.c and balloon_says.c. */

enum { VMM_HINT_STOPPED, VMM_HINT_ASKED, VMM_HINT_STARTED, VMM_HINT_DONE };

struct vmm_balloon_queue {
	struct vmm_service service; /* first */
	struct vmm_balloon *balloon;
	struct vmm_chain chain;
	struct iovec *iov;
	bool busy;	 /* the chain is being worked on, or held for statistics */
	uint64_t offset; /* what is done of it, in bytes */
	uint64_t spent;	 /* of this turn */
};

struct vmm_balloon {
	struct vmm_timer timer; /* first: for the next statistics */
	atomic_uint period_ms;
	struct vmm_balloon_queue queues[VMM_BALLOON_NR_QUEUES];
	struct vmm_loop *loop;
	const struct vmm_mem *mem;
	uint16_t queue_size;
	/* With pages larger than 4 KiB and a driver that tells: which parts are in the balloon. A
	 * host page goes once all of it is. */
	struct vmm_pagemap *parts;
	atomic_bool keep_reported;
	bool asked; /* for statistics */
	_Atomic uint64_t inflated, reported, ignored, failed;

	pthread_mutex_t lock; /* what follows */
	pthread_cond_t cond;
	bool canceled;
	uint64_t answers;
	uint32_t nr_stats;
	struct vmm_balloon_stat stats[VMM_BALLOON_MAX_STATS];
	uint32_t hint_id;
	int hint_state;
	struct vmm_pagemap *hints;
};

/* Takes the next chain unless one is at hand. */
int vmm_balloon_take(struct vmm_balloon_queue *q);
/* Each returns what `serve` shall: after giving the chain back, or breaking the queue. */
int vmm_balloon_finish(struct vmm_balloon_queue *q);
int vmm_balloon_refuse(struct vmm_balloon_queue *q);
/* Whether others shall have a turn now; then the service comes again by itself. */
bool vmm_balloon_tired(struct vmm_balloon_queue *q, uint64_t cost, uint64_t limit);
/* The guest address of a buffer that vmm_vq_pop() found in RAM. */
bool vmm_balloon_address(const struct vmm_balloon *b, const struct iovec *iov, uint64_t *gpa);

int vmm_balloon_serve_stats(struct vmm_service *s);
int vmm_balloon_serve_hint(struct vmm_service *s);
/* The timer's `expired`. */
void vmm_balloon_tick(struct vmm_timer *timer);
/* The driver is gone, and with it what it hinted. */
void vmm_balloon_forget_hints(struct vmm_balloon *b);

#endif
