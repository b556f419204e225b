/* virtio-blk on a raw file: virtio-v1.3 §5.2.6. One request is one preadv or pwritev on the I/O
 * thread of the disk. */
#define _GNU_SOURCE
#include "blk.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR 512
#define ID_BYTES 20
#define HEADER 16

/* One request, from pop to push. `data` is what is left of the chain between header and status. */
struct request {
	struct vmm_chain chain;
	struct iovec *data;
	uint32_t nr_data;
	uint64_t offset, len, done;
	uint32_t type;
	uint8_t *status; /* in guest RAM */
};

struct vmm_blk {
	struct vmm_service service;
	struct vmm_blk_config config;
	uint64_t sectors;
	int write_flags; /* RWF_DSYNC when the driver cannot flush */
	struct vmm_blk_stats stats;
	struct request request;
	struct iovec iov[];
};

static void count(uint64_t *what, uint64_t by)
{
	/* One writer, the I/O thread; readers want no torn values. */
	__atomic_store_n(what, *what + by, __ATOMIC_RELAXED);
}

/* ---- a request's file I/O ---- */

/* O_DIRECT wants aligned offset, memory and lengths; what is not goes through the page cache. */
static int file_for(const struct vmm_blk *blk, const struct request *r)
{
	const uint32_t align = blk->config.align;
	uint64_t bits = r->offset;

	if (!align)
		return blk->config.fd;
	for (uint32_t i = 0; i < r->nr_data; i++)
		bits |= (uintptr_t)r->data[i].iov_base | r->data[i].iov_len;
	return bits & (align - 1) ? blk->config.buffered_fd : blk->config.fd;
}

static void zero(const struct iovec *iov, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++)
		/* SAFETY: iov came from vmm_vq_pop(): it is RAM. */
		memset(iov[i].iov_base, 0, iov[i].iov_len);
}

/* Moves all bytes of the request, however short the single calls fall. 0 or -errno. */
static int transfer(struct vmm_blk *blk, struct request *r)
{
	const bool out = r->type == VIRTIO_BLK_T_OUT;

	while (r->done < r->len) {
		const int fd = file_for(blk, r);
		ssize_t n;

		/* SAFETY: the kernel checks the addresses again; all of them are guest RAM. */
		if (out)
			n = pwritev2(fd, r->data, (int)r->nr_data, (off_t)r->offset,
				     blk->write_flags);
		else
			n = preadv2(fd, r->data, (int)r->nr_data, (off_t)r->offset, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0) {
			/* The end of the file: fine inside the last sector, otherwise someone
			 * made the file shorter. */
			if (out || r->offset < blk->config.size)
				return -EIO;
			zero(r->data, r->nr_data);
			n = (ssize_t)(r->len - r->done);
		}
		r->done += (uint64_t)n;
		r->offset += (uint64_t)n;
		vmm_iov_skip(&r->data, &r->nr_data, (uint64_t)n);
	}
	return 0;
}

static uint8_t read_or_write(struct vmm_blk *blk, struct request *r, uint64_t sector)
{
	const bool out = r->type == VIRTIO_BLK_T_OUT;
	const uint64_t sectors = r->len / SECTOR;

	if (r->len % SECTOR || sector > blk->sectors || sectors > blk->sectors - sector)
		return VIRTIO_BLK_S_IOERR;
	if (out && blk->config.read_only)
		return VIRTIO_BLK_S_IOERR;
	r->offset = sector * SECTOR;
	if (transfer(blk, r))
		return VIRTIO_BLK_S_IOERR;
	count(out ? &blk->stats.writes : &blk->stats.reads, 1);
	count(out ? &blk->stats.written_bytes : &blk->stats.read_bytes, r->len);
	return VIRTIO_BLK_S_OK;
}

static uint8_t flush(struct vmm_blk *blk)
{
	int rc;

	do
		rc = fdatasync(blk->config.fd);
	while (rc && errno == EINTR);
	count(&blk->stats.flushes, 1);
	return rc ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
}

/* ---- a request ---- */

/* Splits a chain into header, data and status. The driver may cut the parts into buffers as it
 * likes: virtio-v1.3 §2.7.4.2. false when there is no header or no status byte. */
static bool parse(struct request *r, struct virtio_blk_outhdr *header)
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

static uint8_t execute(struct vmm_blk *blk, struct request *r, uint64_t sector)
{
	switch (r->type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		return read_or_write(blk, r, sector);
	case VIRTIO_BLK_T_FLUSH:
		return flush(blk);
	case VIRTIO_BLK_T_GET_ID:
		count(&blk->stats.others, 1);
		r->done = vmm_iov_write(r->data, r->nr_data, 0, blk->config.serial, ID_BYTES);
		return VIRTIO_BLK_S_OK;
	default:
		count(&blk->stats.others, 1);
		return VIRTIO_BLK_S_UNSUPP;
	}
}

/* used.len counts what was written without a gap from the first writable byte on, so the status
 * byte counts only where all data before it was filled: virtio-v1.3 §2.7.8.2. */
static void complete(struct vmm_blk *blk, struct request *r, uint8_t status)
{
	const uint64_t filled = r->type == VIRTIO_BLK_T_OUT ? 0 : r->done;
	const uint64_t room = r->chain.write_len - 1;

	if (status != VIRTIO_BLK_S_OK)
		count(&blk->stats.errors, 1);
	/* SAFETY: the last writable byte of a chain that vmm_vq_pop() found to be RAM. */
	*(volatile uint8_t *)r->status = status;
	vmm_vq_push(blk->service.vq, &r->chain, filled + (filled == room));
}

static int serve(struct vmm_service *s)
{
	struct vmm_blk *blk = (struct vmm_blk *)s; /* its first member */
	struct request *r = &blk->request;
	struct virtio_blk_outhdr header;
	int rc;

	rc = vmm_vq_pop(s->vq, &r->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!parse(r, &header)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	complete(blk, r, execute(blk, r, le64toh(header.sector)));
	return VMM_VQ_CHAIN;
}

/* ---- life ---- */

struct vmm_blk *vmm_blk_create(struct vmm_loop *loop, const struct vmm_blk_config *config)
{
	struct vmm_blk *blk;

	if (config->align & (config->align - 1) || config->size > INT64_MAX - SECTOR) {
		errno = EINVAL;
		return NULL;
	}
	blk = calloc(1, sizeof(*blk) + config->queue_size * sizeof(blk->iov[0]));
	if (!blk)
		return NULL;
	blk->config = *config;
	blk->sectors = (config->size + SECTOR - 1) / SECTOR;
	blk->request.chain.iov = blk->iov;
	blk->service.loop = loop;
	blk->service.serve = serve;
	return blk;
}

void vmm_blk_destroy(struct vmm_blk *blk)
{
	if (!blk)
		return;
	vmm_blk_stop(blk);
	free(blk);
}

int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config)
{
	if (config->vq.size > blk->config.queue_size)
		return -EINVAL;
	/* Without FLUSH a finished write must be on the disk: virtio-v1.3 §5.2.6.2. */
	blk->write_flags = config->vq.features >> VIRTIO_BLK_F_FLUSH & 1 ? 0 : RWF_DSYNC;
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
