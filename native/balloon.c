/* virtio-balloon. What the driver names, by page number or as a buffer, is checked against the
 * table of RAM and given back in runs as long as they come. A page that is not RAM is counted and
 * left alone: there is nothing to take away, and virtio-v1.3 §5.5 gives no way to refuse a single
 * page. A chain that cannot be what its queue carries breaks the queue. */
#include "balloon.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#define PAGE ((uint64_t)VMM_BALLOON_PAGE)
/* Page numbers that are put in order and merged at a time; Linux sends no more in a chain. */
#define PIECE 256
/* Work done before other sources get a turn, in page numbers and in bytes of buffers. */
#define TURN_PAGES 1024
#define TURN_BYTES (256ULL << 20)

static struct vmm_balloon_queue *queue_of(struct vmm_service *s)
{
	return (struct vmm_balloon_queue *)s; /* its first member */
}

int vmm_balloon_take(struct vmm_balloon_queue *q)
{
	int rc;

	if (q->busy)
		return VMM_VQ_CHAIN;
	rc = vmm_vq_pop(q->service.vq, &q->chain);
	if (rc == VMM_VQ_CHAIN) {
		q->busy = true;
		q->offset = 0;
	}
	return rc;
}

int vmm_balloon_finish(struct vmm_balloon_queue *q)
{
	q->busy = false;
	vmm_vq_push(q->service.vq, &q->chain, 0);
	return VMM_VQ_CHAIN;
}

int vmm_balloon_refuse(struct vmm_balloon_queue *q)
{
	q->busy = false;
	vmm_vq_refuse(q->service.vq);
	return vmm_vq_broken(q->service.vq);
}

bool vmm_balloon_tired(struct vmm_balloon_queue *q, uint64_t cost, uint64_t limit)
{
	q->spent += cost;
	if (q->spent < limit)
		return false;
	q->spent = 0;
	vmm_service_again(&q->service);
	return true;
}

/* ---- giving back -------------------------------------------------------------------------- */

static void discard(struct vmm_balloon *b, uint64_t gpa, uint64_t len, _Atomic uint64_t *count)
{
	const int64_t rc = vmm_mem_discard(b->mem, gpa, len);

	if (rc < 0)
		b->failed += len;
	else
		*count += (uint64_t)rc;
}

/* [gpa, gpa+len) lies in r. */
static void inflate_ram(struct vmm_balloon *b, const struct vmm_ram *r, uint64_t gpa, uint64_t len)
{
	const uint64_t mask = ~(uint64_t)(r->page - 1);
	uint64_t at, end;

	if (!b->parts || r->page <= PAGE) {
		discard(b, gpa, len, &b->inflated);
		return;
	}
	vmm_pagemap_set(b->parts, gpa, len, true);
	at = r->gpa + ((gpa - r->gpa) & mask);
	end = gpa + len;
	for (; at < end; at += r->page) {
		if (vmm_pagemap_full(b->parts, at, r->page))
			discard(b, at, r->page, &b->inflated);
	}
}

static void inflate(struct vmm_balloon *b, uint64_t gpa, uint64_t len)
{
	const uint64_t end = gpa + len; /* at most 2^44 and 1 MiB */
	uint64_t in_ram = 0;
	struct vmm_ram r;

	for (uint32_t i = 0; !vmm_mem_range(b->mem, i, &r); i++) {
		const uint64_t from = gpa > r.gpa ? gpa : r.gpa;
		const uint64_t to = end < r.gpa + r.size ? end : r.gpa + r.size;

		if (from >= to)
			continue;
		in_ram += to - from;
		inflate_ram(b, &r, from, to - from);
	}
	b->ignored += (len - in_ram) / PAGE;
}

static void deflate(struct vmm_balloon *b, uint64_t gpa, uint64_t len)
{
	if (b->parts)
		vmm_pagemap_set(b->parts, gpa, len, false);
}

static int by_number(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

typedef void (*page_run)(struct vmm_balloon *b, uint64_t gpa, uint64_t len);

/* Calls done for each run of consecutive pages. */
static void in_runs(struct vmm_balloon *b, uint32_t *pfns, size_t n, page_run done)
{
	for (size_t i = 0; i < n; i++)
		pfns[i] = le32toh(pfns[i]);
	qsort(pfns, n, sizeof(pfns[0]), by_number);
	for (size_t i = 0, end; i < n; i = end) {
		for (end = i + 1; end < n && pfns[end] - pfns[end - 1] <= 1; end++)
			;
		done(b, pfns[i] * PAGE, (pfns[end - 1] - pfns[i] + 1ULL) * PAGE);
	}
}

static int serve_pages(struct vmm_service *s)
{
	struct vmm_balloon_queue *q = queue_of(s);
	struct vmm_balloon *b = q->balloon;
	const page_run done = q == &b->queues[VMM_BALLOON_INFLATE] ? inflate : deflate;
	uint32_t pfns[PIECE];
	bool rest = false;
	int rc = vmm_balloon_take(q);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!q->chain.read_len || q->chain.read_len % sizeof(pfns[0])) {
		/* virtio-v1.3 §5.5.6: an array of 32-bit page numbers. */
		return vmm_balloon_refuse(q);
	}
	while (q->offset < q->chain.read_len && !rest) {
		const size_t n = vmm_iov_read(q->chain.iov, q->chain.nr_read, q->offset, pfns,
					      sizeof(pfns)) /
				 sizeof(pfns[0]);

		q->offset += n * sizeof(pfns[0]);
		in_runs(b, pfns, n, done);
		rest = vmm_balloon_tired(q, n, TURN_PAGES);
	}
	if (q->offset < q->chain.read_len)
		return VMM_SERVICE_WAIT;
	vmm_balloon_finish(q);
	return rest ? VMM_SERVICE_WAIT : VMM_VQ_CHAIN;
}

bool vmm_balloon_address(const struct vmm_balloon *b, const struct iovec *iov, uint64_t *gpa)
{
	struct vmm_ram r;

	for (uint32_t i = 0; !vmm_mem_range(b->mem, i, &r); i++) {
		const uintptr_t at = (uintptr_t)iov->iov_base, base = (uintptr_t)r.hva;

		if (at < base || at - base >= r.size)
			continue;
		*gpa = r.gpa + (at - base);
		return true;
	}
	return false;
}

static int serve_report(struct vmm_service *s)
{
	struct vmm_balloon_queue *q = queue_of(s);
	struct vmm_balloon *b = q->balloon;
	int rc = vmm_balloon_take(q);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!q->chain.write_len) {
		/* virtio-v1.3 §5.5.6.7: free pages are for the device to change. */
		return vmm_balloon_refuse(q);
	}
	for (uint32_t i = 0; i < q->chain.nr_write && !b->keep_reported; i++) {
		const struct iovec *iov = &q->chain.iov[q->chain.nr_read + i];
		uint64_t gpa;

		if (vmm_balloon_address(b, iov, &gpa))
			discard(b, gpa, iov->iov_len, &b->reported);
	}
	vmm_balloon_finish(q);
	if (vmm_balloon_tired(q, q->chain.write_len, TURN_BYTES))
		return VMM_SERVICE_WAIT;
	return VMM_VQ_CHAIN;
}

/* ---- life --------------------------------------------------------------------------------- */

void vmm_balloon_keep_reported(struct vmm_balloon *b, int keep)
{
	b->keep_reported = keep;
}

void vmm_balloon_counts(struct vmm_balloon *b, struct vmm_balloon_counts *out)
{
	out->inflated = b->inflated;
	out->reported = b->reported;
	out->ignored = b->ignored;
	out->failed = b->failed;
}

static int (*const SERVE[VMM_BALLOON_NR_QUEUES])(struct vmm_service *s) = {
	[VMM_BALLOON_INFLATE] = serve_pages,
	[VMM_BALLOON_DEFLATE] = serve_pages,
	[VMM_BALLOON_STATS] = vmm_balloon_serve_stats,
	[VMM_BALLOON_HINT] = vmm_balloon_serve_hint,
	[VMM_BALLOON_REPORT] = serve_report,
};

struct vmm_balloon *vmm_balloon_create(struct vmm_loop *loop, const struct vmm_mem *mem,
				       uint16_t queue_size)
{
	struct vmm_balloon *b = calloc(1, sizeof(*b));
	int rc = ENOMEM;

	if (!b)
		return NULL;
	b->loop = loop;
	b->mem = mem;
	b->queue_size = queue_size;
	pthread_mutex_init(&b->lock, NULL);
	vmm_cond_init(&b->cond);
	for (int i = 0; i < VMM_BALLOON_NR_QUEUES; i++) {
		struct vmm_balloon_queue *q = &b->queues[i];

		vmm_service_init(&q->service, loop, SERVE[i]);
		q->balloon = b;
		q->chain.iov = q->iov = calloc(queue_size, sizeof(*q->iov));
		if (!q->iov)
			goto fail;
	}
	rc = -vmm_timer_init(&b->timer, loop, vmm_balloon_tick);
	if (!rc)
		return b;
fail:
	vmm_balloon_destroy(b);
	errno = rc;
	return NULL;
}

void vmm_balloon_destroy(struct vmm_balloon *b)
{
	if (!b)
		return;
	vmm_timer_fini(&b->timer);
	for (int i = 0; i < VMM_BALLOON_NR_QUEUES; i++) {
		if (b->queues[i].balloon)
			vmm_service_fini(&b->queues[i].service);
		free(b->queues[i].iov);
	}
	vmm_pagemap_destroy(b->parts);
	vmm_pagemap_destroy(b->hints);
	pthread_cond_destroy(&b->cond);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

/* Pages larger than the balloon's need to be gathered; safe only if the driver tells before it
 * takes a part back. */
static int gather(struct vmm_balloon *b)
{
	struct vmm_ram r;

	for (uint32_t i = 0; !b->parts && !vmm_mem_range(b->mem, i, &r); i++) {
		if (r.page <= PAGE)
			continue;
		b->parts = vmm_pagemap_create(b->mem);
		if (!b->parts)
			return -ENOMEM;
	}
	return 0;
}

int vmm_balloon_start(struct vmm_balloon *b, const struct vmm_service_config *config, uint32_t role,
		      int tells)
{
	int rc;

	if (role >= VMM_BALLOON_NR_QUEUES || config->vq.size > b->queue_size)
		return -EINVAL;
	if (tells && role == VMM_BALLOON_INFLATE) {
		rc = gather(b);
		if (rc)
			return rc;
	}
	b->queues[role].busy = false;
	return vmm_service_start(&b->queues[role].service, config);
}

void vmm_balloon_stop_queue(struct vmm_balloon *b, uint32_t role)
{
	if (role >= VMM_BALLOON_NR_QUEUES)
		return;
	vmm_service_stop(&b->queues[role].service);
	b->queues[role].busy = false;
	if (role == VMM_BALLOON_STATS)
		b->asked = false;
	if (role == VMM_BALLOON_HINT)
		vmm_balloon_forget_hints(b);
}

void vmm_balloon_stop(struct vmm_balloon *b)
{
	for (uint32_t i = 0; i < VMM_BALLOON_NR_QUEUES; i++)
		vmm_balloon_stop_queue(b, i);
	/* To whoever drives the device next, the balloon is empty. */
	vmm_pagemap_destroy(b->parts);
	b->parts = NULL;
}
