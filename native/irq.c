/* One interrupt source, whatever carries it. */
#include "core.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct vmm_irq {
	int kind, fd;
	uint32_t gsi;
	pthread_mutex_t lock; /* level and the ioctl that carries it must not be reordered */
	int level;
	_Atomic uint64_t count;
	struct vmm_irq *shared; /* the line this is one input of */
	uint32_t inputs;	/* how many inputs of this line are up */
};

struct vmm_irq *vmm_irq_create(int kind, int fd, uint32_t gsi)
{
	struct vmm_irq *irq = calloc(1, sizeof(*irq));

	if (!irq)
		return NULL;
	irq->kind = kind;
	irq->fd = fd;
	irq->gsi = gsi;
	pthread_mutex_init(&irq->lock, NULL);
	return irq;
}

struct vmm_irq *vmm_irq_share(struct vmm_irq *line)
{
	struct vmm_irq *irq = vmm_irq_create(VMM_IRQ_NONE, -1, line->gsi);

	if (irq)
		irq->shared = line;
	return irq;
}

void vmm_irq_destroy(struct vmm_irq *irq)
{
	if (!irq)
		return;
	if (irq->shared)
		vmm_irq_set(irq, 0);
	pthread_mutex_destroy(&irq->lock);
	free(irq);
}

static void signal_fd(int fd)
{
	const uint64_t one = 1;
	ssize_t n;

	/* EAGAIN means the counter is full: an interrupt is pending anyway. */
	do
		n = write(fd, &one, sizeof(one));
	while (n < 0 && errno == EINTR);
}

/* With the lock held. */
static void set_level(struct vmm_irq *irq, int level)
{
	if (irq->level == level)
		return;
	irq->level = level;
	if (level)
		atomic_fetch_add(&irq->count, 1);
	if (irq->kind == VMM_IRQ_LINE) {
		struct kvm_irq_level l = { .irq = irq->gsi, .level = level };

		ioctl(irq->fd, KVM_IRQ_LINE, &l);
	} else if ((irq->kind == VMM_IRQ_EVENTFD && level) || irq->kind == VMM_IRQ_WATCHED) {
		signal_fd(irq->fd);
	}
}

/* One input of a shared line went up or down. */
static void set_input(struct vmm_irq *line, int level)
{
	pthread_mutex_lock(&line->lock);
	line->inputs += level ? 1 : -1;
	set_level(line, line->inputs > 0);
	pthread_mutex_unlock(&line->lock);
}

void vmm_irq_set(struct vmm_irq *irq, int level)
{
	pthread_mutex_lock(&irq->lock);
	if (irq->shared && irq->level != !!level)
		set_input(irq->shared, !!level);
	set_level(irq, !!level);
	pthread_mutex_unlock(&irq->lock);
}

void vmm_irq_pulse(struct vmm_irq *irq)
{
	if (irq->kind == VMM_IRQ_LINE || irq->shared) {
		vmm_irq_set(irq, 1);
		return;
	}
	atomic_fetch_add(&irq->count, 1);
	if (irq->kind == VMM_IRQ_EVENTFD || irq->kind == VMM_IRQ_WATCHED)
		signal_fd(irq->fd);
}

uint64_t vmm_irq_count(const struct vmm_irq *irq)
{
	return atomic_load(&irq->count);
}

int vmm_irq_level(const struct vmm_irq *irq)
{
	return irq->level;
}

int vmm_irq_route(int vm_fd, const struct vmm_route *routes, uint32_t nr)
{
	struct kvm_irq_routing *table;
	int rc;

	table = calloc(1, sizeof(*table) + nr * sizeof(table->entries[0]));
	if (!table)
		return -ENOMEM;
	table->nr = nr;
	for (uint32_t i = 0; i < nr; i++) {
		struct kvm_irq_routing_entry *e = &table->entries[i];

		e->gsi = routes[i].gsi;
		if (routes[i].msi) {
			e->type = KVM_IRQ_ROUTING_MSI;
			e->u.msi.address_lo = (uint32_t)routes[i].address;
			e->u.msi.address_hi = (uint32_t)(routes[i].address >> 32);
			e->u.msi.data = routes[i].data;
		} else {
			e->type = KVM_IRQ_ROUTING_IRQCHIP;
			e->u.irqchip.irqchip = routes[i].chip;
			e->u.irqchip.pin = routes[i].pin;
		}
	}
	rc = ioctl(vm_fd, KVM_SET_GSI_ROUTING, table) ? -errno : 0;
	free(table);
	return rc;
}
