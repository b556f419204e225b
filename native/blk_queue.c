/* One queue of a disk on its I/O thread: requests in, answers out. */
#include "blk_queue.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

/* ---- a request ends ---- */

/* used.len counts what was written without a gap from the first writable byte on, so the status
 * byte counts only where all data before it was filled: virtio-v1.3 §2.7.8.2. */
static void complete(struct vmm_blk_queue *q, struct vmm_blk_request *r, uint8_t status)
{
	const uint64_t filled =
		r->type == VIRTIO_BLK_T_IN || r->type == VIRTIO_BLK_T_GET_ID ? r->done : 0;
	const uint64_t room = r->chain.write_len - 1;

	if (status != VIRTIO_BLK_S_OK)
		vmm_blk_count(&q->stats.errors, 1);
	/* SAFETY: the last writable byte of a chain that vmm_vq_pop() found to be RAM. */
	*(volatile uint8_t *)r->status = status;
	vmm_vq_push(q->service.vq, &r->chain, filled + (filled == room));
	r->next = q->free;
	q->free = r;
}

static void hold(struct vmm_blk_queue *q, struct vmm_blk_request *r, int rc)
{
	const uint64_t one = 1;

	r->next = q->held;
	q->held = r;
	__atomic_store_n(&q->blk->error, -rc, __ATOMIC_RELAXED);
	vmm_blk_count(&q->stats.held, 1);
	while (write(q->blk->file.config.held_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* What the user wants done about it; VMM_BLK_REPORT, IGNORE or PAUSE. */
static int policy(const struct vmm_blk_queue *q, const struct vmm_blk_request *r, int rc)
{
	const struct vmm_blk_config *config = &q->blk->file.config;
	int what = r->op == VMM_BLK_READ ? config->read_error : config->write_error;

	if (what == VMM_BLK_ENOSPC)
		what = rc == -ENOSPC || rc == -EDQUOT ? VMM_BLK_PAUSE : VMM_BLK_REPORT;
	return what == VMM_BLK_PAUSE && rc == -ECANCELED ? VMM_BLK_REPORT : what;
}

static void tally(struct vmm_blk_queue *q, const struct vmm_blk_request *r)
{
	switch (r->op) {
	case VMM_BLK_READ:
		vmm_blk_count(&q->stats.reads, 1);
		vmm_blk_count(&q->stats.read_bytes, r->done);
		break;
	case VMM_BLK_WRITE:
		vmm_blk_count(&q->stats.writes, 1);
		vmm_blk_count(&q->stats.written_bytes, r->done);
		break;
	case VMM_BLK_FLUSH:
		vmm_blk_count(&q->stats.flushes, 1);
		break;
	case VMM_BLK_DISCARD:
		vmm_blk_count(&q->stats.discards, 1);
		break;
	case VMM_BLK_ZERO:
		vmm_blk_count(&q->stats.zeroes, 1);
		break;
	}
}

static void finish(struct vmm_blk_queue *q, struct vmm_blk_request *r, int rc)
{
	const int what = rc ? policy(q, r, rc) : VMM_BLK_REPORT;

	vmm_blk_count(&q->stats.pending, -1);
	if (what == VMM_BLK_PAUSE) {
		hold(q, r, rc);
		return;
	}
	tally(q, r);
	if (rc && what == VMM_BLK_IGNORE) {
		if (r->op == VMM_BLK_READ)
			vmm_blk_blank(r->data, r->nr_data);
		r->done = r->len;
		rc = 0;
	}
	complete(q, r, rc ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

/* ---- a request begins ---- */

static void begin(struct vmm_blk_queue *q, struct vmm_blk_request *r)
{
	int rc;

	vmm_blk_count(&q->stats.pending, 1);
	rc = vmm_blk_io_begin(&q->io, r);
	if (rc != VMM_BLK_PENDING)
		finish(q, r, rc);
}

/* ---- limits ---- */

static uint64_t later(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Whether nothing may begin now; the timer will tell when. */
static bool throttled(struct vmm_blk_queue *q)
{
	struct vmm_blk *blk = q->blk;
	uint64_t now, wait;

	if (!__atomic_load_n(&blk->limited, __ATOMIC_RELAXED))
		return false;
	now = vmm_now();
	pthread_mutex_lock(&blk->lock);
	wait = later(vmm_bucket_wait(&blk->bytes, now), vmm_bucket_wait(&blk->requests, now));
	pthread_mutex_unlock(&blk->lock);
	if (!wait)
		return false;
	if (!q->timer.set)
		vmm_blk_count(&q->stats.throttled, 1);
	vmm_timer_set(&q->timer, wait);
	return true;
}

static void charge(struct vmm_blk *blk, const struct vmm_blk_request *r)
{
	const uint64_t now = vmm_now();

	pthread_mutex_lock(&blk->lock);
	vmm_bucket_take(&blk->bytes, now, r->len);
	vmm_bucket_take(&blk->requests, now, 1);
	pthread_mutex_unlock(&blk->lock);
}

static void expired(struct vmm_timer *timer)
{
	struct vmm_blk_queue *q = (struct vmm_blk_queue *)((uint8_t *)timer -
							   offsetof(struct vmm_blk_queue, timer));

	vmm_service_run(&q->service);
}

static int serve(struct vmm_service *s)
{
	struct vmm_blk_queue *q = (struct vmm_blk_queue *)s; /* its first member */
	struct vmm_blk_request *r = q->free;
	uint64_t sector;
	int rc;

	if (!r)
		return VMM_SERVICE_WAIT; /* cannot be: no head is in flight twice */
	if (throttled(q))
		return VMM_SERVICE_WAIT;
	rc = vmm_vq_pop(s->vq, &r->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!vmm_blk_parse(r, &sector)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	q->free = r->next;
	rc = vmm_blk_check(q->blk, r, sector);
	if (rc != VMM_BLK_GO) {
		vmm_blk_count(&q->stats.others, 1);
		complete(q, r, (uint8_t)rc);
		return VMM_VQ_CHAIN;
	}
	/* Without FLUSH a finished write must be on the disk: virtio-v1.3 §5.2.6.2. */
	r->durable = !q->flushes || !__atomic_load_n(&q->blk->write_back, __ATOMIC_RELAXED);
	if (__atomic_load_n(&q->blk->limited, __ATOMIC_RELAXED))
		charge(q->blk, r);
	begin(q, r);
	return VMM_VQ_CHAIN;
}

/* ---- the I/O thread ---- */

static void reap(struct vmm_blk_queue *q)
{
	struct vmm_blk_request *r;
	int rc;

	while ((r = vmm_blk_io_next(&q->io, &rc)))
		finish(q, r, rc);
}

static void flush(struct vmm_service *s)
{
	struct vmm_blk_queue *q = (struct vmm_blk_queue *)s;

	do {
		if (vmm_blk_io_submit(&q->io)) {
			vmm_vq_refuse(s->vq); /* the host's fault, but no less the end */
			return;
		}
		reap(q);
	} while (q->io.ring.queued);
}

static void drain(struct vmm_service *s)
{
	struct vmm_blk_queue *q = (struct vmm_blk_queue *)s;

	vmm_timer_set(&q->timer, 0);
	__atomic_store_n(&q->io.cancel, true, __ATOMIC_RELAXED);
	while (vmm_blk_io_wait(&q->io))
		reap(q);
	/* What is held has not been answered, and never will be. */
	__atomic_store_n(&q->stats.held, 0, __ATOMIC_RELAXED);
	q->held = NULL;
}

static void ended(struct vmm_blk_queue *q)
{
	if (!q->service.vq)
		return;
	reap(q);
	flush(&q->service);
	vmm_service_notify(&q->service);
}

static void completed(struct vmm_source *source, uint32_t epoll_events)
{
	(void)epoll_events;
	ended((struct vmm_blk_queue *)((uint8_t *)source -
				       offsetof(struct vmm_blk_queue, completions)));
}

static void finished(struct vmm_source *source, uint32_t epoll_events)
{
	uint64_t junk;

	(void)epoll_events;
	if (read(source->fd, &junk, sizeof(junk)) == sizeof(junk))
		ended((struct vmm_blk_queue *)((uint8_t *)source -
					       offsetof(struct vmm_blk_queue, finished)));
}

static void retry(void *arg)
{
	struct vmm_blk_queue *q = arg;
	struct vmm_blk_request *r = q->held, *next;

	if (!q->service.vq)
		return;
	q->held = NULL;
	__atomic_store_n(&q->stats.held, 0, __ATOMIC_RELAXED);
	for (; r; r = next) {
		next = r->next;
		begin(q, r);
	}
	ended(q);
}

/* ---- life ---- */

void vmm_blk_queue_retry(struct vmm_blk_queue *q)
{
	vmm_loop_call(q->service.loop, retry, q);
}

static void run(void *arg)
{
	vmm_service_run(arg);
}

void vmm_blk_queue_limits(struct vmm_blk_queue *q)
{
	vmm_loop_call(q->service.loop, run, &q->service);
}

static int add_sources(struct vmm_blk_queue *q, struct vmm_loop *loop)
{
	int rc;

	q->finished.fd = q->io.event;
	q->finished.ready = finished;
	q->completions.fd = q->io.ring.fd;
	q->completions.ready = completed;
	rc = vmm_loop_add(loop, &q->finished, EPOLLIN);
	if (!rc && q->io.async)
		rc = vmm_loop_add(loop, &q->completions, EPOLLIN);
	return rc ? rc : vmm_timer_init(&q->timer, loop, expired);
}

int vmm_blk_queue_init(struct vmm_blk_queue *q, struct vmm_blk *blk, struct vmm_loop *loop)
{
	const size_t nr = blk->file.config.queue_size;
	int rc;

	vmm_service_init(&q->service, loop, serve);
	q->service.flush = flush;
	q->service.drain = drain;
	q->blk = blk;
	rc = vmm_blk_io_init(&q->io, &blk->file);
	/* Most of it is never touched: a page where a request that long is in flight. */
	q->requests = calloc(nr, sizeof(*q->requests));
	q->iov = calloc(nr * nr, sizeof(*q->iov));
	q->segments = calloc(nr * VMM_BLK_MAX_SEGMENTS, sizeof(*q->segments));
	if (!rc && (!q->requests || !q->iov || !q->segments))
		rc = -ENOMEM;
	return rc ? rc : add_sources(q, loop);
}

void vmm_blk_queue_fini(struct vmm_blk_queue *q)
{
	vmm_service_fini(&q->service);
	vmm_timer_fini(&q->timer);
	vmm_loop_remove(q->service.loop, &q->finished);
	vmm_loop_remove(q->service.loop, &q->completions);
	vmm_blk_io_fini(&q->io);
	free(q->requests);
	free(q->iov);
	free(q->segments);
}

int vmm_blk_queue_start(struct vmm_blk_queue *q, const struct vmm_service_config *config)
{
	const uint32_t nr = q->blk->file.config.queue_size;

	if (config->vq.size > nr)
		return -EINVAL;
	if (q->service.vq)
		return -EBUSY;
	q->free = NULL;
	for (uint32_t i = 0; i < nr; i++) {
		struct vmm_blk_request *r = &q->requests[i];

		r->chain.iov = &q->iov[(size_t)i * nr];
		r->segments = &q->segments[(size_t)i * VMM_BLK_MAX_SEGMENTS];
		r->next = q->free;
		q->free = r;
	}
	q->flushes = config->vq.features >> VIRTIO_BLK_F_FLUSH & 1;
	__atomic_store_n(&q->io.cancel, false, __ATOMIC_RELAXED);
	return vmm_service_start(&q->service, config);
}
