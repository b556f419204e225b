/* PLIC, a platform-level interrupt controller: which interrupt source reaches which hart. */
#ifndef VMM_PLIC_H
#define VMM_PLIC_H

#include "core.h"

/* cdef: begin */

#define VMM_PLIC_SOURCES 1023  /* at most; source 0 is none */
#define VMM_PLIC_CONTEXTS 1024 /* at most */
#define VMM_PLIC_SIZE 0x4000000

struct vmm_plic;

/* Sources 1..nr_sources, contexts 0..nr_contexts-1. out[i] is the external interrupt of context i,
 * borrowed, or NULL. NULL with errno set on failure. */
struct vmm_plic *vmm_plic_create(uint32_t nr_sources, uint32_t nr_contexts, struct vmm_irq **out);
void vmm_plic_destroy(struct vmm_plic *p); /* off every bus, and no source is driven any more */
void vmm_plic_reset(struct vmm_plic *p);   /* the registers; what drives a source still does */
struct vmm_dev *vmm_plic_dev(struct vmm_plic *p);
/* The level of a source's line, from any thread. -EINVAL when there is no such source. */
int vmm_plic_set(struct vmm_plic *p, uint32_t source, int level);

/* cdef: end */

#endif
