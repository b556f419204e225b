/* virtio-blk (virtio-v1.3 §5.2): requests from a ring to a raw file or block device. */
#ifndef VMM_BLK_H
#define VMM_BLK_H

#include "blk_io.h"
#include "service.h"

/* cdef: begin */

struct vmm_blk;

struct vmm_blk_stats {
	uint64_t reads, writes, flushes, others, errors;
	uint64_t read_bytes, written_bytes;
};

/* Works on the loop's thread. Both descriptors of the config are borrowed. NULL with errno. */
struct vmm_blk *vmm_blk_create(struct vmm_loop *loop, const struct vmm_blk_config *config);
void vmm_blk_destroy(struct vmm_blk *blk);
int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config);
/* Waits for requests in flight; afterwards nothing touches guest memory or the file. */
void vmm_blk_stop(struct vmm_blk *blk);
void vmm_blk_stats(const struct vmm_blk *blk, struct vmm_blk_stats *out);
/* Whether io_uring is in use. */
int vmm_blk_async(const struct vmm_blk *blk);

/* cdef: end */

#endif
