/* A bounded pool of worker threads, first come, first served. */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <stdlib.h>

struct vmm_pool {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	struct vmm_job *first, **last;
	uint32_t most, nr, idle, queued;
	bool stop;
	pthread_t threads[];
};

static void *work(void *arg)
{
	struct vmm_pool *pool = arg;
	struct vmm_job *job;

	pthread_setname_np(pthread_self(), "vmm-work");
	pthread_mutex_lock(&pool->lock);
	for (;;) {
		while (!pool->first && !pool->stop) {
			pool->idle++;
			pthread_cond_wait(&pool->cond, &pool->lock);
			pool->idle--;
		}
		job = pool->first;
		if (!job)
			break;
		pool->first = job->next;
		if (!pool->first)
			pool->last = &pool->first;
		pool->queued--;
		pthread_mutex_unlock(&pool->lock);
		job->run(job);
		pthread_mutex_lock(&pool->lock);
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

struct vmm_pool *vmm_pool_create(uint32_t most)
{
	struct vmm_pool *pool = calloc(1, sizeof(*pool) + most * sizeof(pool->threads[0]));

	if (!pool)
		return NULL;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->cond, NULL);
	pool->last = &pool->first;
	pool->most = most;
	return pool;
}

void vmm_pool_destroy(struct vmm_pool *pool)
{
	if (!pool)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stop = true;
	pthread_cond_broadcast(&pool->cond);
	pthread_mutex_unlock(&pool->lock);
	for (uint32_t i = 0; i < pool->nr; i++)
		pthread_join(pool->threads[i], NULL);
	pthread_cond_destroy(&pool->cond);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
}

void vmm_pool_submit(struct vmm_pool *pool, struct vmm_job *job)
{
	bool alone = false;

	job->next = NULL;
	pthread_mutex_lock(&pool->lock);
	if (pool->idle <= pool->queued && pool->nr < pool->most) {
		if (!vmm_thread_start(&pool->threads[pool->nr], work, pool))
			pool->nr++;
		else
			alone = !pool->nr;
	}
	if (!alone) {
		*pool->last = job;
		pool->last = &job->next;
		pool->queued++;
		pthread_cond_signal(&pool->cond);
	}
	pthread_mutex_unlock(&pool->lock);
	if (alone)
		job->run(job);
}
