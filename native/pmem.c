/* virtio-pmem: a flush is fdatasync(2), on the device's own I/O thread. The memory itself never
 * comes here: the guest has the file mapped. */
#include "pmem.h"

#include <errno.h>
#include <linux/virtio_pmem.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The answer is 4 bytes and no buffer is empty, so that it lies in no more buffers. */
#define RESPONSE sizeof(struct virtio_pmem_resp)

struct request {
	struct vmm_chain chain;
	struct iovec iov[RESPONSE];
	bool known;
};

struct vmm_pmem {
	struct vmm_service service;
	int fd;
	uint16_t queue_size;
	uint32_t pending;
	/* Once a sync failed, pages may be gone that no later one tells of. */
	atomic_bool spoiled;
	_Atomic uint64_t flushes, syncs, failed;
	struct request *requests;
	struct iovec iov[];
};

static int serve(struct vmm_service *s)
{
	struct vmm_pmem *pmem = (struct vmm_pmem *)s; /* its first member */
	struct vmm_chain chain = { .iov = pmem->iov };
	struct virtio_pmem_req req;
	struct request *r;
	uint8_t type[sizeof(req.type)];
	int rc = vmm_vq_pop(s->vq, &chain);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (vmm_iov_read(chain.iov, chain.nr_read, 0, type, sizeof(type)) != sizeof(type) ||
	    chain.write_len < RESPONSE) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	/* Never more than the queue is long: a head is in flight once. */
	r = &pmem->requests[pmem->pending++];
	r->known = vmm_get_le(type, sizeof(type)) == VIRTIO_PMEM_REQ_TYPE_FLUSH;
	r->chain = chain;
	r->chain.iov = r->iov;
	r->chain.nr_read = 0;
	if (r->chain.nr_write > RESPONSE)
		r->chain.nr_write = RESPONSE;
	memcpy(r->iov, chain.iov + chain.nr_read, r->chain.nr_write * sizeof(r->iov[0]));
	return VMM_VQ_CHAIN;
}

static void sync_file(struct vmm_pmem *pmem)
{
	int rc;

	do
		rc = fdatasync(pmem->fd);
	while (rc < 0 && errno == EINTR);
	pmem->syncs++;
	if (rc < 0)
		pmem->spoiled = true;
}

/* One sync for all that asked meanwhile. */
static void flush(struct vmm_service *s)
{
	struct vmm_pmem *pmem = (struct vmm_pmem *)s;
	uint8_t ret[RESPONSE];

	if (!pmem->pending)
		return;
	sync_file(pmem);
	for (uint32_t i = 0; i < pmem->pending; i++) {
		struct request *r = &pmem->requests[i];
		const bool ok = r->known && !pmem->spoiled;

		vmm_put_le(ret, ok ? 0 : UINT32_MAX, sizeof(ret));
		/* SAFETY: the iov is RAM, and holds at least RESPONSE bytes. */
		vmm_iov_write(r->chain.iov, r->chain.nr_write, 0, ret, sizeof(ret));
		vmm_vq_push(s->vq, &r->chain, sizeof(ret));
		pmem->flushes++;
		if (!ok)
			pmem->failed++;
	}
	pmem->pending = 0;
}

struct vmm_pmem *vmm_pmem_create(struct vmm_loop *loop, int fd, uint16_t queue_size)
{
	struct vmm_pmem *pmem = calloc(1, sizeof(*pmem) + queue_size * sizeof(pmem->iov[0]));

	if (!pmem)
		return NULL;
	pmem->requests = calloc(queue_size, sizeof(pmem->requests[0]));
	if (!pmem->requests) {
		free(pmem);
		return NULL;
	}
	pmem->fd = fd;
	pmem->queue_size = queue_size;
	vmm_service_init(&pmem->service, loop, serve);
	pmem->service.flush = flush;
	return pmem;
}

void vmm_pmem_destroy(struct vmm_pmem *pmem)
{
	if (!pmem)
		return;
	vmm_service_fini(&pmem->service);
	free(pmem->requests);
	free(pmem);
}

int vmm_pmem_start(struct vmm_pmem *pmem, const struct vmm_service_config *config)
{
	if (config->vq.size > pmem->queue_size)
		return -EINVAL;
	return vmm_service_start(&pmem->service, config);
}

void vmm_pmem_stop(struct vmm_pmem *pmem)
{
	if (pmem)
		vmm_service_stop(&pmem->service);
}

void vmm_pmem_spoil(struct vmm_pmem *pmem)
{
	pmem->spoiled = true;
}

void vmm_pmem_stats(const struct vmm_pmem *pmem, struct vmm_pmem_stats *out)
{
	out->flushes = pmem->flushes;
	out->syncs = pmem->syncs;
	out->failed = pmem->failed;
}
