/* PCI configuration space and MSI-X tables, served on vCPU threads. PCI-3.0. */
#ifndef VMM_PCI_H
#define VMM_PCI_H

#include "core.h"

/* cdef: begin */

/* ---- PCI: configuration space --------------------------------------------------------------- */

enum { VMM_PCI_SLOTS = 32, VMM_PCI_CONFIG_SIZE = 256 };

/* Bus 0 of one host bridge, function 0 of each slot. An absent function reads all ones; so does
 * what lies above the 256 bytes of a conventional function. */
struct vmm_pci;

struct vmm_pci *vmm_pci_create(void);
void vmm_pci_destroy(struct vmm_pci *pci);
/* Three arrays of VMM_PCI_CONFIG_SIZE bytes, copied: what is there, which bits a guest may write,
 * and which of those are watched. A write is Python's when it changes a watched bit, or a base
 * address register while memory decoding is on; every access that touches the 4 bytes at `window`
 * is (0: no window). -EEXIST, -EINVAL, -ENOMEM. */
int vmm_pci_add(struct vmm_pci *pci, uint32_t slot, const uint8_t *config,
		const uint8_t *writable, const uint8_t *watched, uint32_t window);
/* The slot is empty from here on. */
void vmm_pci_remove(struct vmm_pci *pci, uint32_t slot);
/* The device's own access, masks passed by. size 1, 2 or 4, inside the 256 bytes. */
uint32_t vmm_pci_get(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size);
void vmm_pci_set(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size, uint32_t value);
/* A guest's write that C left to Python, applied under the masks. */
void vmm_pci_write(struct vmm_pci *pci, uint32_t slot, uint32_t reg, uint32_t size,
		   uint32_t value);
/* The address register of configuration mechanism #1. PCI-3.0 §3.2.2.3.2. */
uint32_t vmm_pci_address(struct vmm_pci *pci);
void vmm_pci_address_set(struct vmm_pci *pci, uint32_t value);

struct vmm_dev *vmm_pci_ports(struct vmm_pci *pci); /* 8 ports: address, data */
struct vmm_dev *vmm_pci_ecam(struct vmm_pci *pci);

/* ---- MSI-X ---------------------------------------------------------------------------------- */

enum { VMM_MSIX_PBA = 0x1000, VMM_MSIX_MAX = 256 };

struct vmm_msix_entry {
	uint64_t address;
	uint32_t data, control; /* control bit 0: masked */
};

/* The table at offset 0 and the pending bits at VMM_MSIX_PBA, as a guest sees them. Python gets
 * every write that changes what a live (enabled, unmasked) vector does, and reads of pending
 * bits. PCI-3.0 §6.8.2. */
struct vmm_msix;

struct vmm_msix *vmm_msix_create(uint32_t vectors);
void vmm_msix_destroy(struct vmm_msix *msix);
/* The function's enable and function mask bits. */
void vmm_msix_control(struct vmm_msix *msix, int enabled, int masked);
/* A guest's write that C left to Python: applied. */
void vmm_msix_write(struct vmm_msix *msix, uint64_t offset, uint32_t size, uint64_t value);
/* One entry; 1 when it may be delivered, 0 when it is masked one way or another, -EINVAL. */
int vmm_msix_entry(struct vmm_msix *msix, uint32_t vector, struct vmm_msix_entry *out);
void vmm_msix_reset(struct vmm_msix *msix);
struct vmm_dev *vmm_msix_dev(struct vmm_msix *msix);

/* cdef: end */

#endif
