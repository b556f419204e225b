/* What virtio.c and virtio_regs.c share. */
#ifndef VMM_VIRTIO_REGS_H
#define VMM_VIRTIO_REGS_H

#include "virtio.h"

#define vmm_container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* FEATURES_OK: from here on the accepted features stand. */
#define VMM_FEATURES_FROZEN 8
#define VMM_NO_VECTOR 0xffff /* virtio-v1.3 §4.1.5.1.2 */
#define VMM_ISR_QUEUE 1	     /* virtio-v1.3 §4.1.4.5; the same bits in mmio's InterruptStatus */
#define VMM_ISR_CONFIG 2

/* Kernel headers before 6.0 lack these. */
#ifndef VIRTIO_F_RING_RESET
#define VIRTIO_F_RING_RESET 40
#endif
#ifndef VIRTIO_PCI_COMMON_Q_RESET
#define VIRTIO_PCI_COMMON_Q_RESET 58
#endif

struct vmm_reg_queue {
	struct vmm_virtio_queue set;
	uint16_t max;
	/* RING_RESET: it was reset while the device runs, so it may be enabled again; Python has to
	 * stop it; Python has to start it. */
	bool was_reset, stopping, starting;
	_Atomic uint16_t vector;
	int kick;
	struct vmm_virtio_kick *_Atomic call;
};

struct vmm_virtio {
	struct vmm_dev mmio, pci;
	struct vmm_dev *rest;
	const struct vmm_mem *mem;
	uint32_t device_id;

	/* Guards all up to the interrupts. Taken on vCPU threads and by vmm_virtio_fail; nothing
	 * under it waits. */
	pthread_mutex_t lock;
	uint8_t status;
	_Atomic bool running; /* from activation to reset */
	bool accepted_beyond; /* the driver accepted bits from 64 on; none are offered */
	uint64_t offered, accepted;
	uint32_t offered_sel, accepted_sel, queue_sel;
	uint32_t config_len, generation;
	uint8_t *config;
	_Atomic uint64_t refused;

	_Atomic uint32_t isr;
	struct vmm_irq *line;
	bool line_level, line_on;
	_Atomic bool vectors_on;
	_Atomic uint16_t config_vector;
	uint32_t nr_vectors;
	struct vmm_irq **vectors;

	uint32_t nr;
	struct vmm_reg_queue queues[];
};

/* With the lock held. */
int vmm_virtio_write_status(struct vmm_virtio *v, uint8_t value); /* VMM_ACCESS_* */
int vmm_virtio_enable(struct vmm_virtio *v, struct vmm_reg_queue *q); /* VMM_ACCESS_* */
int vmm_virtio_queue_reset(struct vmm_virtio *v, struct vmm_reg_queue *q);
void vmm_virtio_clear(struct vmm_virtio *v);
void vmm_virtio_line_update(struct vmm_virtio *v); /* the line follows the ISR */
void vmm_virtio_fail_locked(struct vmm_virtio *v);
void vmm_virtio_tell_config(struct vmm_virtio *v); /* of a change; not before it runs */
/* Without it. */
void vmm_virtio_kick(struct vmm_virtio *v, uint32_t queue);
uint32_t vmm_virtio_isr_take(struct vmm_virtio *v, uint32_t bits);
void vmm_virtio_faces(struct vmm_virtio *v);

#endif
