/* How a virtio device interrupts its driver: MSI-X vectors, or the line and the ISR. */
#include "virtio_regs.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <string.h>

/* With the lock held: the line follows the ISR. */
void vmm_virtio_line_update(struct vmm_virtio *v)
{
	if (v->line && v->line_level)
		vmm_irq_set(v->line, v->line_on && !v->vectors_on && v->isr != 0);
}

/* With the lock held. */
static void raise_locked(struct vmm_virtio *v, uint32_t bit, uint16_t vector)
{
	if (!v->running)
		return; /* a reset came first */
	if (v->vectors_on) {
		/* NO_VECTOR is past the end as well. */
		if (vector < v->nr_vectors)
			vmm_irq_pulse(v->vectors[vector]);
		return;
	}
	v->isr |= bit;
	if (v->line_level || !v->line)
		vmm_virtio_line_update(v);
	else
		/* Even when the bit was set already: an edge can get lost while the pin is
		 * masked. */
		vmm_irq_pulse(v->line);
}

void vmm_virtio_notify(struct vmm_virtio *v, uint32_t queue)
{
	uint16_t vector;

	if (queue >= v->nr || !v->running)
		return;
	vector = v->queues[queue].vector;
	if (v->vectors_on) {
		if (vector < v->nr_vectors)
			vmm_irq_pulse(v->vectors[vector]);
		return;
	}
	/* Under the lock: the driver's read clears the bits and lowers the line. */
	pthread_mutex_lock(&v->lock);
	raise_locked(v, VMM_ISR_QUEUE, vector);
	pthread_mutex_unlock(&v->lock);
}

void vmm_virtio_tell_config(struct vmm_virtio *v)
{
	raise_locked(v, VMM_ISR_CONFIG, v->config_vector);
}

void vmm_virtio_fail_locked(struct vmm_virtio *v)
{
	const bool tell = !(v->status & VIRTIO_CONFIG_S_NEEDS_RESET);

	v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
	if (tell)
		vmm_virtio_tell_config(v);
}

void vmm_virtio_fail(struct vmm_virtio *v)
{
	pthread_mutex_lock(&v->lock);
	if (v->running)
		vmm_virtio_fail_locked(v);
	pthread_mutex_unlock(&v->lock);
}

uint32_t vmm_virtio_isr_take(struct vmm_virtio *v, uint32_t bits)
{
	uint32_t taken;

	pthread_mutex_lock(&v->lock);
	taken = atomic_fetch_and(&v->isr, ~bits) & bits;
	vmm_virtio_line_update(v);
	pthread_mutex_unlock(&v->lock);
	return taken;
}

void vmm_virtio_line(struct vmm_virtio *v, struct vmm_irq *irq, int level)
{
	v->line = irq;
	v->line_level = level;
}

void vmm_virtio_line_enable(struct vmm_virtio *v, int on)
{
	pthread_mutex_lock(&v->lock);
	v->line_on = on;
	vmm_virtio_line_update(v);
	pthread_mutex_unlock(&v->lock);
}

int vmm_virtio_vectors(struct vmm_virtio *v, struct vmm_irq **irqs, uint32_t nr)
{
	v->vectors = calloc(nr ? nr : 1, sizeof(*irqs));
	if (!v->vectors)
		return -ENOMEM;
	memcpy(v->vectors, irqs, nr * sizeof(*irqs));
	v->nr_vectors = nr;
	return 0;
}

void vmm_virtio_vectors_enable(struct vmm_virtio *v, int on)
{
	pthread_mutex_lock(&v->lock);
	v->vectors_on = on;
	vmm_virtio_line_update(v);
	pthread_mutex_unlock(&v->lock);
}

void vmm_virtio_pci_rest(struct vmm_virtio *v, struct vmm_dev *rest)
{
	v->rest = rest;
}
