/* virtio-balloon: what the driver says of its memory, in statistics and in hints. */
#include "balloon.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_balloon.h>
#include <string.h>

/* Bytes of hints before other sources get a turn. */
#define TURN_BYTES (1ULL << 32)

/* ---- statistics --------------------------------------------------------------------------- */

static void read_stats(struct vmm_balloon *b, const struct vmm_chain *c)
{
	struct virtio_balloon_stat raw[VMM_BALLOON_MAX_STATS];
	const size_t n = vmm_iov_read(c->iov, c->nr_read, 0, raw, sizeof(raw)) / sizeof(raw[0]);

	pthread_mutex_lock(&b->lock);
	for (size_t i = 0; i < n; i++)
		b->stats[i] = (struct vmm_balloon_stat){ le16toh(raw[i].tag), le64toh(raw[i].val) };
	b->nr_stats = (uint32_t)n;
	b->answers++;
	pthread_cond_broadcast(&b->cond);
	pthread_mutex_unlock(&b->lock);
}

/* The driver's one buffer stays here until its next contents are wanted. virtio-v1.3 §5.5.6.3. */
int vmm_balloon_serve_stats(struct vmm_service *s)
{
	struct vmm_balloon_queue *q = (struct vmm_balloon_queue *)s;
	struct vmm_balloon *b = q->balloon;
	int rc;

	if (q->busy) {
		if (!b->asked)
			return VMM_SERVICE_WAIT;
		vmm_balloon_finish(q);
	}
	rc = vmm_balloon_take(q);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	b->asked = false;
	read_stats(b, &q->chain);
	return VMM_SERVICE_WAIT;
}

static void ask(void *arg)
{
	struct vmm_balloon *b = arg;
	struct vmm_balloon_queue *q = &b->queues[VMM_BALLOON_STATS];

	if (!q->service.vq)
		return;
	b->asked = true;
	vmm_service_run(&q->service);
}

void vmm_balloon_ask(struct vmm_balloon *b)
{
	vmm_loop_call(b->loop, ask, b);
}

static void set_timer(void *arg)
{
	struct vmm_balloon *b = arg;

	vmm_timer_set(&b->timer, b->period_ms * 1000000ULL);
}

void vmm_balloon_tick(struct vmm_timer *timer)
{
	ask(timer); /* the balloon's first member */
	set_timer(timer);
}

void vmm_balloon_every(struct vmm_balloon *b, uint32_t period_ms)
{
	b->period_ms = period_ms;
	vmm_loop_call(b->loop, set_timer, b);
}

void vmm_balloon_cancel(struct vmm_balloon *b)
{
	pthread_mutex_lock(&b->lock);
	b->canceled = true;
	pthread_cond_broadcast(&b->cond);
	pthread_mutex_unlock(&b->lock);
}

uint64_t vmm_balloon_answers(struct vmm_balloon *b)
{
	uint64_t n;

	pthread_mutex_lock(&b->lock);
	n = b->answers;
	pthread_mutex_unlock(&b->lock);
	return n;
}

int vmm_balloon_wait(struct vmm_balloon *b, uint64_t answers, int timeout_ms)
{
	const struct timespec until = vmm_deadline(timeout_ms);
	int rc = 0;

	pthread_mutex_lock(&b->lock);
	while (b->answers <= answers && !rc)
		rc = b->canceled ? ECANCELED :
				   pthread_cond_timedwait(&b->cond, &b->lock, &until);
	rc = b->answers > answers ? 0 : -rc;
	pthread_mutex_unlock(&b->lock);
	return rc;
}

uint32_t vmm_balloon_stats(struct vmm_balloon *b, struct vmm_balloon_stat *out)
{
	uint32_t n;

	pthread_mutex_lock(&b->lock);
	n = b->nr_stats;
	memcpy(out, b->stats, n * sizeof(out[0]));
	pthread_mutex_unlock(&b->lock);
	return n;
}

/* ---- free page hints ---------------------------------------------------------------------- */

int vmm_balloon_serve_hint(struct vmm_service *s)
{
	struct vmm_balloon_queue *q = (struct vmm_balloon_queue *)s;
	struct vmm_balloon *b = q->balloon;
	uint32_t id;
	int rc = vmm_balloon_take(q);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (q->chain.read_len && q->chain.read_len < sizeof(id))
		return vmm_balloon_refuse(q); /* virtio-v1.3 §5.5.6.5: a 32-bit command id */
	pthread_mutex_lock(&b->lock);
	if (q->chain.read_len) {
		vmm_iov_read(q->chain.iov, q->chain.nr_read, 0, &id, sizeof(id));
		if (b->hint_state == VMM_HINT_ASKED && le32toh(id) == b->hint_id)
			b->hint_state = VMM_HINT_STARTED;
		else if (b->hint_state == VMM_HINT_STARTED)
			b->hint_state = VMM_HINT_DONE;
		pthread_cond_broadcast(&b->cond);
	}
	for (uint32_t i = 0; i < q->chain.nr_write && b->hint_state == VMM_HINT_STARTED; i++) {
		const struct iovec *iov = &q->chain.iov[q->chain.nr_read + i];
		uint64_t gpa;

		if (vmm_balloon_address(b, iov, &gpa))
			vmm_pagemap_set(b->hints, gpa, iov->iov_len, true);
	}
	pthread_mutex_unlock(&b->lock);
	vmm_balloon_finish(q);
	if (vmm_balloon_tired(q, q->chain.write_len, TURN_BYTES))
		return VMM_SERVICE_WAIT;
	return VMM_VQ_CHAIN;
}

int vmm_balloon_collect(struct vmm_balloon *b, uint32_t id)
{
	struct vmm_pagemap *fresh = NULL;

	if (id) {
		fresh = vmm_pagemap_create(b->mem);
		if (!fresh)
			return -ENOMEM;
	}
	pthread_mutex_lock(&b->lock);
	vmm_pagemap_destroy(b->hints);
	b->hints = fresh;
	b->hint_id = id;
	b->hint_state = fresh ? VMM_HINT_ASKED : VMM_HINT_STOPPED;
	pthread_mutex_unlock(&b->lock);
	return 0;
}

int vmm_balloon_collected(struct vmm_balloon *b, int timeout_ms)
{
	const struct timespec until = vmm_deadline(timeout_ms);
	int rc = 0;

	pthread_mutex_lock(&b->lock);
	while ((b->hint_state == VMM_HINT_ASKED || b->hint_state == VMM_HINT_STARTED) && !rc)
		rc = b->canceled ? ECANCELED :
				   pthread_cond_timedwait(&b->cond, &b->lock, &until);
	if (b->hint_state == VMM_HINT_DONE)
		rc = 0;
	else if (b->hint_state == VMM_HINT_STOPPED)
		rc = ECANCELED;
	pthread_mutex_unlock(&b->lock);
	return -rc;
}

void vmm_balloon_forget_hints(struct vmm_balloon *b)
{
	pthread_mutex_lock(&b->lock);
	vmm_pagemap_destroy(b->hints);
	b->hints = NULL;
	b->hint_state = VMM_HINT_STOPPED;
	pthread_cond_broadcast(&b->cond);
	pthread_mutex_unlock(&b->lock);
}

int vmm_balloon_hinted(struct vmm_balloon *b, uint64_t gpa, uint64_t *start, uint64_t *len)
{
	int found;

	pthread_mutex_lock(&b->lock);
	found = b->hints && vmm_pagemap_next(b->hints, gpa, start, len);
	pthread_mutex_unlock(&b->lock);
	return found;
}
