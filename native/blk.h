/* virtio-blk (virtio-v1.3 §5.2): requests from rings to a raw file or block device. */
#ifndef VMM_BLK_H
#define VMM_BLK_H

#include "blk_io.h"
#include "service.h"

/* cdef: begin */

struct vmm_blk;

struct vmm_blk_stats {
	uint64_t reads, writes, flushes, discards, zeroes, others, errors, held, pending;
	uint64_t read_bytes, written_bytes, throttled;
};

/* Queue i works on the thread of loops[i]. The descriptors of the config are borrowed. NULL with
 * errno. */
struct vmm_blk *vmm_blk_create(struct vmm_loop **loops, const struct vmm_blk_config *config);
void vmm_blk_destroy(struct vmm_blk *blk);
/* The queue is config->index. 0 or -errno. */
int vmm_blk_start(struct vmm_blk *blk, const struct vmm_service_config *config);
/* Stops every queue and waits for requests in flight; afterwards nothing touches guest memory or
 * the file. */
void vmm_blk_stop(struct vmm_blk *blk);
/* The same for one queue, which may be started again. */
void vmm_blk_stop_queue(struct vmm_blk *blk, uint32_t index);
/* Any thread. Bytes the disk has from now on. */
void vmm_blk_resize(struct vmm_blk *blk, uint64_t size);
/* Any thread. Whether a finished write may be in the host's cache only. */
void vmm_blk_write_back(struct vmm_blk *blk, int on);
/* Any thread but an I/O thread. Bytes and requests a second for all queues together, and how many
 * may pass at once: as vmm_bucket_set(). */
void vmm_blk_limit(struct vmm_blk *blk, uint64_t bps, uint64_t bps_burst, uint64_t iops,
		   uint64_t iops_burst);
/* Tries again what is held (VMM_BLK_PAUSE). Not on an I/O thread. */
void vmm_blk_retry(struct vmm_blk *blk);
/* The errno of the request that was held last, or 0. */
int vmm_blk_error(const struct vmm_blk *blk);
/* Sums of all queues since the start; `held` is how many are held now,
 * `throttled` how often a queue had to wait for its limits. */
void vmm_blk_stats(const struct vmm_blk *blk, struct vmm_blk_stats *out);
/* Whether io_uring is in use. */
int vmm_blk_async(const struct vmm_blk *blk);

/* cdef: end */

#endif
