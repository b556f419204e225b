/* virtio-fs: the device, its queues and its threads. What requests mean is in fs_*.c. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- a request ends ---- */

/* With the service's lock held. */
static void push(struct fs_queue *q, struct fs_request *r, int rc)
{
	struct fuse_out_header out = { .unique = r->in.unique };

	if (rc == FS_SILENT) {
		vmm_vq_push(q->service.vq, &r->chain, 0);
	} else {
		out.error = rc;
		out.len = (uint32_t)sizeof(out) + (rc ? 0 : r->out_len);
		vmm_iov_write(r->out, r->nr_out, 0, &out, sizeof(out));
		vmm_vq_push(q->service.vq, &r->chain, out.len);
	}
	r->next = q->free;
	q->free = r;
	q->busy--;
}

void fs_finish(struct fs_request *r, int rc)
{
	struct fs_queue *q = r->queue;

	if (rc < 0)
		__atomic_fetch_add(&q->fs->errors, 1, __ATOMIC_RELAXED);
	pthread_mutex_lock(&q->service.lock);
	push(q, r, rc);
	vmm_service_notify(&q->service);
	pthread_cond_signal(&q->idle);
	pthread_mutex_unlock(&q->service.lock);
}

static void work(struct vmm_job *job)
{
	struct fs_request *r = (struct fs_request *)job; /* its first member */
	struct vmm_fs *fs = r->queue->fs;
	int rc;

	fs_thread_enter(fs);
	r->worker = true;
	rc = fs_dispatch(fs, r);
	if (rc != FS_PARKED)
		fs_finish(r, rc);
}

void fs_to_worker(struct vmm_fs *fs, struct fs_request *r)
{
	r->job.run = work;
	vmm_pool_submit(fs->pool, &r->job);
}

/* ---- a request begins ---- */

/* No answer is expected, and Linux leaves no room for one. */
static bool silent(uint32_t opcode)
{
	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT;
}

static bool parse(struct fs_request *r)
{
	const struct vmm_chain *c = &r->chain;
	uint64_t room;

	if (c->read_len < sizeof(r->in))
		return false;
	vmm_iov_read(c->iov, c->nr_read, 0, &r->in, sizeof(r->in));
	if (c->write_len < sizeof(struct fuse_out_header) && !silent(r->in.opcode))
		return false;
	r->out = c->iov + c->nr_read;
	r->nr_out = c->nr_write;
	room = c->write_len > sizeof(struct fuse_out_header)
		       ? c->write_len - sizeof(struct fuse_out_header)
		       : 0;
	r->room = room < INT_MAX / 2 ? (uint32_t)room : INT_MAX / 2;
	r->at = sizeof(r->in);
	r->out_len = r->done = 0;
	r->worker = false;
	r->deadline = 0;
	return true;
}

/* Runs without the service's lock, so that workers can give back what they have done. */
static int handle(struct vmm_fs *fs, struct fs_request *r)
{
	if (r->in.len < sizeof(r->in) || r->in.len > r->chain.read_len)
		return -EINVAL;
	if (!fs->config.workers_only)
		fs_thread_enter(fs);
	return fs_dispatch(fs, r);
}

static int serve(struct vmm_service *s)
{
	struct fs_queue *q = (struct fs_queue *)s; /* its first member */
	struct fs_request *r = q->free;
	int rc;

	if (!r)
		return VMM_SERVICE_WAIT; /* cannot be: no head is in flight twice */
	rc = vmm_vq_pop(s->vq, &r->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!parse(r)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	q->free = r->next;
	q->busy++;
	__atomic_fetch_add(&q->fs->requests, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&s->lock);
	rc = handle(q->fs, r);
	if (rc == FS_TO_WORKER)
		fs_to_worker(q->fs, r);
	pthread_mutex_lock(&s->lock);
	if (rc <= FS_SILENT) {
		if (rc < 0)
			__atomic_fetch_add(&q->fs->errors, 1, __ATOMIC_RELAXED);
		push(q, r, rc);
	}
	return vmm_vq_broken(s->vq) ? vmm_vq_broken(s->vq) : VMM_VQ_CHAIN;
}

static void drain(struct vmm_service *s)
{
	struct fs_queue *q = (struct fs_queue *)s;

	fs_locks_abandon(q->fs, q);
	while (q->busy)
		pthread_cond_wait(&q->idle, &s->lock);
}

/* ---- life ---- */

static int init_queue(struct fs_queue *q, struct vmm_fs *fs, struct vmm_loop *loop)
{
	const size_t nr = fs->config.queue_size;

	vmm_service_init(&q->service, loop, serve);
	q->service.drain = drain;
	q->fs = fs;
	pthread_cond_init(&q->idle, NULL);
	/* Most of it is never touched: a page where a request that long is in flight. */
	q->requests = calloc(nr, sizeof(*q->requests));
	q->iov = calloc(2 * nr * nr, sizeof(*q->iov));
	return q->requests && q->iov ? 0 : -ENOMEM;
}

static void fini_queue(struct fs_queue *q)
{
	vmm_service_fini(&q->service);
	pthread_cond_destroy(&q->idle);
	free(q->requests);
	free(q->iov);
}

static int init(struct vmm_fs *fs, struct vmm_loop **loops)
{
	int rc;

	fs->uid = geteuid();
	fs->gid = getegid();
	fs->privileged = !fs->uid;
	fs->handles.max = fs->config.fds_max / 4;
	if (fs->handles.max > FS_HANDLES)
		fs->handles.max = FS_HANDLES;
	rc = fs_inodes_init(fs);
	fs->pool = vmm_pool_create(FS_WORKERS);
	if (!rc && !fs->pool)
		rc = -ENOMEM;
	for (uint32_t i = 0; !rc && i <= fs->config.queues; i++) {
		fs->nr_queues++;
		rc = init_queue(&fs->queues[i], fs, loops[i]);
	}
	return rc ? rc : vmm_timer_init(&fs->retry, loops[0], fs_locks_expired);
}

struct vmm_fs *vmm_fs_create(struct vmm_loop **loops, const struct vmm_fs_config *config)
{
	struct vmm_fs *fs;
	int rc;

	if (!config->queues || !config->queue_size || config->queue_size > IOV_MAX ||
	    config->fds_max < 64) {
		errno = EINVAL;
		return NULL;
	}
	fs = calloc(1, sizeof(*fs) + (config->queues + 1u) * sizeof(fs->queues[0]));
	if (!fs)
		return NULL;
	fs->config = *config;
	pthread_mutex_init(&fs->lock, NULL);
	pthread_mutex_init(&fs->locks_lock, NULL);
	rc = init(fs, loops);
	if (!rc)
		return fs;
	vmm_fs_destroy(fs);
	errno = -rc;
	return NULL;
}

static void forget_guest(struct vmm_fs *fs)
{
	for (uint32_t i = 0; i < fs->nr_queues; i++)
		if (fs->queues[i].service.vq)
			return;
	pthread_mutex_lock(&fs->lock);
	fs->greeted = false;
	pthread_mutex_unlock(&fs->lock);
	fs_handles_drop(fs);
	fs_inodes_drop(fs);
}

void vmm_fs_stop(struct vmm_fs *fs)
{
	for (uint32_t i = 0; i < fs->nr_queues; i++)
		vmm_service_stop(&fs->queues[i].service);
	forget_guest(fs);
}

void vmm_fs_stop_queue(struct vmm_fs *fs, uint32_t index)
{
	if (index < fs->nr_queues)
		vmm_service_stop(&fs->queues[index].service);
}

void vmm_fs_destroy(struct vmm_fs *fs)
{
	if (!fs)
		return;
	vmm_fs_stop(fs);
	vmm_timer_fini(&fs->retry);
	vmm_pool_destroy(fs->pool);
	for (uint32_t i = 0; i < fs->nr_queues; i++)
		fini_queue(&fs->queues[i]);
	free(fs->handles.slots);
	fs_inodes_fini(fs);
	pthread_mutex_destroy(&fs->locks_lock);
	pthread_mutex_destroy(&fs->lock);
	free(fs);
}

int vmm_fs_start(struct vmm_fs *fs, const struct vmm_service_config *config)
{
	const uint32_t nr = fs->config.queue_size;
	struct fs_queue *q;

	if (config->index >= fs->nr_queues || config->vq.size > nr)
		return -EINVAL;
	q = &fs->queues[config->index];
	if (q->service.vq)
		return -EBUSY;
	q->free = NULL;
	q->busy = 0;
	q->stopping = false;
	for (uint32_t i = 0; i < nr; i++) {
		struct fs_request *r = &q->requests[i];

		r->queue = q;
		r->chain.iov = &q->iov[(size_t)i * 2 * nr];
		r->data = r->chain.iov + nr;
		r->next = q->free;
		q->free = r;
	}
	return vmm_service_start(&q->service, config);
}

void vmm_fs_stats(struct vmm_fs *fs, struct vmm_fs_stats *out)
{
	*out = (struct vmm_fs_stats){
		.requests = __atomic_load_n(&fs->requests, __ATOMIC_RELAXED),
		.errors = __atomic_load_n(&fs->errors, __ATOMIC_RELAXED),
		.bytes_read = __atomic_load_n(&fs->bytes_read, __ATOMIC_RELAXED),
		.bytes_written = __atomic_load_n(&fs->bytes_written, __ATOMIC_RELAXED),
	};
	pthread_mutex_lock(&fs->lock);
	out->inodes = fs->inodes.used;
	out->handles = fs->handles.used;
	out->fds = fs->nr_fds;
	pthread_mutex_unlock(&fs->lock);
	pthread_mutex_lock(&fs->locks_lock);
	for (const struct fs_request *r = fs->waiting; r; r = r->next)
		out->waiting++;
	pthread_mutex_unlock(&fs->locks_lock);
}
