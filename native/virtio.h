/* The registers of a virtio device, on either transport, and how it interrupts its driver. */
#ifndef VMM_VIRTIO_H
#define VMM_VIRTIO_H

#include "core.h"

/* cdef: begin */

/* ---- virtio: registers and interrupts ------------------------------------------------------ */

/* Where the structures of virtio-pci are in its one BAR. virtio-v1.3 §4.1.4. */
enum {
	VMM_VIRTIO_PCI_COMMON = 0x0000,
	VMM_VIRTIO_PCI_COMMON_SIZE = 0x3c,
	VMM_VIRTIO_PCI_ISR = 0x1000,
	VMM_VIRTIO_PCI_DEVICE = 0x2000,
	VMM_VIRTIO_PCI_NOTIFY = 0x3000, /* 4 bytes per queue */
	VMM_VIRTIO_PCI_MSIX = 0x4000,	/* table, then at +0x1000 the pending bits */
	VMM_VIRTIO_PCI_SIZE = 0x8000
};

enum { VMM_VIRTIO_MAX_QUEUES = 256, VMM_VIRTIO_MAX_CONFIG = 0x1000 };

/* One queue as its driver set it up. Once enabled, validated (size within the maximum and, if split,
 * a power of two; areas aligned and wholly in RAM) and frozen until reset. */
struct vmm_virtio_queue {
	uint64_t desc, driver, device; /* guest-physical */
	uint32_t size, enabled;
};

/* The register file of one device: served on vCPU threads in C, except for what Python must act
 * on (DRIVER_OK, the reset of a running device or of one of its queues, writes to the
 * configuration space). */
struct vmm_virtio;

/* features: all that are offered. sizes: the maximum of each queue. NULL when out of memory or
 * the counts are out of range. */
struct vmm_virtio *vmm_virtio_create(const struct vmm_mem *mem, uint32_t device_id,
				     uint64_t features, const uint16_t *sizes, uint32_t queues);
void vmm_virtio_destroy(struct vmm_virtio *v);

/* What any thread, and above all an I/O thread, may call while the device runs; before
 * vmm_virtio_start and after a reset it does nothing. */

/* Used buffers are waiting in this queue: interrupt the driver. */
void vmm_virtio_notify(struct vmm_virtio *v, uint32_t queue);
/* The device met something it cannot continue from: DEVICE_NEEDS_RESET and a configuration
 * change interrupt. Once per reset; more calls do nothing. virtio-v1.3 §2.1.2. */
void vmm_virtio_fail(struct vmm_virtio *v);

/* What the transport calls. */

/* The eventfd (borrowed) that a notification without ioeventfd is written to. */
void vmm_virtio_kick_to(struct vmm_virtio *v, uint32_t queue, int eventfd);
/* The line interrupts take unless vectors are in use; level: held until the driver has read
 * (pci) or acknowledged (mmio) all there is, otherwise one pulse each. Not owned, may be NULL. */
void vmm_virtio_line(struct vmm_virtio *v, struct vmm_irq *irq, int level);
/* Whether the line may be asserted (PCI: INTx not disabled). */
void vmm_virtio_line_enable(struct vmm_virtio *v, int on);
/* The MSI-X vectors; the array is copied, the irqs borrowed. 0 or -ENOMEM. */
int vmm_virtio_vectors(struct vmm_virtio *v, struct vmm_irq **irqs, uint32_t nr);
/* Whether MSI-X is enabled. */
void vmm_virtio_vectors_enable(struct vmm_virtio *v, int on);
/* Who answers the BAR from VMM_VIRTIO_PCI_MSIX on. */
void vmm_virtio_pci_rest(struct vmm_virtio *v, struct vmm_dev *rest);

/* Replaces the device configuration space; notify: tell the driver. 0, -ENOMEM, -E2BIG. */
int vmm_virtio_config(struct vmm_virtio *v, const uint8_t *bytes, uint32_t len, int notify);
/* After a DRIVER_OK that C left to Python: 1 when the device is to be activated now. */
int vmm_virtio_start(struct vmm_virtio *v);
/* Back to the state after power-on. The device has been stopped. */
void vmm_virtio_reset(struct vmm_virtio *v);

/* After a write of queue_reset or queue_enable that C left to Python: the next queue that is to be
 * stopped (`start` 0) or started, or -1. Stopping goes on until vmm_virtio_queue_stopped(), which
 * puts the queue's registers back; what is to be started is handed out once. */
int vmm_virtio_queue_due(struct vmm_virtio *v, int start);
void vmm_virtio_queue_stopped(struct vmm_virtio *v, uint32_t queue);

uint32_t vmm_virtio_status(struct vmm_virtio *v);
uint64_t vmm_virtio_driver_features(struct vmm_virtio *v);
int vmm_virtio_queue(struct vmm_virtio *v, uint32_t queue, struct vmm_virtio_queue *out);
/* Accesses so far that the specification forbids a driver. */
uint64_t vmm_virtio_refused(struct vmm_virtio *v);

struct vmm_dev *vmm_virtio_mmio(struct vmm_virtio *v); /* the registers of virtio-v1.3 §4.2.2 */
struct vmm_dev *vmm_virtio_pci(struct vmm_virtio *v);  /* the BAR laid out above */

/* cdef: end */

/* Served on the thread that notifies, instead of an eventfd: for queues whose driver waits for the
 * answer with its vCPU. Embed it; it must live until no vCPU runs any more. */
struct vmm_virtio_kick {
	void (*kicked)(struct vmm_virtio_kick *kick);
};

void vmm_virtio_kick_call(struct vmm_virtio *v, uint32_t queue, struct vmm_virtio_kick *kick);

#endif
