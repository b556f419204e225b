/* One virtqueue served by an I/O thread: from the kick to the interrupt. */
#ifndef VMM_SERVICE_H
#define VMM_SERVICE_H

#include "ring.h"
#include "virtio.h"

/* cdef: begin */

/* How often the driver broke the queue, and the verdict it was broken with last. */
struct vmm_service_report {
	uint32_t breaks, verdict;
};

/* What a device needs to begin on one queue. kick_fd and report are borrowed until the service
 * stops. */
struct vmm_service_config {
	struct vmm_vq_config vq;
	const struct vmm_mem *mem;
	struct vmm_virtio *virtio;
	uint32_t index;
	int kick_fd;
	struct vmm_service_report *report; /* or NULL */
};

/* cdef: end */

#define VMM_SERVICE_WAIT (-1)

/* A device embeds one per queue. From start to stop it belongs to the I/O thread, and to whoever
 * notifies if `direct` is set. */
struct vmm_service {
	struct vmm_source source;
	struct vmm_virtio_kick kick;
	pthread_mutex_t lock; /* held while it runs, and around start and stop */
	/* Set before the first start: a notification is served on the vCPU's thread. The transport
	 * must then leave the queue without an ioeventfd. */
	bool direct;
	struct vmm_loop *loop;
	struct vmm_virtio *virtio;
	struct vmm_vq *vq; /* NULL while stopped */
	uint32_t index;
	struct vmm_service_report *report;
	bool failed; /* the driver was told that the queue is broken */
	/* Takes one chain: what vmm_vq_pop() said, or VMM_SERVICE_WAIT without having tried:
	 * the device has no room (or nothing to give) and calls vmm_service_run() once it has. */
	int (*serve)(struct vmm_service *s);
	/* Optional. When nothing is left to take, before the driver is told: submit, push. */
	void (*flush)(struct vmm_service *s);
	/* Optional. When stopping: returns when nothing is in flight. */
	void (*drain)(struct vmm_service *s);
};

void vmm_service_init(struct vmm_service *s, struct vmm_loop *loop,
		      int (*serve)(struct vmm_service *s));
/* Stops it. No vCPU runs any more. */
void vmm_service_fini(struct vmm_service *s);
/* 0 or -errno. Chains that are there already are served without a kick. */
int vmm_service_start(struct vmm_service *s, const struct vmm_service_config *config);
/* After this returns the I/O thread does not touch the queue. Harmless when not started. */
void vmm_service_stop(struct vmm_service *s);
/* With the lock held, or on the I/O thread if it is not direct: serves what there is, then interrupts at most once. */
void vmm_service_run(struct vmm_service *s);
/* Any thread, while started: the I/O thread shall run the service again. */
void vmm_service_again(struct vmm_service *s);
/* As vmm_service_run(): tells the driver about pushes, or of a broken queue. */
void vmm_service_notify(struct vmm_service *s);

#endif
