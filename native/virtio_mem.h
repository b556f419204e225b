/* virtio-mem (virtio-v1.3 §5.15): memory that is plugged and unplugged in blocks while the guest
 * runs. */
#ifndef VMM_VIRTIO_MEM_H
#define VMM_VIRTIO_MEM_H

#include "service.h"

/* cdef: begin */

struct vmm_virtio_mem;

/* A range of the RAM table, wholly this device's; block: a power of two, of which addr and size
 * are multiples. populate: what is plugged is made present at once, or the plugging fails. */
struct vmm_virtio_mem_config {
	const struct vmm_mem *mem;
	uint64_t addr, size, block;
	uint64_t requested;
	int populate;
	uint16_t queue_size;
};

/* NULL with errno set. */
struct vmm_virtio_mem *vmm_virtio_mem_create(struct vmm_loop *loop,
					     const struct vmm_virtio_mem_config *config);
void vmm_virtio_mem_destroy(struct vmm_virtio_mem *m);
int vmm_virtio_mem_start(struct vmm_virtio_mem *m, const struct vmm_service_config *config);
void vmm_virtio_mem_stop(struct vmm_virtio_mem *m);

enum { VMM_VIRTIO_MEM_CONFIG = 56 };

/* The rest: any thread. */

/* The configuration space, VMM_VIRTIO_MEM_CONFIG bytes. */
void vmm_virtio_mem_config(struct vmm_virtio_mem *m, uint8_t *out);
/* How much of it the guest shall have, and tell it. -EINVAL: not whole blocks, or too many. */
int vmm_virtio_mem_request(struct vmm_virtio_mem *m, uint64_t requested);
/* As at power-on. */
void vmm_virtio_mem_reset(struct vmm_virtio_mem *m);

/* cdef: end */

#endif
