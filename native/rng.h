/* virtio-rng (virtio-v1.3 §5.4): the host's random bytes. */
#ifndef VMM_RNG_H
#define VMM_RNG_H

#include "service.h"

/* cdef: begin */

struct vmm_rng;

struct vmm_rng *vmm_rng_create(struct vmm_loop *loop, uint16_t queue_size);
void vmm_rng_destroy(struct vmm_rng *rng);
int vmm_rng_start(struct vmm_rng *rng, const struct vmm_service_config *config);
void vmm_rng_stop(struct vmm_rng *rng);
/* Bytes given so far. */
uint64_t vmm_rng_bytes(const struct vmm_rng *rng);

/* cdef: end */

#endif
