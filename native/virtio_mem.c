/* virtio-mem. All of the region is in the table of RAM and in the VM, whatever is plugged: an
 * unplugged block has no memory of the host's behind it until somebody touches it. Blocks are what
 * the driver and the device agree on; a guest that touches what it has unplugged gets zeros, and
 * at most the region's size of memory, which is what the user set as its maximum. */
#define _GNU_SOURCE
#include "virtio_mem.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_mem.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* How much more than requested the driver may use, so that it can go on where it finds a block
 * that it cannot give back. What QEMU has: two of Linux's memory blocks. */
#define USABLE_EXTRA (256ULL << 20)

struct vmm_virtio_mem {
	struct vmm_service service; /* first */
	struct vmm_virtio_mem_config config;
	struct iovec *iov;
	pthread_mutex_t lock; /* what follows */
	uint64_t usable, plugged, requested;
	struct vmm_virtio *virtio; /* while started */
	bool untold;		   /* requested changed while it was not */
	uint64_t bits[];	   /* one per block: plugged */
};

_Static_assert(sizeof(struct virtio_mem_config) == VMM_VIRTIO_MEM_CONFIG, "virtio-v1.3 §5.15.4");

/* ---- blocks; the lock is held ------------------------------------------------------------- */

static uint64_t usable_for(const struct vmm_virtio_mem *m)
{
	const uint64_t size = m->config.size;

	if (!m->requested)
		return 0;
	return size - m->requested < USABLE_EXTRA ? size : m->requested + USABLE_EXTRA;
}

static bool test(const struct vmm_virtio_mem *m, uint64_t block)
{
	return m->bits[block / 64] >> block % 64 & 1;
}

/* How many of the blocks first..first+nr are plugged. */
static uint64_t count(const struct vmm_virtio_mem *m, uint64_t first, uint64_t nr)
{
	uint64_t n = 0;

	for (uint64_t i = first; i < first + nr; i++)
		n += test(m, i);
	return n;
}

static void mark(struct vmm_virtio_mem *m, uint64_t first, uint64_t nr, bool on)
{
	for (uint64_t i = first; i < first + nr; i++) {
		if (on)
			m->bits[i / 64] |= 1ULL << i % 64;
		else
			m->bits[i / 64] &= ~(1ULL << i % 64);
	}
}

/* virtio-v1.3 §5.15.6.2: aligned, not empty, within what is usable. */
static bool valid(const struct vmm_virtio_mem *m, uint64_t addr, uint16_t nr)
{
	const uint64_t size = nr * m->config.block; /* below 2^16 * 2^47 */

	return nr && addr >= m->config.addr && !((addr - m->config.addr) & (m->config.block - 1)) &&
	       addr - m->config.addr <= m->usable && size <= m->usable - (addr - m->config.addr);
}

static bool drop(struct vmm_virtio_mem *m, uint64_t addr, uint64_t size)
{
	return vmm_mem_discard(m->config.mem, addr, size) == (int64_t)size;
}

static uint16_t plug(struct vmm_virtio_mem *m, uint64_t addr, uint16_t nr)
{
	const uint64_t first = (addr - m->config.addr) / m->config.block;
	const uint64_t size = nr * m->config.block;

	if (!valid(m, addr, nr) || count(m, first, nr))
		return VIRTIO_MEM_RESP_ERROR;
	if (m->plugged >= m->requested || size > m->requested - m->plugged)
		return VIRTIO_MEM_RESP_NACK;
	/* What was written to it while it was unplugged is not for the guest to find. */
	if (!drop(m, addr, size))
		return VIRTIO_MEM_RESP_BUSY;
	/* SAFETY: within the region; nothing is read or written, the kernel adds pages. */
	if (m->config.populate && vmm_madvise(vmm_mem_at(m->config.mem, addr, size), size,
					      MADV_POPULATE_WRITE)) {
		drop(m, addr, size);
		return VIRTIO_MEM_RESP_BUSY;
	}
	mark(m, first, nr, true);
	m->plugged += size;
	return VIRTIO_MEM_RESP_ACK;
}

static uint16_t unplug(struct vmm_virtio_mem *m, uint64_t addr, uint16_t nr)
{
	const uint64_t first = (addr - m->config.addr) / m->config.block;

	if (!valid(m, addr, nr) || count(m, first, nr) != nr)
		return VIRTIO_MEM_RESP_ERROR;
	if (!drop(m, addr, nr * m->config.block))
		return VIRTIO_MEM_RESP_BUSY;
	mark(m, first, nr, false);
	m->plugged -= nr * m->config.block;
	return VIRTIO_MEM_RESP_ACK;
}

static uint16_t unplug_all(struct vmm_virtio_mem *m)
{
	if (!drop(m, m->config.addr, m->config.size))
		return VIRTIO_MEM_RESP_BUSY;
	mark(m, 0, m->config.size / m->config.block, false);
	m->plugged = 0;
	m->usable = usable_for(m);
	return VIRTIO_MEM_RESP_ACK;
}

static uint16_t state(const struct vmm_virtio_mem *m, uint64_t addr, uint16_t nr, uint16_t *out)
{
	uint64_t on;

	if (!valid(m, addr, nr))
		return VIRTIO_MEM_RESP_ERROR;
	on = count(m, (addr - m->config.addr) / m->config.block, nr);
	*out = on == nr ? VIRTIO_MEM_STATE_PLUGGED :
	       on	? VIRTIO_MEM_STATE_MIXED :
			  VIRTIO_MEM_STATE_UNPLUGGED;
	return VIRTIO_MEM_RESP_ACK;
}

static void fill_config(const struct vmm_virtio_mem *m, uint8_t *out)
{
	const struct virtio_mem_config config = {
		.block_size = htole64(m->config.block),
		.addr = htole64(m->config.addr),
		.region_size = htole64(m->config.size),
		.usable_region_size = htole64(m->usable),
		.plugged_size = htole64(m->plugged),
		.requested_size = htole64(m->requested),
	};

	memcpy(out, &config, sizeof(config));
}

static void publish(struct vmm_virtio_mem *m, bool notify)
{
	uint8_t config[VMM_VIRTIO_MEM_CONFIG];

	fill_config(m, config);
	vmm_virtio_config(m->virtio, config, sizeof(config), notify);
}

/* ---- the queue ---------------------------------------------------------------------------- */

static void answer(struct vmm_virtio_mem *m, const struct virtio_mem_req *req,
		   struct virtio_mem_resp *resp)
{
	/* The three forms of a request have their fields at the same places. */
	const uint64_t addr = le64toh(req->u.plug.addr);
	const uint16_t nr = le16toh(req->u.plug.nb_blocks);
	uint16_t type = VIRTIO_MEM_RESP_ERROR, what = 0;

	pthread_mutex_lock(&m->lock);
	switch (le16toh(req->type)) {
	case VIRTIO_MEM_REQ_PLUG:
		type = plug(m, addr, nr);
		break;
	case VIRTIO_MEM_REQ_UNPLUG:
		type = unplug(m, addr, nr);
		break;
	case VIRTIO_MEM_REQ_UNPLUG_ALL:
		type = unplug_all(m);
		break;
	case VIRTIO_MEM_REQ_STATE:
		type = state(m, addr, nr, &what);
		break;
	}
	/* virtio-v1.3 §5.15.6.2: the driver sees the new size, but is not told. */
	if (type == VIRTIO_MEM_RESP_ACK)
		publish(m, false);
	pthread_mutex_unlock(&m->lock);
	resp->type = htole16(type);
	resp->u.state.state = htole16(what);
}

static int serve(struct vmm_service *s)
{
	struct vmm_virtio_mem *m = (struct vmm_virtio_mem *)s; /* its first member */
	struct vmm_chain chain = { .iov = m->iov };
	struct virtio_mem_resp resp = { 0 };
	struct virtio_mem_req req;
	int rc = vmm_vq_pop(s->vq, &chain);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (chain.read_len < sizeof(req) || chain.write_len < sizeof(resp)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	vmm_iov_read(chain.iov, chain.nr_read, 0, &req, sizeof(req));
	answer(m, &req, &resp);
	vmm_iov_write(chain.iov + chain.nr_read, chain.nr_write, 0, &resp, sizeof(resp));
	vmm_vq_push(s->vq, &chain, sizeof(resp));
	return VMM_VQ_CHAIN;
}

/* ---- life --------------------------------------------------------------------------------- */

struct vmm_virtio_mem *vmm_virtio_mem_create(struct vmm_loop *loop,
					     const struct vmm_virtio_mem_config *config)
{
	const uint64_t block = config->block;
	struct vmm_virtio_mem *m;

	if (!block || (block & (block - 1)) || block > 1ULL << 47 || !config->size ||
	    ((config->addr | config->size | config->requested) & (block - 1)) ||
	    config->requested > config->size ||
	    !vmm_mem_at(config->mem, config->addr, config->size)) {
		errno = EINVAL;
		return NULL;
	}
	m = calloc(1, sizeof(*m) + (config->size / block / 64 + 1) * sizeof(m->bits[0]));
	if (!m)
		return NULL;
	m->iov = calloc(config->queue_size, sizeof(*m->iov));
	if (!m->iov) {
		free(m);
		return NULL;
	}
	m->config = *config;
	m->requested = config->requested;
	m->usable = usable_for(m);
	pthread_mutex_init(&m->lock, NULL);
	vmm_service_init(&m->service, loop, serve);
	return m;
}

void vmm_virtio_mem_destroy(struct vmm_virtio_mem *m)
{
	if (!m)
		return;
	vmm_service_fini(&m->service);
	pthread_mutex_destroy(&m->lock);
	free(m->iov);
	free(m);
}

int vmm_virtio_mem_start(struct vmm_virtio_mem *m, const struct vmm_service_config *config)
{
	int rc;

	if (config->vq.size > m->config.queue_size)
		return -EINVAL;
	pthread_mutex_lock(&m->lock);
	m->virtio = config->virtio;
	if (m->untold)
		publish(m, true);
	m->untold = false;
	pthread_mutex_unlock(&m->lock);
	rc = vmm_service_start(&m->service, config);
	if (rc)
		vmm_virtio_mem_stop(m);
	return rc;
}

void vmm_virtio_mem_stop(struct vmm_virtio_mem *m)
{
	vmm_service_stop(&m->service);
	pthread_mutex_lock(&m->lock);
	m->virtio = NULL;
	pthread_mutex_unlock(&m->lock);
}

void vmm_virtio_mem_config(struct vmm_virtio_mem *m, uint8_t *out)
{
	pthread_mutex_lock(&m->lock);
	fill_config(m, out);
	pthread_mutex_unlock(&m->lock);
}

int vmm_virtio_mem_request(struct vmm_virtio_mem *m, uint64_t requested)
{
	if (requested > m->config.size || (requested & (m->config.block - 1)))
		return -EINVAL;
	pthread_mutex_lock(&m->lock);
	m->requested = requested;
	/* It grows at once and shrinks only when the driver unplugs all. */
	if (usable_for(m) > m->usable)
		m->usable = usable_for(m);
	m->untold = !m->virtio;
	if (m->virtio)
		publish(m, true);
	pthread_mutex_unlock(&m->lock);
	return 0;
}

void vmm_virtio_mem_reset(struct vmm_virtio_mem *m)
{
	pthread_mutex_lock(&m->lock);
	unplug_all(m);
	pthread_mutex_unlock(&m->lock);
}
