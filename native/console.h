/* virtio-console (virtio-v1.3 §5.3), one port: a stream takes what the guest writes, an input
 * holds what it shall read. */
#ifndef VMM_CONSOLE_H
#define VMM_CONSOLE_H

#include "chario.h"
#include "service.h"

/* cdef: begin */

struct vmm_console;

/* Neither is owned; either may be NULL: then nothing is read, and what is written vanishes. */
struct vmm_console *vmm_console_create(struct vmm_loop *loop, struct vmm_stream *out,
				       struct vmm_input *in, uint16_t queue_size);
void vmm_console_destroy(struct vmm_console *console);
/* Queue 0 receives (for the guest), queue 1 transmits. */
int vmm_console_start(struct vmm_console *console, const struct vmm_service_config *config);
void vmm_console_stop(struct vmm_console *console);
/* Bytes so far, from the guest and to it. */
uint64_t vmm_console_sent(const struct vmm_console *console);
uint64_t vmm_console_received(const struct vmm_console *console);

/* cdef: end */

#endif
