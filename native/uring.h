/* A small io_uring: files that were registered, a few operations, nothing else. One thread at a
 * time uses one. No library needed: io_uring(7). */
#ifndef VMM_URING_H
#define VMM_URING_H

#include "core.h"

#include <linux/io_uring.h>

struct vmm_uring {
	int fd; /* readable (epoll) while completions wait */
	uint32_t *sq_tail, *cq_head, *cq_tail;
	uint32_t sq_mask, cq_mask, entries;
	uint32_t *sq_array;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	uint32_t queued; /* prepared, not yet submitted */
	uint32_t tail;	 /* ours, of the submission queue */
	void *rings;
	size_t rings_len, sqes_len;
};

/* 0 or -errno: not every host allows io_uring. Only `ops` (nr of them) on `files` will work. */
int vmm_uring_init(struct vmm_uring *u, uint32_t entries, const int *files, uint32_t nr_files,
		   const uint8_t *ops, uint32_t nr_ops);
void vmm_uring_fini(struct vmm_uring *u);
/* A zeroed entry to fill, or NULL when `entries` are queued; submit first, then. */
struct io_uring_sqe *vmm_uring_queue(struct vmm_uring *u);
/* Hands over what is queued and waits for at least `wait` completions; 0 or -errno. */
int vmm_uring_submit(struct vmm_uring *u, uint32_t wait);
/* Takes back what is queued and not submitted. */
void vmm_uring_forget(struct vmm_uring *u);
/* The next completion: false when there is none. */
bool vmm_uring_reap(struct vmm_uring *u, uint64_t *user_data, int32_t *res);

#endif
