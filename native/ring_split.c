/* Split virtqueues, device side: virtio-v1.3 §2.7. The readable twin is
 * vmm/devices/virtio/split.py. */
#include "ring_impl.h"

static const uint8_t *avail_entry(const struct vmm_vq *vq, uint16_t at)
{
	return vq->avail + 4 + 2 * (size_t)(at & vq->mask);
}

static const uint8_t *used_event(const struct vmm_vq *vq)
{
	return vq->avail + 4 + 2 * (size_t)vq->size;
}

static uint8_t *avail_event(const struct vmm_vq *vq)
{
	return vq->used + 4 + 8 * (size_t)vq->size;
}

/* The walk of one chain: what table it is in and what it has gathered. */
struct walk {
	const uint8_t *table;
	uint32_t entries, at;
	bool in_indirect;
};

static int enter_indirect(const struct vmm_vq *vq, struct walk *w, uint64_t addr, uint32_t len,
			  uint16_t flags)
{
	if (!vq->indirect)
		return VMM_VQ_INDIRECT_OFF;
	if (w->in_indirect)
		return VMM_VQ_INDIRECT_NEST;
	if (flags & VRING_DESC_F_NEXT)
		return VMM_VQ_INDIRECT_NEXT;
	if (!len || len % VMM_VQ_DESC_SIZE || len / VMM_VQ_DESC_SIZE > vq->size)
		return VMM_VQ_INDIRECT_LEN;
	w->table = vmm_mem_at(vq->mem, addr, len);
	if (!w->table)
		return VMM_VQ_INDIRECT_ADDR;
	w->entries = len / VMM_VQ_DESC_SIZE;
	w->at = 0;
	w->in_indirect = true;
	return VMM_VQ_CHAIN;
}

static int walk_chain(const struct vmm_vq *vq, struct vmm_chain *c)
{
	struct walk w = { .table = vq->desc, .entries = vq->size, .at = c->head };

	for (;;) {
		/* SAFETY: at < entries, and the table is RAM; the descriptor is loaded once. */
		const size_t offset = (size_t)w.at * VMM_VQ_DESC_SIZE;
		const struct vmm_word64 *d = (const void *)(w.table + offset);
		const uint64_t addr = le64toh(d[0].v), rest = le64toh(d[1].v);
		const uint32_t len = (uint32_t)rest;
		const uint16_t flags = (uint16_t)(rest >> 32), next = (uint16_t)(rest >> 48);
		int rc;

		if (flags & VRING_DESC_F_INDIRECT) {
			rc = enter_indirect(vq, &w, addr, len, flags);
			if (rc != VMM_VQ_CHAIN)
				return rc;
			continue;
		}
		rc = vmm_vq_add_buffer(vq, c, addr, len, flags & VRING_DESC_F_WRITE);
		if (rc != VMM_VQ_CHAIN || !(flags & VRING_DESC_F_NEXT))
			return rc;
		if (next >= w.entries)
			return VMM_VQ_NEXT_RANGE;
		w.at = next;
	}
}

int vmm_split_pop(struct vmm_vq *vq, struct vmm_chain *c)
{
	int rc;

	if (vq->last_avail == vq->avail_idx) {
		vq->avail_idx = vmm_load16(vq->avail + 2);
		if (vq->last_avail == vq->avail_idx)
			return VMM_VQ_EMPTY;
		if ((uint16_t)(vq->avail_idx - vq->last_avail) > vq->size)
			return vq->verdict = VMM_VQ_IDX_JUMP;
		/* The entries were written before the index that shows them. */
		atomic_thread_fence(memory_order_acquire);
	}
	c->head = vmm_load16(avail_entry(vq, vq->last_avail));
	vmm_vq_clear_chain(c);
	if (c->head >= vq->size)
		return vq->verdict = VMM_VQ_HEAD_RANGE;
	if (vq->taken[c->head])
		return vq->verdict = VMM_VQ_HEAD_INFLIGHT;
	rc = walk_chain(vq, c);
	if (rc != VMM_VQ_CHAIN)
		return vq->verdict = (uint8_t)rc;
	vq->taken[c->head] = 1;
	vq->nr_inflight++;
	vq->last_avail++;
	return VMM_VQ_CHAIN;
}

/* Fills a used entry that the driver does not see yet. */
static void put(struct vmm_vq *vq, const struct vmm_chain *c, uint64_t written)
{
	uint8_t *entry = vq->used + 4 + 8 * (size_t)(vq->used_idx & vq->mask);
	const uint32_t len = vmm_vq_used_len(c, written);

	if (c->head >= vq->size || !vq->taken[c->head])
		return; /* a head completes exactly once */
	/* SAFETY: the entry is inside the used ring, which is aligned RAM. */
	__atomic_store_n((uint32_t *)(void *)entry, htole32(c->head), __ATOMIC_RELAXED);
	__atomic_store_n((uint32_t *)(void *)(entry + 4), htole32(len), __ATOMIC_RELAXED);
	vq->taken[c->head] = 0;
	vq->nr_inflight--;
	vq->used_idx++;
}

void vmm_split_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
			 uint64_t written)
{
	for (uint32_t i = 0; i < nr; i++) {
		put(vq, &chains[i], written);
		written -= written < chains[i].write_len ? written : chains[i].write_len;
	}
	/* The buffers and the entries are seen before the index that shows them. */
	atomic_thread_fence(memory_order_release);
	vmm_store16(vq->used + 2, vq->used_idx);
}

int vmm_split_should_notify(struct vmm_vq *vq)
{
	const uint16_t now = vq->used_idx, old = vq->told_used;

	if (now == old)
		return 0;
	vq->told_used = now;
	/* used.idx is out before what the driver says about interrupts is read. */
	atomic_thread_fence(memory_order_seq_cst);
	if (!vq->event_idx)
		return !(vmm_load16(vq->avail) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(vmm_load16(used_event(vq)), now, old);
}

int vmm_split_enable_kicks(struct vmm_vq *vq)
{
	if (vq->event_idx)
		vmm_store16(avail_event(vq), vq->last_avail);
	else
		vmm_store16(vq->used, 0);
	/* The driver sees that we want kicks, or we see what it added before it did. */
	atomic_thread_fence(memory_order_seq_cst);
	return !vq->verdict && vmm_load16(vq->avail + 2) != vq->last_avail;
}

void vmm_split_disable_kicks(struct vmm_vq *vq)
{
	/* With EVENT_IDX, leaving avail_event behind is what keeps the driver quiet. */
	if (!vq->event_idx)
		vmm_store16(vq->used, VRING_USED_F_NO_NOTIFY);
}
