/* Interrupts from somebody who walks the rings in our place (vhost): the eventfds they signal, and
 * the I/O thread that turns each signal into the interrupt of a queue, whatever carries that. */
#ifndef VMM_RELAY_H
#define VMM_RELAY_H

#include "virtio.h"

/* cdef: begin */

struct vmm_relay;

/* One eventfd per queue. NULL with errno set. */
struct vmm_relay *vmm_relay_create(struct vmm_loop *loop, uint32_t queues);
/* Stops it. */
void vmm_relay_destroy(struct vmm_relay *r);
/* The eventfd of a queue, which is the relay's; whoever it is lent to may do anything to it. */
int vmm_relay_fd(const struct vmm_relay *r, uint32_t queue);
/* From now on a signal interrupts the driver; harmless when it does already. 0 or -errno. */
int vmm_relay_start(struct vmm_relay *r, uint32_t queue, struct vmm_virtio *virtio);
/* From now on none does; returns when the I/O thread is not at it. Harmless when it is stopped. */
void vmm_relay_stop(struct vmm_relay *r, uint32_t queue);
/* Interrupts so far. */
uint64_t vmm_relay_count(const struct vmm_relay *r);

/* cdef: end */

#endif
