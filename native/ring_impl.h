/* What the two ring formats share: the state of a queue, loads and stores of guest words, and
 * what is checked about a buffer whichever way it was described. */
#ifndef VMM_RING_IMPL_H
#define VMM_RING_IMPL_H

#include "ring.h"

#include <endian.h>
#include <linux/virtio_ring.h>

#define VMM_VQ_DESC_SIZE 16
#define VMM_VQ_WRAP 0x8000u /* beside a position in a packed ring: its wrap counter */

struct vmm_vq {
	const struct vmm_mem *mem;
	/* Split: descriptor table, available and used ring. Packed: descriptor ring, the driver's
	 * and the device's event suppression structure. */
	uint8_t *desc, *avail, *used;
	bool packed, event_idx, indirect;
	uint8_t verdict;
	uint16_t size, mask;  /* mask: split only, whose sizes are powers of two */
	uint16_t last_avail;  /* the next avail entry or descriptor to take */
	uint16_t avail_idx;   /* split: what avail.idx was when last read */
	uint16_t used_idx;    /* split: what used.idx says; packed: the next to mark as used */
	uint16_t told_used;   /* split: used_idx when the driver was last considered */
	bool avail_wrap, used_wrap; /* packed: the counters that go with the two positions */
	uint32_t untold;	    /* packed: descriptors used since the driver was considered */
	uint32_t nr_taken;	    /* packed: descriptors taken and not yet used */
	uint32_t nr_inflight;
	/* Per head or buffer id: how many descriptors of the ring its chain takes, 0 when it is
	 * not in flight. */
	uint16_t taken[];
};

/* Guest memory may change under us: each word is loaded exactly once, as a unit. */
struct vmm_word64 {
	volatile uint64_t v;
} __attribute__((packed, may_alias));

static inline uint16_t vmm_load16(const uint8_t *p)
{
	/* SAFETY: p is inside a ring part that vmm_vq_create() found to be aligned RAM. */
	return le16toh(__atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED));
}

static inline void vmm_store16(uint8_t *p, uint16_t v)
{
	/* SAFETY: as vmm_load16(). */
	__atomic_store_n((uint16_t *)(void *)p, htole16(v), __ATOMIC_RELAXED);
}

static inline int vmm_vq_add_buffer(const struct vmm_vq *vq, struct vmm_chain *c, uint64_t addr,
				    uint32_t len, bool writable)
{
	const uint32_t nr = c->nr_read + c->nr_write;

	if (nr == vq->size)
		return VMM_VQ_CHAIN_LONG; /* which is also how a loop ends */
	if (!len)
		return VMM_VQ_LEN_ZERO;
	if (!writable && c->nr_write)
		return VMM_VQ_ORDER;
	c->iov[nr].iov_base = vmm_mem_at(vq->mem, addr, len);
	if (!c->iov[nr].iov_base)
		return VMM_VQ_ADDR;
	c->iov[nr].iov_len = len;
	if (writable) {
		c->nr_write++;
		c->write_len += len;
	} else {
		c->nr_read++;
		c->read_len += len;
	}
	/* virtio-v1.3 §2.7.4.2: a chain holds at most 2^32 bytes. */
	return c->read_len + c->write_len > 1ULL << 32 ? VMM_VQ_CHAIN_BYTES : VMM_VQ_CHAIN;
}

static inline void vmm_vq_clear_chain(struct vmm_chain *c)
{
	c->nr_read = c->nr_write = 0;
	c->read_len = c->write_len = 0;
}

/* What used.len says: never more than the chain has room for. */
static inline uint32_t vmm_vq_used_len(const struct vmm_chain *c, uint64_t written)
{
	if (written > c->write_len)
		written = c->write_len;
	return written > UINT32_MAX ? UINT32_MAX : (uint32_t)written;
}

int vmm_split_pop(struct vmm_vq *vq, struct vmm_chain *c);
void vmm_split_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
			 uint64_t written);
int vmm_split_should_notify(struct vmm_vq *vq);
int vmm_split_enable_kicks(struct vmm_vq *vq);
void vmm_split_disable_kicks(struct vmm_vq *vq);

int vmm_packed_pop(struct vmm_vq *vq, struct vmm_chain *c);
void vmm_packed_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
			  uint64_t written);
int vmm_packed_should_notify(struct vmm_vq *vq);
int vmm_packed_enable_kicks(struct vmm_vq *vq);
void vmm_packed_disable_kicks(struct vmm_vq *vq);

#endif
