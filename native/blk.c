/* virtio-blk: a disk and its queues. virtio-v1.3 §5.2. What a queue does is in blk_queue.c, what a
 * driver may ask for in blk_request.c, the file I/O in blk_io.c. */
#define _GNU_SOURCE
#include "blk.h"

#include "blk_queue.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>

static int check_config(const struct vmm_blk_config *c)
{
	if (c->align & (c->align - 1) || c->block & (c->block - 1) || c->block < VMM_BLK_SECTOR ||
	    c->size > (uint64_t)INT64_MAX - c->block || !c->queue_size || c->queue_size > IOV_MAX ||
	    !c->queues)
		return -EINVAL;
	return 0;
}

struct vmm_blk *vmm_blk_create(struct vmm_loop **loops, const struct vmm_blk_config *config)
{
	struct vmm_blk *blk = NULL;
	int rc = check_config(config);

	if (!rc) {
		blk = calloc(1, sizeof(*blk) + config->queues * sizeof(blk->queues[0]));
		rc = blk ? 0 : -ENOMEM;
	}
	if (!rc) {
		blk->file.config = *config;
		blk->file.size = config->size;
		pthread_mutex_init(&blk->lock, NULL);
		blk->write_back = config->write_back;
		blk->file.pool = vmm_pool_create(VMM_BLK_WORKERS);
		rc = blk->file.pool ? 0 : -ENOMEM;
	}
	for (uint32_t i = 0; !rc && i < config->queues; i++) {
		blk->nr_queues++;
		rc = vmm_blk_queue_init(&blk->queues[i], blk, loops[i]);
	}
	if (!rc)
		return blk;
	vmm_blk_destroy(blk);
	errno = -rc;
	return NULL;
}

void vmm_blk_destroy(struct vmm_blk *blk)
{
	if (!blk)
		return;
	for (uint32_t i = 0; i < blk->nr_queues; i++)
		vmm_service_stop(&blk->queues[i].service);
	vmm_pool_destroy(blk->file.pool);
	for (uint32_t i = 0; i < blk->nr_queues; i++)
		vmm_blk_queue_fini(&blk->queues[i]);
	pthread_mutex_destroy(&blk->lock);
	free(blk);
}

int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config)
{
	if (config->index >= blk->nr_queues)
		return -EINVAL;
	return vmm_blk_queue_start(&blk->queues[config->index], config);
}

void vmm_blk_stop(struct vmm_blk *blk)
{
	for (uint32_t i = 0; i < blk->nr_queues; i++)
		vmm_service_stop(&blk->queues[i].service);
	__atomic_store_n(&blk->write_back, blk->file.config.write_back, __ATOMIC_RELAXED);
}

void vmm_blk_stop_queue(struct vmm_blk *blk, uint32_t index)
{
	if (index < blk->nr_queues)
		vmm_service_stop(&blk->queues[index].service);
}

void vmm_blk_resize(struct vmm_blk *blk, uint64_t size)
{
	__atomic_store_n(&blk->file.size, size, __ATOMIC_RELAXED);
}

void vmm_blk_write_back(struct vmm_blk *blk, int on)
{
	__atomic_store_n(&blk->write_back, on, __ATOMIC_RELAXED);
}

void vmm_blk_limit(struct vmm_blk *blk, uint64_t bps, uint64_t bps_burst, uint64_t iops,
		   uint64_t iops_burst)
{
	pthread_mutex_lock(&blk->lock);
	vmm_bucket_set(&blk->bytes, bps, bps_burst);
	vmm_bucket_set(&blk->requests, iops, iops_burst);
	pthread_mutex_unlock(&blk->lock);
	__atomic_store_n(&blk->limited, bps || iops, __ATOMIC_RELAXED);
	for (uint32_t i = 0; i < blk->nr_queues; i++)
		vmm_blk_queue_limits(&blk->queues[i]);
}

void vmm_blk_retry(struct vmm_blk *blk)
{
	for (uint32_t i = 0; i < blk->nr_queues; i++)
		vmm_blk_queue_retry(&blk->queues[i]);
}

int vmm_blk_error(const struct vmm_blk *blk)
{
	return __atomic_load_n(&blk->error, __ATOMIC_RELAXED);
}

void vmm_blk_stats(const struct vmm_blk *blk, struct vmm_blk_stats *out)
{
	uint64_t *to = (uint64_t *)out;

	*out = (struct vmm_blk_stats){ 0 };
	for (uint32_t q = 0; q < blk->nr_queues; q++) {
		const uint64_t *from = (const uint64_t *)&blk->queues[q].stats;

		for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
			to[i] += __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	}
}

int vmm_blk_async(const struct vmm_blk *blk)
{
	return blk->queues[0].io.async;
}
