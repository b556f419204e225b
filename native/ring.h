/* The device side of a virtqueue, split or packed: chains out of guest memory, checked and copied
 * once. */
#ifndef VMM_RING_H
#define VMM_RING_H

#include "core.h"

#include <sys/uio.h>

/* cdef: begin */

/* What a pop found. Everything from IDX_JUMP on is a driver that broke a rule of virtio-v1.3
 * §2.7 or §2.8: the queue is broken from then on and the device needs a reset. Keep in step with
 * VERDICTS in vmm/devices/virtio/queue.py, which says what each one means. */
enum {
	VMM_VQ_EMPTY,
	VMM_VQ_CHAIN,
	VMM_VQ_IDX_JUMP,
	VMM_VQ_HEAD_RANGE,
	VMM_VQ_HEAD_INFLIGHT,
	VMM_VQ_NEXT_RANGE,
	VMM_VQ_CHAIN_LONG,
	VMM_VQ_CHAIN_BYTES,
	VMM_VQ_LEN_ZERO,
	VMM_VQ_ORDER,
	VMM_VQ_ADDR,
	VMM_VQ_INDIRECT_OFF,
	VMM_VQ_INDIRECT_NEST,
	VMM_VQ_INDIRECT_NEXT,
	VMM_VQ_INDIRECT_LEN,
	VMM_VQ_INDIRECT_ADDR,
	VMM_VQ_REQUEST,
	VMM_VQ_NR_VERDICTS,
};

/* With a position in a packed ring: its wrap counter is 0, as in every second lap. (vhost has
 * the counter itself in this bit.) */
enum { VMM_VQ_LAPPED = 0x8000 };

/* Where a queue lies, as the driver said and the transport froze it. Addresses are
 * guest-physical: descriptor, driver and device area; features the negotiated ones (bit numbers
 * of virtio-v1.3 §6), of which RING_PACKED decides the format. */
struct vmm_vq_config {
	uint64_t desc, avail, used;
	uint64_t features;
	uint16_t size;
	uint16_t avail_at, used_at; /* 0, or where a saved queue goes on: see vmm_vq_state() */
};

/* One descriptor chain: iov[0..nr_read) the device reads, the nr_write after them it writes. All
 * of it is RAM. The owner gives the iov array; it needs room for as many as the queue is long. */
struct vmm_chain {
	struct iovec *iov;
	uint32_t nr_read, nr_write;
	uint64_t read_len, write_len;
	uint16_t head;
};

struct vmm_vq;

/* The host addresses of the three parts are looked up here and kept: RAM never moves. NULL with
 * errno EINVAL when size is not up to 32768 (split: and a power of two) or a part is not
 * aligned, EFAULT when a part is not in RAM. One thread at a time uses a queue. */
struct vmm_vq *vmm_vq_create(const struct vmm_mem *mem, const struct vmm_vq_config *config);
void vmm_vq_destroy(struct vmm_vq *vq);

/* A verdict. After CHAIN the head (packed: the buffer id), which is less than the queue's size, is
 * in flight until it is pushed. */
int vmm_vq_pop(struct vmm_vq *vq, struct vmm_chain *chain);
/* Gives a chain back, `written` bytes of it filled (never told to be more than it has). */
void vmm_vq_push(struct vmm_vq *vq, const struct vmm_chain *chain, uint64_t written);
/* Gives several back at once, the first of which is filled first: the driver sees all of them or
 * none. */
void vmm_vq_push_span(struct vmm_vq *vq, const struct vmm_chain *chains, uint32_t nr,
		      uint64_t written);
/* Whether the driver wants an interrupt for what was pushed since this was last asked. */
int vmm_vq_should_notify(struct vmm_vq *vq);
/* Asks the driver for kicks again; nonzero when a chain came meanwhile and no kick will tell. */
int vmm_vq_enable_kicks(struct vmm_vq *vq);
void vmm_vq_disable_kicks(struct vmm_vq *vq);
/* The device cannot make sense of a chain: breaks the queue with VMM_VQ_REQUEST. */
void vmm_vq_refuse(struct vmm_vq *vq);
/* The verdict that broke the queue, or VMM_VQ_EMPTY. */
int vmm_vq_broken(const struct vmm_vq *vq);
/* Chains that were popped and not yet pushed. */
uint32_t vmm_vq_inflight(const struct vmm_vq *vq);
/* Where it stands: what vmm_vq_config says to go on there. Nothing may be in flight. */
void vmm_vq_state(const struct vmm_vq *vq, uint16_t *avail_at, uint16_t *used_at);
const char *vmm_vq_verdict_name(int verdict);

/* cdef: end */

/* Copies up to len bytes between a chain's buffers and the host, from byte `offset` on; returns
 * how many there were. */
size_t vmm_iov_read(const struct iovec *iov, uint32_t nr, uint64_t offset, void *dst, size_t len);
size_t vmm_iov_write(const struct iovec *iov, uint32_t nr, uint64_t offset, const void *src,
		     size_t len);
/* Drops bytes from the front; moves *iov and *nr on. */
void vmm_iov_skip(struct iovec **iov, uint32_t *nr, uint64_t bytes);
/* Drops bytes from the end. */
void vmm_iov_cut(struct iovec *iov, uint32_t *nr, uint64_t bytes);

#endif
