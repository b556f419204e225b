/* PCI configuration space: byte arrays with write masks, so that a guest's enumeration costs no
 * Python. A write that must set something in motion is left to Python. */
#include "pci.h"

#include <errno.h>
#include <linux/pci_regs.h>
#include <stdlib.h>
#include <string.h>

#define ADDRESS_ENABLE 0x80000000u
#define ADDRESS_BITS 0x80fffffcu /* the others are reserved: read-only zero */
#define PORT_RESET 1		 /* 0xcf9 lies inside the address register and is not ours */

struct function {
	uint8_t config[VMM_PCI_CONFIG_SIZE];
	uint8_t writable[VMM_PCI_CONFIG_SIZE];
	uint8_t watched[VMM_PCI_CONFIG_SIZE];
	uint32_t window;
};

struct vmm_pci {
	struct vmm_dev ports, ecam;
	pthread_mutex_t lock;
	uint32_t address;
	struct function *functions[VMM_PCI_SLOTS];
};

static int ports_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
			int is_write);
static int ecam_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		       int is_write);

struct vmm_pci *vmm_pci_create(void)
{
	struct vmm_pci *pci = calloc(1, sizeof(*pci));

	if (!pci)
		return NULL;
	pthread_mutex_init(&pci->lock, NULL);
	pci->ports.access = ports_access;
	pci->ecam.access = ecam_access;
	return pci;
}

void vmm_pci_destroy(struct vmm_pci *pci)
{
	if (!pci)
		return;
	for (uint32_t i = 0; i < VMM_PCI_SLOTS; i++)
		free(pci->functions[i]);
	pthread_mutex_destroy(&pci->lock);
	free(pci);
}

int vmm_pci_add(struct vmm_pci *pci, uint32_t slot, const uint8_t *config,
		const uint8_t *writable, const uint8_t *watched, uint32_t window)
{
	struct function *f;
	int rc = 0;

	if (slot >= VMM_PCI_SLOTS)
		return -EINVAL;
	f = malloc(sizeof(*f));
	if (!f)
		return -ENOMEM;
	memcpy(f->config, config, sizeof(f->config));
	memcpy(f->writable, writable, sizeof(f->writable));
	memcpy(f->watched, watched, sizeof(f->watched));
	f->window = window;
	pthread_mutex_lock(&pci->lock);
	if (pci->functions[slot])
		rc = -EEXIST;
	else
		pci->functions[slot] = f;
	pthread_mutex_unlock(&pci->lock);
	if (rc)
		free(f);
	return rc;
}

void vmm_pci_remove(struct vmm_pci *pci, uint32_t slot)
{
	struct function *f;

	if (slot >= VMM_PCI_SLOTS)
		return;
	pthread_mutex_lock(&pci->lock);
	f = pci->functions[slot];
	pci->functions[slot] = NULL;
	pthread_mutex_unlock(&pci->lock);
	free(f);
}

/* ---- access by the device and by Python ---- */

static bool inside(uint64_t reg, uint32_t size)
{
	return reg < VMM_PCI_CONFIG_SIZE && size <= 4 && size <= VMM_PCI_CONFIG_SIZE - reg;
}

/* The function when all of reg..reg+size is there, else NULL. With the lock held. */
static struct function *at(struct vmm_pci *pci, uint64_t slot, uint64_t reg, uint32_t size)
{
	return slot < VMM_PCI_SLOTS && inside(reg, size) ? pci->functions[slot] : NULL;
}

static void masked_write(struct function *f, uint64_t reg, uint32_t size, uint32_t value)
{
	for (uint32_t i = 0; i < size; i++) {
		const uint8_t mask = f->writable[reg + i], byte = (uint8_t)(value >> (8 * i));

		f->config[reg + i] = (f->config[reg + i] & ~mask) | (byte & mask);
	}
}

uint32_t vmm_pci_get(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size)
{
	struct function *f;
	uint32_t value = UINT32_MAX;

	pthread_mutex_lock(&pci->lock);
	f = at(pci, slot, reg, size);
	if (f)
		value = (uint32_t)vmm_get_le(f->config + reg, size);
	pthread_mutex_unlock(&pci->lock);
	return value;
}

void vmm_pci_set(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size, uint32_t value)
{
	struct function *f;

	pthread_mutex_lock(&pci->lock);
	f = at(pci, slot, reg, size);
	if (f)
		vmm_put_le(f->config + reg, value, size);
	pthread_mutex_unlock(&pci->lock);
}

void vmm_pci_write(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size, uint32_t value)
{
	struct function *f;

	pthread_mutex_lock(&pci->lock);
	f = at(pci, slot, reg, size);
	if (f)
		masked_write(f, reg, size, value);
	pthread_mutex_unlock(&pci->lock);
}

uint32_t vmm_pci_address(struct vmm_pci *pci)
{
	uint32_t address;

	pthread_mutex_lock(&pci->lock);
	address = pci->address;
	pthread_mutex_unlock(&pci->lock);
	return address;
}

void vmm_pci_address_set(struct vmm_pci *pci, uint32_t value)
{
	pthread_mutex_lock(&pci->lock);
	pci->address = value & ADDRESS_BITS;
	pthread_mutex_unlock(&pci->lock);
}

/* ---- access by the guest ---- */

static bool is_pythons(const struct function *f, uint64_t reg, uint32_t size, const uint8_t *data,
		       int is_write)
{
	if (f->window && reg < f->window + 4 && f->window < reg + size)
		return true;
	for (uint32_t i = 0; is_write && i < size; i++) {
		const uint64_t byte = reg + i;
		const uint8_t changed = (f->config[byte] ^ data[i]) & f->writable[byte];
		const bool bar = byte >= PCI_BASE_ADDRESS_0 && byte < PCI_CARDBUS_CIS;

		if (changed & f->watched[byte])
			return true;
		if (changed && bar && f->config[PCI_COMMAND] & PCI_COMMAND_MEMORY)
			return true;
	}
	return false;
}

/* devfn: slot and function as in a bus/device/function address, so function 0 is 8 * slot. */
static int config_access(struct vmm_pci *pci, uint32_t bus, uint32_t devfn, uint64_t reg,
			 uint32_t size, uint8_t *data, int is_write)
{
	struct function *f = NULL;
	int rc = VMM_ACCESS_DONE;

	pthread_mutex_lock(&pci->lock);
	if (!bus && !(devfn & 7))
		f = at(pci, devfn >> 3, reg, size);
	if (f && is_pythons(f, reg, size, data, is_write))
		rc = VMM_ACCESS_COLD;
	else if (is_write && f)
		masked_write(f, reg, size, (uint32_t)vmm_get_le(data, size));
	else if (!is_write && f)
		memcpy(data, f->config + reg, size);
	else if (!is_write)
		memset(data, 0xff, size);
	pthread_mutex_unlock(&pci->lock);
	return rc;
}

static int ports_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
			int is_write)
{
	struct vmm_pci *pci = (struct vmm_pci *)((char *)dev - offsetof(struct vmm_pci, ports));
	const uint32_t address = vmm_pci_address(pci);

	if (offset == PORT_RESET && size == 1)
		return VMM_ACCESS_COLD;
	if (offset == 0 && size == 4) {
		if (is_write)
			vmm_pci_address_set(pci, (uint32_t)vmm_get_le(data, 4));
		else
			vmm_put_le(data, address, 4);
	} else if (offset >= 4 && address & ADDRESS_ENABLE) {
		return config_access(pci, address >> 16 & 0xff, address >> 8 & 0xff,
				     (address & 0xfc) + (offset - 4), size, data, is_write);
	} else if (!is_write) {
		memset(data, 0xff, size);
	}
	return VMM_ACCESS_DONE;
}

static int ecam_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		       int is_write)
{
	struct vmm_pci *pci = (struct vmm_pci *)((char *)dev - offsetof(struct vmm_pci, ecam));

	return config_access(pci, (uint32_t)(offset >> 20), offset >> 12 & 0xff, offset & 0xfff,
			     size, data, is_write);
}

struct vmm_dev *vmm_pci_ports(struct vmm_pci *pci)
{
	return &pci->ports;
}

struct vmm_dev *vmm_pci_ecam(struct vmm_pci *pci)
{
	return &pci->ecam;
}
