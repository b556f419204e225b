/* virtio-blk (virtio-v1.3 §5.2): requests from a ring to a raw file or block device. */
#ifndef VMM_BLK_H
#define VMM_BLK_H

#include "service.h"

/* cdef: begin */

struct vmm_blk;

struct vmm_blk_config {
	int fd;		      /* where requests go; O_DIRECT when align is set */
	int buffered_fd;      /* the same file without O_DIRECT, for what is not aligned */
	uint32_t align;	      /* 0, or what O_DIRECT wants of offset, length and memory */
	int read_only;
	uint64_t size;	      /* bytes; the last sector may be part of one */
	uint16_t queue_size;  /* the longest the ring may be */
	uint8_t serial[20];   /* VIRTIO_BLK_T_GET_ID, padded with zeros */
};

struct vmm_blk_stats {
	uint64_t reads, writes, flushes, others, errors;
	uint64_t read_bytes, written_bytes;
};

/* Both descriptors are borrowed. NULL with errno. */
struct vmm_blk *vmm_blk_create(struct vmm_loop *loop, const struct vmm_blk_config *config);
void vmm_blk_destroy(struct vmm_blk *blk);
int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config);
/* Waits for requests in flight; afterwards nothing touches guest memory or the file. */
void vmm_blk_stop(struct vmm_blk *blk);
void vmm_blk_stats(const struct vmm_blk *blk, struct vmm_blk_stats *out);

/* cdef: end */

#endif
