/* PL011: a serial port, answered on the vCPU thread. */
#ifndef VMM_PL011_H
#define VMM_PL011_H

#include "chario.h"

/* cdef: begin */

struct vmm_pl011;

struct vmm_pl011_stats {
	uint64_t tx, rx;   /* bytes the guest sent and took */
	uint64_t dropped;  /* written while FR.TXFF said no, or with the transmitter off */
	uint64_t accesses;
};

/* out, in and irq are borrowed and may be NULL: output vanishes, nothing is ever received, no
 * interrupt. NULL with errno set on failure. */
struct vmm_pl011 *vmm_pl011_create(struct vmm_stream *out, struct vmm_input *in,
				   struct vmm_irq *irq);
void vmm_pl011_destroy(struct vmm_pl011 *u); /* off every bus already */
void vmm_pl011_reset(struct vmm_pl011 *u);
struct vmm_dev *vmm_pl011_dev(struct vmm_pl011 *u);
void vmm_pl011_stats(struct vmm_pl011 *u, struct vmm_pl011_stats *stats);

/* cdef: end */

#endif
