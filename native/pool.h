/* Threads for what a kernel only does by making the caller wait. */
#ifndef VMM_POOL_H
#define VMM_POOL_H

#include "core.h"

/* Embed it. `run` is called once per submission, on some worker. */
struct vmm_job {
	void (*run)(struct vmm_job *job);
	struct vmm_job *next; /* the pool's */
};

struct vmm_pool;

/* Workers start when there is something to do, `most` of them at most. NULL with errno. */
struct vmm_pool *vmm_pool_create(uint32_t most);
/* Joins the workers; no job is left. */
void vmm_pool_destroy(struct vmm_pool *pool);
/* Any thread. Where no worker can be had at all, the job is run before this returns. */
void vmm_pool_submit(struct vmm_pool *pool, struct vmm_job *job);

#endif
