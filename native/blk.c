/* virtio-blk: virtio-v1.3 §5.2.6. What the driver asks for, checked; the file I/O itself is in
 * blk_io.c. */
#include "blk.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <sys/epoll.h>

#define SECTOR VMM_BLK_SECTOR
#define ID_BYTES 20
#define HEADER 16

struct vmm_blk {
	struct vmm_service service;
	struct vmm_source completions; /* of io_uring */
	struct vmm_blk_io io;
	uint64_t sectors;
	struct vmm_blk_stats stats;
	struct vmm_blk_request *free; /* as many as the ring can have in flight */
	struct iovec *iov;
	struct vmm_blk_request requests[];
};

static void count(uint64_t *what, uint64_t by)
{
	/* One writer, the I/O thread; readers want no torn values. */
	__atomic_store_n(what, *what + by, __ATOMIC_RELAXED);
}

/* ---- a request ---- */

/* Splits a chain into header, data and status. The driver may cut the parts into buffers as it
 * likes: virtio-v1.3 §2.7.4.2. false when there is no header or no status byte. */
static bool parse(struct vmm_blk_request *r, struct virtio_blk_outhdr *header)
{
	struct vmm_chain *c = &r->chain;
	struct iovec *readable = c->iov, *writable = c->iov + c->nr_read;
	uint32_t nr_readable = c->nr_read, nr_writable = c->nr_write;
	const struct iovec *last;

	if (c->read_len < HEADER || !c->write_len)
		return false;
	vmm_iov_read(readable, nr_readable, 0, header, HEADER);
	vmm_iov_skip(&readable, &nr_readable, HEADER);
	last = &writable[nr_writable - 1];
	r->status = (uint8_t *)last->iov_base + last->iov_len - 1;
	vmm_iov_cut(writable, &nr_writable, 1);
	r->type = le32toh(header->type);
	r->done = 0;
	if (r->type == VIRTIO_BLK_T_OUT) {
		r->data = readable;
		r->nr_data = nr_readable;
		r->len = c->read_len - HEADER;
	} else {
		r->data = writable;
		r->nr_data = nr_writable;
		r->len = c->write_len - 1;
	}
	return true;
}

/* used.len counts what was written without a gap from the first writable byte on, so the status
 * byte counts only where all data before it was filled: virtio-v1.3 §2.7.8.2. */
static void complete(struct vmm_blk *blk, struct vmm_blk_request *r, uint8_t status)
{
	const uint64_t filled = r->type == VIRTIO_BLK_T_OUT ? 0 : r->done;
	const uint64_t room = r->chain.write_len - 1;

	if (status != VIRTIO_BLK_S_OK)
		count(&blk->stats.errors, 1);
	/* SAFETY: the last writable byte of a chain that vmm_vq_pop() found to be RAM. */
	*(volatile uint8_t *)r->status = status;
	vmm_vq_push(blk->service.vq, &r->chain, filled + (filled == room));
	r->next_free = blk->free;
	blk->free = r;
}

static void finish(struct vmm_blk *blk, struct vmm_blk_request *r, int rc)
{
	switch (r->op) {
	case VMM_BLK_READ:
		count(&blk->stats.reads, 1);
		count(&blk->stats.read_bytes, r->done);
		break;
	case VMM_BLK_WRITE:
		count(&blk->stats.writes, 1);
		count(&blk->stats.written_bytes, r->done);
		break;
	case VMM_BLK_FLUSH:
		count(&blk->stats.flushes, 1);
		break;
	}
	complete(blk, r, rc ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
}

static void begin(struct vmm_blk *blk, struct vmm_blk_request *r)
{
	const int rc = vmm_blk_io_begin(&blk->io, r);

	if (rc != VMM_BLK_PENDING)
		finish(blk, r, rc);
}

static void read_or_write(struct vmm_blk *blk, struct vmm_blk_request *r, uint64_t sector)
{
	const uint64_t sectors = r->len / SECTOR;
	const bool write = r->type == VIRTIO_BLK_T_OUT;

	if (r->len % SECTOR || sector > blk->sectors || sectors > blk->sectors - sector ||
	    (write && blk->io.config.read_only)) {
		complete(blk, r, VIRTIO_BLK_S_IOERR);
		return;
	}
	r->op = write ? VMM_BLK_WRITE : VMM_BLK_READ;
	r->offset = sector * SECTOR;
	begin(blk, r);
}

static void execute(struct vmm_blk *blk, struct vmm_blk_request *r, uint64_t sector)
{
	switch (r->type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		read_or_write(blk, r, sector);
		break;
	case VIRTIO_BLK_T_FLUSH:
		r->op = VMM_BLK_FLUSH;
		begin(blk, r);
		break;
	case VIRTIO_BLK_T_GET_ID:
		count(&blk->stats.others, 1);
		r->done = vmm_iov_write(r->data, r->nr_data, 0, blk->io.config.serial, ID_BYTES);
		complete(blk, r, VIRTIO_BLK_S_OK);
		break;
	default:
		count(&blk->stats.others, 1);
		complete(blk, r, VIRTIO_BLK_S_UNSUPP);
	}
}

/* ---- the I/O thread ---- */

static int serve(struct vmm_service *s)
{
	struct vmm_blk *blk = (struct vmm_blk *)s; /* its first member */
	struct vmm_blk_request *r = blk->free;
	struct virtio_blk_outhdr header;
	int rc;

	if (!r)
		return VMM_SERVICE_WAIT; /* cannot be: no head is in flight twice */
	rc = vmm_vq_pop(s->vq, &r->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!parse(r, &header)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	blk->free = r->next_free;
	execute(blk, r, le64toh(header.sector));
	return VMM_VQ_CHAIN;
}

static void reap(struct vmm_blk *blk)
{
	struct vmm_blk_request *r;
	int rc;

	while ((r = vmm_blk_io_next(&blk->io, &rc)))
		finish(blk, r, rc);
}

static void flush(struct vmm_service *s)
{
	struct vmm_blk *blk = (struct vmm_blk *)s;

	if (!blk->io.inflight)
		return;
	do {
		if (vmm_blk_io_submit(&blk->io)) {
			vmm_vq_refuse(s->vq); /* the host's fault, but no less the end */
			return;
		}
		reap(blk);
	} while (blk->io.ring.queued);
}

static void drain(struct vmm_service *s)
{
	struct vmm_blk *blk = (struct vmm_blk *)s;

	while (vmm_blk_io_wait(&blk->io))
		reap(blk);
}

static void completed(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_blk *blk =
		(struct vmm_blk *)((uint8_t *)source - offsetof(struct vmm_blk, completions));

	(void)epoll_events;
	if (!blk->service.vq)
		return;
	reap(blk);
	flush(&blk->service);
	vmm_service_notify(&blk->service);
}

/* ---- life ---- */

struct vmm_blk *vmm_blk_create(struct vmm_loop *loop, const struct vmm_blk_config *config)
{
	const size_t nr = config->queue_size;
	struct vmm_blk *blk = calloc(1, sizeof(*blk) + nr * sizeof(blk->requests[0]));
	int rc;

	if (!blk)
		return NULL;
	blk->sectors = (config->size + SECTOR - 1) / SECTOR;
	vmm_service_init(&blk->service, loop, serve);
	blk->service.flush = flush;
	blk->service.drain = drain;
	/* Most of it is never touched: a page where a request that long is in flight. */
	blk->iov = calloc(nr * nr, sizeof(*blk->iov));
	blk->io.ring.fd = -1;
	rc = blk->iov ? vmm_blk_io_init(&blk->io, config) : -ENOMEM;
	if (!rc && blk->io.async) {
		blk->completions.fd = blk->io.ring.fd;
		blk->completions.ready = completed;
		rc = vmm_loop_add(loop, &blk->completions, EPOLLIN);
	}
	if (rc) {
		blk->io.async = false;
		vmm_blk_destroy(blk);
		errno = -rc;
		return NULL;
	}
	return blk;
}

void vmm_blk_destroy(struct vmm_blk *blk)
{
	if (!blk)
		return;
	vmm_service_fini(&blk->service);
	if (blk->io.async)
		vmm_loop_remove(blk->service.loop, &blk->completions);
	vmm_blk_io_fini(&blk->io);
	free(blk->iov);
	free(blk);
}

int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config)
{
	const uint32_t nr = blk->io.config.queue_size;

	if (config->vq.size > nr)
		return -EINVAL;
	if (blk->service.vq)
		return -EBUSY;
	blk->free = NULL;
	for (uint32_t i = 0; i < nr; i++) {
		struct vmm_blk_request *r = &blk->requests[i];

		r->chain.iov = &blk->iov[(size_t)i * nr];
		r->next_free = blk->free;
		blk->free = r;
	}
	/* Without FLUSH a finished write must be on the disk: virtio-v1.3 §5.2.6.2. */
	blk->io.write_through = !(config->vq.features >> VIRTIO_BLK_F_FLUSH & 1);
	return vmm_service_start(&blk->service, config);
}

void vmm_blk_stop(struct vmm_blk *blk)
{
	vmm_service_stop(&blk->service);
}

void vmm_blk_stats(const struct vmm_blk *blk, struct vmm_blk_stats *out)
{
	const uint64_t *from = (const uint64_t *)&blk->stats;
	uint64_t *to = (uint64_t *)out;

	for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

int vmm_blk_async(const struct vmm_blk *blk)
{
	return blk->io.async;
}
