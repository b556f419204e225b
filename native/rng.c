/* virtio-rng: fills what the driver offers from getrandom(2). */
#include "rng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

/* One chain gets at most this much, so that no guest keeps the I/O thread busy for long; a device
 * may return less than was asked for. */
#define MAX_BYTES 65536

struct vmm_rng {
	struct vmm_service service;
	uint16_t queue_size;
	_Atomic uint64_t bytes;
	struct iovec iov[];
};

static uint64_t fill(const struct vmm_chain *c)
{
	uint64_t total = 0;

	for (uint32_t i = 0; i < c->nr_write && total < MAX_BYTES; i++) {
		const struct iovec *iov = &c->iov[c->nr_read + i];
		size_t len = iov->iov_len, done = 0;

		if (len > MAX_BYTES - total)
			len = MAX_BYTES - total;
		while (done < len) {
			/* SAFETY: the iov is RAM; the kernel writes no more than len. */
			ssize_t n = getrandom((uint8_t *)iov->iov_base + done, len - done, 0);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				return total + done;
			done += (size_t)n;
		}
		total += done;
	}
	return total;
}

static int serve(struct vmm_service *s)
{
	struct vmm_rng *rng = (struct vmm_rng *)s; /* its first member */
	struct vmm_chain chain = { .iov = rng->iov };
	uint64_t n;
	int rc = vmm_vq_pop(s->vq, &chain);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!chain.write_len) {
		/* virtio-v1.3 §5.4.6.1: the driver must offer something to fill. */
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	n = fill(&chain);
	rng->bytes += n;
	vmm_vq_push(s->vq, &chain, n);
	return VMM_VQ_CHAIN;
}

struct vmm_rng *vmm_rng_create(struct vmm_loop *loop, uint16_t queue_size)
{
	struct vmm_rng *rng = calloc(1, sizeof(*rng) + queue_size * sizeof(rng->iov[0]));

	if (!rng)
		return NULL;
	rng->queue_size = queue_size;
	vmm_service_init(&rng->service, loop, serve);
	return rng;
}

void vmm_rng_destroy(struct vmm_rng *rng)
{
	if (!rng)
		return;
	vmm_service_fini(&rng->service);
	free(rng);
}

int vmm_rng_start(struct vmm_rng *rng, const struct vmm_service_config *config)
{
	if (config->vq.size > rng->queue_size)
		return -EINVAL;
	return vmm_service_start(&rng->service, config);
}

void vmm_rng_stop(struct vmm_rng *rng)
{
	vmm_service_stop(&rng->service);
}

uint64_t vmm_rng_bytes(const struct vmm_rng *rng)
{
	return rng->bytes;
}
