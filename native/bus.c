/* Ranges that C answers without Python: a sorted table under a read-mostly lock. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEVS 512

struct slot {
	uint64_t base, size;
	struct vmm_dev *dev;
};

struct vmm_bus {
	pthread_rwlock_t lock;
	uint32_t nr;
	struct slot slots[MAX_DEVS]; /* sorted by base, disjoint */
};

struct vmm_bus *vmm_bus_create(void)
{
	struct vmm_bus *bus = calloc(1, sizeof(*bus));

	if (bus)
		pthread_rwlock_init(&bus->lock, NULL);
	return bus;
}

void vmm_bus_destroy(struct vmm_bus *bus)
{
	if (!bus)
		return;
	pthread_rwlock_destroy(&bus->lock);
	free(bus);
}

/* Index of the first slot whose base is above addr. */
static uint32_t upper(const struct vmm_bus *bus, uint64_t addr)
{
	uint32_t lo = 0, hi = bus->nr;

	while (lo < hi) {
		const uint32_t mid = (lo + hi) / 2;

		if (bus->slots[mid].base <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int vmm_bus_add(struct vmm_bus *bus, uint64_t base, uint64_t size, struct vmm_dev *dev)
{
	uint32_t at;
	int rc = 0;

	if (!size || base + (size - 1) < base)
		return -EINVAL;
	pthread_rwlock_wrlock(&bus->lock);
	at = upper(bus, base);
	if (bus->nr == MAX_DEVS)
		rc = -ENOSPC;
	else if (at && base - bus->slots[at - 1].base < bus->slots[at - 1].size)
		rc = -EEXIST;
	else if (at < bus->nr && bus->slots[at].base - base < size)
		rc = -EEXIST;
	if (!rc) {
		memmove(&bus->slots[at + 1], &bus->slots[at],
			(bus->nr - at) * sizeof(bus->slots[0]));
		bus->slots[at] = (struct slot){ base, size, dev };
		bus->nr++;
	}
	pthread_rwlock_unlock(&bus->lock);
	return rc;
}

int vmm_bus_remove(struct vmm_bus *bus, uint64_t base)
{
	uint32_t at;
	int rc = -ENOENT;

	pthread_rwlock_wrlock(&bus->lock);
	at = upper(bus, base);
	if (at && bus->slots[at - 1].base == base) {
		memmove(&bus->slots[at - 1], &bus->slots[at],
			(bus->nr - at) * sizeof(bus->slots[0]));
		bus->nr--;
		rc = 0;
	}
	pthread_rwlock_unlock(&bus->lock);
	return rc;
}

int vmm_bus_access(struct vmm_bus *bus, uint64_t addr, uint32_t size, uint8_t *data, int is_write)
{
	int rc = VMM_ACCESS_COLD;
	uint32_t at;

	/* Held across the access: a remover that returned knows no vCPU is still inside. */
	pthread_rwlock_rdlock(&bus->lock);
	at = upper(bus, addr);
	if (at) {
		const struct slot *s = &bus->slots[at - 1];
		const uint64_t offset = addr - s->base;

		if (offset < s->size && size <= s->size - offset)
			rc = s->dev->access(s->dev, offset, size, data, is_write);
	}
	pthread_rwlock_unlock(&bus->lock);
	return rc;
}

int vmm_dev_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data, int is_write)
{
	return dev->access(dev, offset, size, data, is_write);
}
