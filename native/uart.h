/* PC16550D: the serial port of a PC, answered on the vCPU thread. */
#ifndef VMM_UART_H
#define VMM_UART_H

#include "chario.h"

/* cdef: begin */

struct vmm_uart;

struct vmm_uart_stats {
	uint64_t tx, rx;     /* bytes the guest sent and took */
	uint64_t dropped;    /* written while LSR.THRE said no */
	uint64_t overruns;   /* received with no room for it */
	uint64_t breaks;     /* times the guest set the break bit */
	uint64_t accesses;
};

/* out, in and irq are borrowed and may be NULL: output vanishes, nothing is ever received, no
 * interrupt. NULL with errno set on failure. */
struct vmm_uart *vmm_uart_create(struct vmm_stream *out, struct vmm_input *in,
				 struct vmm_irq *irq);
void vmm_uart_destroy(struct vmm_uart *u); /* off every bus already */
void vmm_uart_reset(struct vmm_uart *u);   /* the MR pin */
struct vmm_dev *vmm_uart_dev(struct vmm_uart *u);
void vmm_uart_stats(struct vmm_uart *u, struct vmm_uart_stats *stats);

/* cdef: end */

#endif
