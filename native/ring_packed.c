/* Packed virtqueues, device side: virtio-v1.3 §2.8. The readable twin is
 * vmm/devices/virtio/packed.py. */
#include "ring_impl.h"

#define AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define USED (1u << VRING_PACKED_DESC_F_USED)

/* Of a descriptor only the second half says whether it is one, so it is loaded first. */
static uint64_t load_rest(const uint8_t *d)
{
	/* SAFETY: d is inside the descriptor ring, which is RAM aligned to 16. */
	return le64toh(__atomic_load_n((const uint64_t *)(const void *)(d + 8), __ATOMIC_ACQUIRE));
}

static bool is_available(uint16_t flags, bool wrap)
{
	return (flags & (AVAIL | USED)) == (wrap ? AVAIL : USED);
}

static const uint8_t *ring_at(const struct vmm_vq *vq, uint16_t at)
{
	return vq->desc + (size_t)at * VMM_VQ_DESC_SIZE;
}

/* All of the chain, when the one descriptor in the ring leads to a table. Its descriptors are in
 * order and have no flag but WRITE. virtio-v1.3 §2.8.7. */
static int walk_table(const struct vmm_vq *vq, struct vmm_chain *c, uint64_t addr, uint32_t len)
{
	const uint8_t *table;

	if (!len || len % VMM_VQ_DESC_SIZE || len / VMM_VQ_DESC_SIZE > vq->size)
		return VMM_VQ_INDIRECT_LEN;
	table = vmm_mem_at(vq->mem, addr, len);
	if (!table)
		return VMM_VQ_INDIRECT_ADDR;
	for (uint32_t i = 0; i < len / VMM_VQ_DESC_SIZE; i++) {
		/* SAFETY: within len bytes of RAM; the descriptor is loaded once. */
		const struct vmm_word64 *d = (const void *)(table + (size_t)i * VMM_VQ_DESC_SIZE);
		const uint64_t buffer = le64toh(d[0].v), rest = le64toh(d[1].v);
		const int rc = vmm_vq_add_buffer(vq, c, buffer, (uint32_t)rest,
						 rest >> 48 & VRING_DESC_F_WRITE);

		if (rc != VMM_VQ_CHAIN)
			return rc;
	}
	return VMM_VQ_CHAIN;
}

/* From the head, whose second half is `rest`; *taken gets how many descriptors there were. The
 * buffer id is the last one's. */
static int walk_ring(const struct vmm_vq *vq, struct vmm_chain *c, uint64_t rest, uint32_t *taken)
{
	const uint8_t *d = ring_at(vq, vq->last_avail);
	uint32_t at = vq->last_avail;

	for (*taken = 1;; ++*taken) {
		/* SAFETY: as load_rest(); loaded after the half that made it available. */
		const uint64_t addr = le64toh(((const struct vmm_word64 *)(const void *)d)->v);
		const uint32_t len = (uint32_t)rest;
		const uint16_t flags = (uint16_t)(rest >> 48);
		int rc;

		c->head = (uint16_t)(rest >> 32);
		if (flags & VRING_DESC_F_INDIRECT) {
			if (!vq->indirect)
				return VMM_VQ_INDIRECT_OFF;
			if (*taken > 1 || flags & VRING_DESC_F_NEXT)
				return VMM_VQ_INDIRECT_NEXT;
			return walk_table(vq, c, addr, len);
		}
		rc = vmm_vq_add_buffer(vq, c, addr, len, flags & VRING_DESC_F_WRITE);
		if (rc != VMM_VQ_CHAIN || !(flags & VRING_DESC_F_NEXT))
			return rc;
		/* What comes next would be a descriptor that is ours already. */
		if (vq->nr_taken + *taken == vq->size)
			return VMM_VQ_CHAIN_LONG;
		at = at + 1 == vq->size ? 0 : at + 1;
		d = ring_at(vq, (uint16_t)at);
		rest = load_rest(d);
	}
}

int vmm_packed_pop(struct vmm_vq *vq, struct vmm_chain *c)
{
	const uint64_t rest = load_rest(ring_at(vq, vq->last_avail));
	uint32_t taken, next;
	int rc;

	if (!is_available((uint16_t)(rest >> 48), vq->avail_wrap))
		return VMM_VQ_EMPTY;
	if (vq->nr_taken == vq->size)
		return vq->verdict = VMM_VQ_IDX_JUMP;
	vmm_vq_clear_chain(c);
	rc = walk_ring(vq, c, rest, &taken);
	if (rc != VMM_VQ_CHAIN)
		return vq->verdict = (uint8_t)rc;
	if (c->head >= vq->size)
		return vq->verdict = VMM_VQ_HEAD_RANGE;
	if (vq->taken[c->head])
		return vq->verdict = VMM_VQ_HEAD_INFLIGHT;
	vq->taken[c->head] = (uint16_t)taken;
	vq->nr_taken += taken;
	vq->nr_inflight++;
	next = vq->last_avail + taken;
	if (next >= vq->size) {
		next -= vq->size;
		vq->avail_wrap = !vq->avail_wrap;
	}
	vq->last_avail = (uint16_t)next;
	return VMM_VQ_CHAIN;
}

/* Moves on past a chain; what tells the driver so is *word, to be stored at what is returned. NULL
 * if the chain is not in flight: a buffer completes exactly once. */
static uint8_t *retire(struct vmm_vq *vq, const struct vmm_chain *c, uint64_t written,
		       uint64_t *word)
{
	const uint32_t len = vmm_vq_used_len(c, written);
	uint8_t *d = vq->desc + (size_t)vq->used_idx * VMM_VQ_DESC_SIZE;
	uint16_t flags = vq->used_wrap ? AVAIL | USED : 0;
	uint32_t taken, next;

	if (c->head >= vq->size || !vq->taken[c->head])
		return NULL;
	if (len)
		flags |= VRING_DESC_F_WRITE;
	taken = vq->taken[c->head];
	vq->taken[c->head] = 0;
	vq->nr_taken -= taken;
	vq->nr_inflight--;
	vq->untold += taken;
	next = vq->used_idx + taken;
	if (next >= vq->size) {
		next -= vq->size;
		vq->used_wrap = !vq->used_wrap;
	}
	vq->used_idx = (uint16_t)next;
	*word = htole64(len | (uint64_t)c->head << 32 | (uint64_t)flags << 48);
	return d;
}

static void store_used(uint8_t *d, uint64_t word)
{
	/* SAFETY: as load_rest(). Release: the buffers are seen before what says they are used. */
	if (d)
		__atomic_store_n((uint64_t *)(void *)(d + 8), word, __ATOMIC_RELEASE);
}

void vmm_packed_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
			  uint64_t written)
{
	uint8_t *first = NULL;
	uint64_t first_word = 0;

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t word;
		uint8_t *d = retire(vq, &chains[i], written, &word);

		written -= written < chains[i].write_len ? written : chains[i].write_len;
		if (i) {
			store_used(d, word);
		} else {
			first = d;
			first_word = word;
		}
	}
	/* The driver looks at them in order: it sees none before it sees the first. */
	store_used(first, first_word);
}

int vmm_packed_should_notify(struct vmm_vq *vq)
{
	uint32_t untold = vq->untold, event;
	int32_t at;

	if (!untold)
		return 0;
	vq->untold = 0;
	/* The used descriptors are out before what the driver says about interrupts is read. */
	atomic_thread_fence(memory_order_seq_cst);
	/* SAFETY: the structure is 4 bytes of RAM aligned to 4; it is loaded once. */
	event = le32toh(__atomic_load_n((const uint32_t *)(const void *)vq->avail,
					__ATOMIC_RELAXED));
	if ((event >> 16 & 3) == VRING_PACKED_EVENT_FLAG_DISABLE)
		return 0;
	if ((event >> 16 & 3) != VRING_PACKED_EVENT_FLAG_DESC || !vq->event_idx)
		return 1;
	if (untold >= vq->size)
		return 1; /* all the ring: whichever it is about */
	at = (int32_t)(event & ~VMM_VQ_WRAP & 0xffff);
	if (!(event & VMM_VQ_WRAP) == vq->used_wrap)
		at -= vq->size; /* of the lap before */
	return at < vq->used_idx && at >= (int32_t)vq->used_idx - (int32_t)untold;
}

static void ask(struct vmm_vq *vq, uint16_t at, uint16_t flags)
{
	/* SAFETY: as in vmm_packed_should_notify(). */
	__atomic_store_n((uint32_t *)(void *)vq->used, htole32(at | (uint32_t)flags << 16),
			 __ATOMIC_RELAXED);
}

int vmm_packed_enable_kicks(struct vmm_vq *vq)
{
	const uint8_t *d = ring_at(vq, vq->last_avail);

	if (vq->event_idx)
		ask(vq, (uint16_t)(vq->last_avail | (vq->avail_wrap ? VMM_VQ_WRAP : 0)),
		    VRING_PACKED_EVENT_FLAG_DESC);
	else
		ask(vq, 0, VRING_PACKED_EVENT_FLAG_ENABLE);
	/* The driver sees that we want kicks, or we see what it added before it did. */
	atomic_thread_fence(memory_order_seq_cst);
	return !vq->verdict && is_available(vmm_load16(d + 14), vq->avail_wrap);
}

void vmm_packed_disable_kicks(struct vmm_vq *vq)
{
	/* With EVENT_IDX, leaving the offset behind is what keeps the driver quiet. */
	if (!vq->event_idx)
		ask(vq, 0, VRING_PACKED_EVENT_FLAG_DISABLE);
}
