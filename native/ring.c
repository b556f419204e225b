/* Virtqueues, device side: what both formats share. The walks are in ring_split.c and
 * ring_packed.c; the readable twins in vmm/devices/virtio/; one test suite runs all. */
#include "ring_impl.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>

#define MAX_SIZE 32768

static bool places_ok(const struct vmm_vq_config *c, bool packed)
{
	const uint32_t size = c->size;

	if (!size || size > MAX_SIZE || c->desc & 15)
		return false;
	if (packed)
		return !(c->avail & 3) && !(c->used & 3) && (c->avail_at & ~VMM_VQ_LAPPED) < size &&
		       (c->used_at & ~VMM_VQ_LAPPED) < size;
	return !(size & (size - 1)) && !(c->avail & 1) && !(c->used & 3);
}

static void restore(struct vmm_vq *vq, const struct vmm_vq_config *config)
{
	const uint16_t bits = vq->packed ? VMM_VQ_LAPPED : 0;

	vq->last_avail = vq->avail_idx = config->avail_at & (uint16_t)~bits;
	vq->used_idx = vq->told_used = config->used_at & (uint16_t)~bits;
	vq->avail_wrap = !(config->avail_at & bits);
	vq->used_wrap = !(config->used_at & bits);
}

struct vmm_vq *vmm_vq_create(const struct vmm_mem *mem, const struct vmm_vq_config *config)
{
	const bool packed = config->features >> VIRTIO_F_RING_PACKED & 1;
	const uint64_t size = config->size;
	struct vmm_vq *vq;

	if (!places_ok(config, packed)) {
		errno = EINVAL;
		return NULL;
	}
	vq = calloc(1, sizeof(*vq) + size * sizeof(vq->taken[0]));
	if (!vq)
		return NULL;
	vq->mem = mem;
	vq->packed = packed;
	vq->size = (uint16_t)size;
	vq->mask = (uint16_t)(size - 1);
	vq->event_idx = config->features >> VIRTIO_RING_F_EVENT_IDX & 1;
	vq->indirect = config->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	restore(vq, config);
	vq->desc = vmm_mem_at(mem, config->desc, VMM_VQ_DESC_SIZE * size);
	vq->avail = vmm_mem_at(mem, config->avail, packed ? 4 : 6 + 2 * size);
	vq->used = vmm_mem_at(mem, config->used, packed ? 4 : 6 + 8 * size);
	if (!vq->desc || !vq->avail || !vq->used) {
		free(vq);
		errno = EFAULT;
		return NULL;
	}
	return vq;
}

void vmm_vq_destroy(struct vmm_vq *vq)
{
	free(vq);
}

void vmm_vq_state(const struct vmm_vq *vq, uint16_t *avail_at, uint16_t *used_at)
{
	*avail_at = vq->last_avail | (vq->avail_wrap ? 0 : VMM_VQ_LAPPED);
	*used_at = vq->used_idx | (vq->used_wrap ? 0 : VMM_VQ_LAPPED);
}

int vmm_vq_pop(struct vmm_vq *vq, struct vmm_chain *chain)
{
	if (vq->verdict)
		return vq->verdict;
	return vq->packed ? vmm_packed_pop(vq, chain) : vmm_split_pop(vq, chain);
}

void vmm_vq_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
		      uint64_t written)
{
	if (vq->packed)
		vmm_packed_push_span(vq, chains, nr, written);
	else
		vmm_split_push_span(vq, chains, nr, written);
}

void vmm_vq_push(struct vmm_vq *vq, const struct vmm_chain *chain, uint64_t written)
{
	vmm_vq_push_span(vq, chain, 1, written);
}

int vmm_vq_should_notify(struct vmm_vq *vq)
{
	return vq->packed ? vmm_packed_should_notify(vq) : vmm_split_should_notify(vq);
}

int vmm_vq_enable_kicks(struct vmm_vq *vq)
{
	return vq->packed ? vmm_packed_enable_kicks(vq) : vmm_split_enable_kicks(vq);
}

void vmm_vq_disable_kicks(struct vmm_vq *vq)
{
	if (vq->packed)
		vmm_packed_disable_kicks(vq);
	else
		vmm_split_disable_kicks(vq);
}

void vmm_vq_refuse(struct vmm_vq *vq)
{
	if (!vq->verdict)
		vq->verdict = VMM_VQ_REQUEST;
}

int vmm_vq_broken(const struct vmm_vq *vq)
{
	return vq->verdict;
}

uint32_t vmm_vq_inflight(const struct vmm_vq *vq)
{
	return vq->nr_inflight;
}

const char *vmm_vq_verdict_name(int verdict)
{
	static const char *const names[VMM_VQ_NR_VERDICTS] = {
		[VMM_VQ_EMPTY] = "empty",
		[VMM_VQ_CHAIN] = "chain",
		[VMM_VQ_IDX_JUMP] = "idx_jump",
		[VMM_VQ_HEAD_RANGE] = "head_range",
		[VMM_VQ_HEAD_INFLIGHT] = "head_inflight",
		[VMM_VQ_NEXT_RANGE] = "next_range",
		[VMM_VQ_CHAIN_LONG] = "chain_long",
		[VMM_VQ_CHAIN_BYTES] = "chain_bytes",
		[VMM_VQ_LEN_ZERO] = "len_zero",
		[VMM_VQ_ORDER] = "order",
		[VMM_VQ_ADDR] = "addr",
		[VMM_VQ_INDIRECT_OFF] = "indirect_off",
		[VMM_VQ_INDIRECT_NEST] = "indirect_nest",
		[VMM_VQ_INDIRECT_NEXT] = "indirect_next",
		[VMM_VQ_INDIRECT_LEN] = "indirect_len",
		[VMM_VQ_INDIRECT_ADDR] = "indirect_addr",
		[VMM_VQ_REQUEST] = "request",
	};

	return verdict >= 0 && verdict < VMM_VQ_NR_VERDICTS ? names[verdict] : "?";
}
