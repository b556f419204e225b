/* An MSI-X table: storage, except where a write changes what a live vector does. */
#include "pci.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ENTRY 16
#define CONTROL 12 /* offset of vector control in an entry; bit 0 masks, the rest is reserved */

struct vmm_msix {
	struct vmm_dev dev;
	pthread_mutex_t lock;
	bool enabled, masked;
	uint32_t nr;
	uint8_t table[];
};

static bool live(const struct vmm_msix *m, uint32_t vector)
{
	return m->enabled && !m->masked && !(m->table[vector * ENTRY + CONTROL] & 1);
}

static void store(struct vmm_msix *m, uint64_t offset, uint32_t size, uint64_t value)
{
	vmm_put_le(m->table + offset, value, size);
	memset(m->table + offset / ENTRY * ENTRY + CONTROL + 1, 0, 3);
	m->table[offset / ENTRY * ENTRY + CONTROL] &= 1;
}

/* PCI-3.0 §6.8.2: aligned dwords and qwords only. */
static bool in_table(const struct vmm_msix *m, uint64_t offset, uint32_t size)
{
	return (size == 4 || size == 8) && !(offset & (size - 1)) && offset < m->nr * ENTRY;
}

static int access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data, int is_write)
{
	struct vmm_msix *m = (struct vmm_msix *)dev;
	int rc = VMM_ACCESS_DONE;

	if (!is_write && offset >= VMM_MSIX_PBA)
		return VMM_ACCESS_COLD;
	pthread_mutex_lock(&m->lock);
	if (!in_table(m, offset, size)) {
		if (!is_write)
			memset(data, 0, size);
	} else if (!is_write) {
		memcpy(data, m->table + offset, size);
	} else {
		const uint32_t vector = (uint32_t)(offset / ENTRY);
		const uint64_t control = offset + size - 4;
		const bool unmasks = control % ENTRY == CONTROL && !(data[size - 4] & 1);

		if (live(m, vector) || (unmasks && m->enabled && !m->masked))
			rc = VMM_ACCESS_COLD;
		else
			store(m, offset, size, vmm_get_le(data, size));
	}
	pthread_mutex_unlock(&m->lock);
	return rc;
}

struct vmm_msix *vmm_msix_create(uint32_t vectors)
{
	struct vmm_msix *m;

	if (!vectors || vectors > VMM_MSIX_MAX)
		return NULL;
	m = calloc(1, sizeof(*m) + vectors * ENTRY);
	if (!m)
		return NULL;
	pthread_mutex_init(&m->lock, NULL);
	m->dev.access = access;
	m->nr = vectors;
	vmm_msix_reset(m);
	return m;
}

void vmm_msix_destroy(struct vmm_msix *m)
{
	if (!m)
		return;
	pthread_mutex_destroy(&m->lock);
	free(m);
}

void vmm_msix_control(struct vmm_msix *m, int enabled, int masked)
{
	pthread_mutex_lock(&m->lock);
	m->enabled = enabled;
	m->masked = masked;
	pthread_mutex_unlock(&m->lock);
}

void vmm_msix_write(struct vmm_msix *m, uint64_t offset, uint32_t size, uint64_t value)
{
	pthread_mutex_lock(&m->lock);
	if (in_table(m, offset, size))
		store(m, offset, size, value);
	pthread_mutex_unlock(&m->lock);
}

int vmm_msix_entry(struct vmm_msix *m, uint32_t vector, struct vmm_msix_entry *out)
{
	const uint8_t *e;
	int rc;

	if (vector >= m->nr)
		return -EINVAL;
	pthread_mutex_lock(&m->lock);
	e = m->table + vector * ENTRY;
	out->address = vmm_get_le(e, 8);
	out->data = (uint32_t)vmm_get_le(e + 8, 4);
	out->control = (uint32_t)vmm_get_le(e + CONTROL, 4);
	rc = live(m, vector);
	pthread_mutex_unlock(&m->lock);
	return rc;
}

void vmm_msix_reset(struct vmm_msix *m)
{
	pthread_mutex_lock(&m->lock);
	m->enabled = m->masked = false;
	memset(m->table, 0, m->nr * ENTRY);
	for (uint32_t i = 0; i < m->nr; i++)
		m->table[i * ENTRY + CONTROL] = 1;
	pthread_mutex_unlock(&m->lock);
}

struct vmm_dev *vmm_msix_dev(struct vmm_msix *m)
{
	return &m->dev;
}
