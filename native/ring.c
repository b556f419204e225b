/* Split virtqueues, device side: virtio-v1.3 §2.7. The readable twin is
 * vmm/devices/virtio/queue.py; one test suite runs both. */
#include "ring.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SIZE 32768
#define DESC_SIZE 16
#define BITS (8 * sizeof(unsigned long))

struct vmm_vq {
	const struct vmm_mem *mem;
	const uint8_t *desc;
	const uint8_t *avail;
	uint8_t *used;
	uint16_t size, mask;
	bool event_idx, indirect;
	uint16_t last_avail;  /* the next avail entry to take */
	uint16_t avail_idx;   /* what avail.idx was when last read */
	uint16_t used_idx;    /* what used.idx says */
	uint16_t told_used;   /* used_idx when the driver was last considered for an interrupt */
	uint8_t verdict;
	uint32_t nr_inflight;
	unsigned long inflight[]; /* one bit per head */
};

/* Guest memory may change under us: each word is loaded exactly once, as a unit. */
struct word64 {
	volatile uint64_t v;
} __attribute__((packed, may_alias));

static uint16_t load16(const uint8_t *p)
{
	/* SAFETY: p is inside a ring part that vmm_vq_create() found to be aligned RAM. */
	return le16toh(__atomic_load_n((const uint16_t *)(const void *)p, __ATOMIC_RELAXED));
}

static void store16(uint8_t *p, uint16_t v)
{
	/* SAFETY: as load16(). */
	__atomic_store_n((uint16_t *)(void *)p, htole16(v), __ATOMIC_RELAXED);
}

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

struct vmm_vq *vmm_vq_create(const struct vmm_mem *mem, const struct vmm_vq_config *config)
{
	const uint32_t size = config->size;
	const size_t words = (size + BITS - 1) / BITS;
	struct vmm_vq *vq;

	if (!size || size > MAX_SIZE || (size & (size - 1)) || (config->desc & 15) ||
	    (config->avail & 1) || (config->used & 3)) {
		errno = EINVAL;
		return NULL;
	}
	vq = calloc(1, sizeof(*vq) + words * sizeof(vq->inflight[0]));
	if (!vq)
		return NULL;
	vq->mem = mem;
	vq->size = (uint16_t)size;
	vq->mask = (uint16_t)(size - 1);
	vq->last_avail = vq->avail_idx = config->avail_at;
	vq->used_idx = vq->told_used = config->used_at;
	vq->event_idx = config->features >> VIRTIO_RING_F_EVENT_IDX & 1;
	vq->indirect = config->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	vq->desc = vmm_mem_at(mem, config->desc, (uint64_t)DESC_SIZE * size);
	vq->avail = vmm_mem_at(mem, config->avail, 6 + 2ULL * size);
	vq->used = vmm_mem_at(mem, config->used, 6 + 8ULL * size);
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

static bool test_inflight(const struct vmm_vq *vq, uint16_t head)
{
	return vq->inflight[head / BITS] >> head % BITS & 1;
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
	if (!len || len % DESC_SIZE || len / DESC_SIZE > vq->size)
		return VMM_VQ_INDIRECT_LEN;
	w->table = vmm_mem_at(vq->mem, addr, len);
	if (!w->table)
		return VMM_VQ_INDIRECT_ADDR;
	w->entries = len / DESC_SIZE;
	w->at = 0;
	w->in_indirect = true;
	return VMM_VQ_CHAIN;
}

static int add_buffer(const struct vmm_vq *vq, struct vmm_chain *c, uint64_t addr, uint32_t len,
		      bool writable)
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

static int walk_chain(const struct vmm_vq *vq, struct vmm_chain *c)
{
	struct walk w = { .table = vq->desc, .entries = vq->size, .at = c->head };

	for (;;) {
		/* SAFETY: at < entries, and the table is RAM; the descriptor is loaded once. */
		const struct word64 *d = (const void *)(w.table + (size_t)w.at * DESC_SIZE);
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
		rc = add_buffer(vq, c, addr, len, flags & VRING_DESC_F_WRITE);
		if (rc != VMM_VQ_CHAIN || !(flags & VRING_DESC_F_NEXT))
			return rc;
		if (next >= w.entries)
			return VMM_VQ_NEXT_RANGE;
		w.at = next;
	}
}

int vmm_vq_pop(struct vmm_vq *vq, struct vmm_chain *c)
{
	int rc;

	if (vq->verdict)
		return vq->verdict;
	if (vq->last_avail == vq->avail_idx) {
		vq->avail_idx = load16(vq->avail + 2);
		if (vq->last_avail == vq->avail_idx)
			return VMM_VQ_EMPTY;
		if ((uint16_t)(vq->avail_idx - vq->last_avail) > vq->size)
			return vq->verdict = VMM_VQ_IDX_JUMP;
		/* The entries were written before the index that shows them. */
		atomic_thread_fence(memory_order_acquire);
	}
	c->head = load16(avail_entry(vq, vq->last_avail));
	c->nr_read = c->nr_write = 0;
	c->read_len = c->write_len = 0;
	if (c->head >= vq->size)
		return vq->verdict = VMM_VQ_HEAD_RANGE;
	if (test_inflight(vq, c->head))
		return vq->verdict = VMM_VQ_HEAD_INFLIGHT;
	rc = walk_chain(vq, c);
	if (rc != VMM_VQ_CHAIN)
		return vq->verdict = (uint8_t)rc;
	vq->inflight[c->head / BITS] |= 1UL << c->head % BITS;
	vq->nr_inflight++;
	vq->last_avail++;
	return VMM_VQ_CHAIN;
}

void vmm_vq_push(struct vmm_vq *vq, const struct vmm_chain *c, uint64_t written)
{
	uint8_t *entry = vq->used + 4 + 8 * (size_t)(vq->used_idx & vq->mask);
	uint32_t len;

	if (c->head >= vq->size || !test_inflight(vq, c->head))
		return; /* a head completes exactly once */
	if (written > c->write_len)
		written = c->write_len;
	len = written > UINT32_MAX ? UINT32_MAX : (uint32_t)written;
	/* SAFETY: the entry is inside the used ring, which is aligned RAM. */
	__atomic_store_n((uint32_t *)(void *)entry, htole32(c->head), __ATOMIC_RELAXED);
	__atomic_store_n((uint32_t *)(void *)(entry + 4), htole32(len), __ATOMIC_RELAXED);
	vq->inflight[c->head / BITS] &= ~(1UL << c->head % BITS);
	vq->nr_inflight--;
	vq->used_idx++;
	/* The buffers and the entry are seen before the index that shows them. */
	atomic_thread_fence(memory_order_release);
	store16(vq->used + 2, vq->used_idx);
}

int vmm_vq_should_notify(struct vmm_vq *vq)
{
	const uint16_t now = vq->used_idx, old = vq->told_used;

	if (now == old)
		return 0;
	vq->told_used = now;
	/* used.idx is out before what the driver says about interrupts is read. */
	atomic_thread_fence(memory_order_seq_cst);
	if (!vq->event_idx)
		return !(load16(vq->avail) & VRING_AVAIL_F_NO_INTERRUPT);
	return vring_need_event(load16(used_event(vq)), now, old);
}

int vmm_vq_enable_kicks(struct vmm_vq *vq)
{
	if (vq->event_idx)
		store16(avail_event(vq), vq->last_avail);
	else
		store16(vq->used, 0);
	/* The driver sees that we want kicks, or we see what it added before it did. */
	atomic_thread_fence(memory_order_seq_cst);
	return !vq->verdict && load16(vq->avail + 2) != vq->last_avail;
}

void vmm_vq_disable_kicks(struct vmm_vq *vq)
{
	/* With EVENT_IDX, leaving avail_event behind is what keeps the driver quiet. */
	if (!vq->event_idx)
		store16(vq->used, VRING_USED_F_NO_NOTIFY);
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

size_t vmm_iov_read(const struct iovec *iov, uint32_t nr, uint64_t offset, void *dst, size_t len)
{
	size_t done = 0;

	for (uint32_t i = 0; i < nr && done < len; i++) {
		size_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = iov[i].iov_len - offset;
		n = n < len - done ? n : len - done;
		/* SAFETY: iov came from vmm_vq_pop(), which found all of it to be RAM. */
		memcpy((uint8_t *)dst + done, (uint8_t *)iov[i].iov_base + offset, n);
		done += n;
		offset = 0;
	}
	return done;
}

size_t vmm_iov_write(const struct iovec *iov, uint32_t nr, uint64_t offset, const void *src,
		     size_t len)
{
	size_t done = 0;

	for (uint32_t i = 0; i < nr && done < len; i++) {
		size_t n;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		n = iov[i].iov_len - offset;
		n = n < len - done ? n : len - done;
		/* SAFETY: as vmm_iov_read(). */
		memcpy((uint8_t *)iov[i].iov_base + offset, (const uint8_t *)src + done, n);
		done += n;
		offset = 0;
	}
	return done;
}

void vmm_iov_skip(struct iovec **iov, uint32_t *nr, uint64_t bytes)
{
	while (*nr && bytes >= (*iov)->iov_len) {
		bytes -= (*iov)->iov_len;
		(*iov)++;
		(*nr)--;
	}
	if (*nr && bytes) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
		(*iov)->iov_len -= bytes;
	}
}

void vmm_iov_cut(struct iovec *iov, uint32_t *nr, uint64_t bytes)
{
	while (*nr && bytes >= iov[*nr - 1].iov_len)
		bytes -= iov[--*nr].iov_len;
	if (*nr)
		iov[*nr - 1].iov_len -= bytes;
}
