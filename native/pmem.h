/* virtio-pmem (virtio-v1.3 §5.19): flushes of a file that the guest has mapped. */
#ifndef VMM_PMEM_H
#define VMM_PMEM_H

#include "service.h"

/* cdef: begin */

struct vmm_pmem;

struct vmm_pmem_stats {
	uint64_t flushes; /* requests answered */
	uint64_t syncs;	  /* fdatasync(2) calls; several requests share one */
	uint64_t failed;  /* requests answered with an error */
};

/* fd is borrowed; the loop waits for the file, so it should serve nothing else. */
struct vmm_pmem *vmm_pmem_create(struct vmm_loop *loop, int fd, uint16_t queue_size);
void vmm_pmem_destroy(struct vmm_pmem *pmem);
int vmm_pmem_start(struct vmm_pmem *pmem, const struct vmm_service_config *config);
void vmm_pmem_stop(struct vmm_pmem *pmem);
/* Something the guest wrote is lost: every flush fails from now on. Any thread. */
void vmm_pmem_spoil(struct vmm_pmem *pmem);
void vmm_pmem_stats(const struct vmm_pmem *pmem, struct vmm_pmem_stats *out);

/* cdef: end */

#endif
