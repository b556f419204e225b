/* How virtio's registers lie in an address range: virtio-mmio (virtio-v1.3 §4.2.2) and the BAR of
 * virtio-pci (virtio-v1.3 §4.1.4). Runs on vCPU threads. */
#include <linux/virtio_mmio.h>
#include <linux/virtio_pci.h>
#include <string.h>

#include "virtio_regs.h" /* after what it may have to complete */

#define MMIO_VERSION 2
#define VENDOR 0x4d4d56 /* "VMM", little-endian */
#define MMIO_QUEUE_RESET 0x0c0

static uint32_t half(uint64_t value, uint32_t sel)
{
	return sel < 2 ? (uint32_t)(value >> (32 * sel)) : 0;
}

static void set_half(uint64_t *value, uint32_t sel, uint32_t bits)
{
	const uint32_t shift = 32 * sel;

	*value = (*value & ~(0xffffffffULL << shift)) | (uint64_t)bits << shift;
}

/* The selected queue, or NULL when the driver selected one that does not exist. */
static struct vmm_reg_queue *selected(struct vmm_virtio *v)
{
	return v->queue_sel < v->nr ? &v->queues[v->queue_sel] : NULL;
}

static void accept_features(struct vmm_virtio *v, uint32_t bits)
{
	if (v->status & VMM_FEATURES_FROZEN)
		v->refused++;
	else if (v->accepted_sel < 2)
		set_half(&v->accepted, v->accepted_sel, bits);
	else
		v->accepted_beyond |= bits != 0;
}

/* One of the three addresses: at = 0 desc, 1 driver, 2 device; sel = 0 low, 1 high. */
static void set_address(struct vmm_virtio *v, uint32_t at, uint32_t sel, uint32_t bits)
{
	struct vmm_reg_queue *q = selected(v);

	if (!q || q->set.enabled)
		v->refused++;
	else
		set_half(at == 0   ? &q->set.desc
			 : at == 1 ? &q->set.driver
				   : &q->set.device,
			 sel, bits);
}

static void set_size(struct vmm_virtio *v, uint32_t size)
{
	struct vmm_reg_queue *q = selected(v);

	if (!q || q->set.enabled)
		v->refused++;
	else
		q->set.size = size; /* judged when the queue is enabled */
}

static int enable(struct vmm_virtio *v, uint32_t value)
{
	struct vmm_reg_queue *q = selected(v);

	if (!q || value > 1 || (!value && v->running))
		v->refused++;
	else if (!value)
		q->set.enabled = 0;
	else if (!q->set.enabled)
		return vmm_virtio_enable(v, q);
	else if (q->starting)
		return VMM_ACCESS_COLD; /* Python asks once more on its way */
	return VMM_ACCESS_DONE;
}

static int queue_reset(struct vmm_virtio *v, uint32_t value)
{
	struct vmm_reg_queue *q = selected(v);

	if (q && value == 1)
		return vmm_virtio_queue_reset(v, q);
	v->refused++;
	return VMM_ACCESS_DONE;
}

static int config_access(struct vmm_virtio *v, uint64_t offset, uint32_t size, uint8_t *data,
			 int is_write)
{
	int rc = VMM_ACCESS_DONE;

	pthread_mutex_lock(&v->lock);
	if (is_write) {
		rc = offset + size <= v->config_len ? VMM_ACCESS_COLD : VMM_ACCESS_DONE;
	} else {
		memset(data, 0, size);
		if (offset < v->config_len) {
			const uint64_t left = v->config_len - offset;

			memcpy(data, v->config + offset, left < size ? left : size);
		}
	}
	pthread_mutex_unlock(&v->lock);
	return rc;
}

/* ---- virtio-mmio ---- */

static uint32_t mmio_read(struct vmm_virtio *v, uint64_t reg)
{
	const struct vmm_reg_queue *q = selected(v);

	switch (reg) {
	case VIRTIO_MMIO_MAGIC_VALUE:
		return 'v' | 'i' << 8 | 'r' << 16 | 't' << 24;
	case VIRTIO_MMIO_VERSION:
		return MMIO_VERSION;
	case VIRTIO_MMIO_DEVICE_ID:
		return v->device_id;
	case VIRTIO_MMIO_VENDOR_ID:
		return VENDOR;
	case VIRTIO_MMIO_DEVICE_FEATURES:
		return half(v->offered, v->offered_sel);
	case VIRTIO_MMIO_QUEUE_NUM_MAX:
		return q ? q->max : 0;
	case VIRTIO_MMIO_QUEUE_READY:
		return q ? q->set.enabled : 0;
	case MMIO_QUEUE_RESET:
		return q && q->stopping;
	case VIRTIO_MMIO_STATUS:
		return v->status;
	case VIRTIO_MMIO_CONFIG_GENERATION:
		return v->generation;
	case VIRTIO_MMIO_SHM_LEN_LOW:
	case VIRTIO_MMIO_SHM_LEN_HIGH:
	case VIRTIO_MMIO_SHM_BASE_LOW:
	case VIRTIO_MMIO_SHM_BASE_HIGH:
		return UINT32_MAX; /* no shared memory region, whichever is selected */
	default:
		return 0;
	}
}

static int mmio_write(struct vmm_virtio *v, uint64_t reg, uint32_t value)
{
	switch (reg) {
	case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
		v->offered_sel = value;
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES:
		accept_features(v, value);
		break;
	case VIRTIO_MMIO_DRIVER_FEATURES_SEL:
		v->accepted_sel = value;
		break;
	case VIRTIO_MMIO_QUEUE_SEL:
		v->queue_sel = value;
		break;
	case VIRTIO_MMIO_QUEUE_NUM:
		set_size(v, value);
		break;
	case VIRTIO_MMIO_QUEUE_READY:
		return enable(v, value);
	case VIRTIO_MMIO_STATUS:
		return vmm_virtio_write_status(v, (uint8_t)value);
	case VIRTIO_MMIO_QUEUE_DESC_LOW:
	case VIRTIO_MMIO_QUEUE_DESC_HIGH:
	case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
	case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
	case VIRTIO_MMIO_QUEUE_USED_LOW:
	case VIRTIO_MMIO_QUEUE_USED_HIGH:
		set_address(v, (reg - VIRTIO_MMIO_QUEUE_DESC_LOW) >> 4, (reg >> 2) & 1, value);
		break;
	case MMIO_QUEUE_RESET:
		return queue_reset(v, value);
	case VIRTIO_MMIO_SHM_SEL:
		break;
	default:
		v->refused++;
	}
	return VMM_ACCESS_DONE;
}

static int mmio_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		       int is_write)
{
	struct vmm_virtio *v = vmm_container_of(dev, struct vmm_virtio, mmio);
	uint32_t value;
	int rc = VMM_ACCESS_DONE;

	if (offset >= VIRTIO_MMIO_CONFIG)
		return config_access(v, offset - VIRTIO_MMIO_CONFIG, size, data, is_write);
	if (size != 4 || offset & 3) {
		v->refused++;
		if (!is_write)
			memset(data, 0, size);
		return VMM_ACCESS_DONE;
	}
	value = is_write ? (uint32_t)vmm_get_le(data, 4) : 0;
	if (is_write && offset == VIRTIO_MMIO_QUEUE_NOTIFY) {
		vmm_virtio_kick(v, value);
	} else if (is_write && offset == VIRTIO_MMIO_INTERRUPT_ACK) {
		vmm_virtio_isr_take(v, value);
	} else if (!is_write && offset == VIRTIO_MMIO_INTERRUPT_STATUS) {
		vmm_put_le(data, v->isr, 4);
	} else {
		pthread_mutex_lock(&v->lock);
		if (is_write)
			rc = mmio_write(v, offset, value);
		else
			vmm_put_le(data, mmio_read(v, offset), 4);
		pthread_mutex_unlock(&v->lock);
	}
	return rc;
}

/* ---- virtio-pci ---- */

/* The whole structure as the driver sees it: any width reads any part of it. */
static void common_image(struct vmm_virtio *v, uint8_t *at)
{
	const struct vmm_reg_queue *q = selected(v);

	memset(at, 0, VMM_VIRTIO_PCI_COMMON_SIZE);
	vmm_put_le(at + VIRTIO_PCI_COMMON_DFSELECT, v->offered_sel, 4);
	vmm_put_le(at + VIRTIO_PCI_COMMON_DF, half(v->offered, v->offered_sel), 4);
	vmm_put_le(at + VIRTIO_PCI_COMMON_GFSELECT, v->accepted_sel, 4);
	vmm_put_le(at + VIRTIO_PCI_COMMON_GF, half(v->accepted, v->accepted_sel), 4);
	vmm_put_le(at + VIRTIO_PCI_COMMON_MSIX, v->config_vector, 2);
	vmm_put_le(at + VIRTIO_PCI_COMMON_NUMQ, v->nr, 2);
	at[VIRTIO_PCI_COMMON_STATUS] = v->status;
	at[VIRTIO_PCI_COMMON_CFGGENERATION] = (uint8_t)v->generation;
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_SELECT, v->queue_sel, 2);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_MSIX, q ? q->vector : VMM_NO_VECTOR, 2);
	if (!q)
		return; /* size 0: not available */
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_SIZE, q->set.size, 2);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_ENABLE, q->set.enabled, 2);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_NOFF, v->queue_sel, 2);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_DESCLO, q->set.desc, 8);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_AVAILLO, q->set.driver, 8);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_USEDLO, q->set.device, 8);
	vmm_put_le(at + VIRTIO_PCI_COMMON_Q_RESET, q->stopping, 2);
}

/* A vector that does not exist reads back as NO_VECTOR. virtio-v1.3 §4.1.5.1.2. */
static uint16_t checked_vector(const struct vmm_virtio *v, uint32_t vector)
{
	return vector < v->nr_vectors ? (uint16_t)vector : VMM_NO_VECTOR;
}

static int common_write4(struct vmm_virtio *v, uint64_t reg, uint32_t value)
{
	switch (reg) {
	case VIRTIO_PCI_COMMON_DFSELECT:
		v->offered_sel = value;
		break;
	case VIRTIO_PCI_COMMON_GFSELECT:
		v->accepted_sel = value;
		break;
	case VIRTIO_PCI_COMMON_GF:
		accept_features(v, value);
		break;
	case VIRTIO_PCI_COMMON_Q_DESCLO:
	case VIRTIO_PCI_COMMON_Q_DESCHI:
	case VIRTIO_PCI_COMMON_Q_AVAILLO:
	case VIRTIO_PCI_COMMON_Q_AVAILHI:
	case VIRTIO_PCI_COMMON_Q_USEDLO:
	case VIRTIO_PCI_COMMON_Q_USEDHI:
		set_address(v, (reg - VIRTIO_PCI_COMMON_Q_DESCLO) >> 3, (reg >> 2) & 1, value);
		break;
	default:
		v->refused++;
	}
	return VMM_ACCESS_DONE;
}

static int common_write2(struct vmm_virtio *v, uint64_t reg, uint32_t value)
{
	struct vmm_reg_queue *q = selected(v);

	switch (reg) {
	case VIRTIO_PCI_COMMON_MSIX:
		v->config_vector = checked_vector(v, value);
		break;
	case VIRTIO_PCI_COMMON_Q_SELECT:
		v->queue_sel = value;
		break;
	case VIRTIO_PCI_COMMON_Q_SIZE:
		set_size(v, value);
		break;
	case VIRTIO_PCI_COMMON_Q_MSIX:
		if (q)
			q->vector = checked_vector(v, value);
		break;
	case VIRTIO_PCI_COMMON_Q_ENABLE:
		/* virtio-v1.3 §4.1.4.3.2: only reset ends it. */
		if (value == 1)
			return enable(v, value);
		v->refused++;
		break;
	case VIRTIO_PCI_COMMON_Q_RESET:
		return queue_reset(v, value);
	default:
		v->refused++;
	}
	return VMM_ACCESS_DONE;
}

static int common_access(struct vmm_virtio *v, uint64_t offset, uint32_t size, uint8_t *data,
			 int is_write)
{
	uint8_t image[VMM_VIRTIO_PCI_COMMON_SIZE];
	int rc = VMM_ACCESS_DONE;

	pthread_mutex_lock(&v->lock);
	if (!is_write) {
		memset(data, 0, size);
		if (offset + size <= sizeof(image)) {
			common_image(v, image);
			memcpy(data, image + offset, size);
		}
	} else if (size == 1 && offset == VIRTIO_PCI_COMMON_STATUS) {
		rc = vmm_virtio_write_status(v, data[0]);
	} else if (size == 2) {
		rc = common_write2(v, offset, (uint32_t)vmm_get_le(data, 2));
	} else if (size == 4) {
		rc = common_write4(v, offset, (uint32_t)vmm_get_le(data, 4));
	} else if (size == 8 && offset >= VIRTIO_PCI_COMMON_Q_DESCLO && !(offset & 7)) {
		common_write4(v, offset, (uint32_t)vmm_get_le(data, 4));
		common_write4(v, offset + 4, (uint32_t)vmm_get_le(data + 4, 4));
	} else {
		v->refused++;
	}
	pthread_mutex_unlock(&v->lock);
	return rc;
}

static int pci_access(struct vmm_dev *dev, uint64_t offset, uint32_t size, uint8_t *data,
		      int is_write)
{
	struct vmm_virtio *v = vmm_container_of(dev, struct vmm_virtio, pci);

	if (offset >= VMM_VIRTIO_PCI_MSIX)
		return v->rest ? v->rest->access(v->rest, offset - VMM_VIRTIO_PCI_MSIX, size, data,
						 is_write)
			       : VMM_ACCESS_COLD;
	if (offset < VMM_VIRTIO_PCI_ISR)
		return common_access(v, offset, size, data, is_write);
	if (offset >= VMM_VIRTIO_PCI_DEVICE && offset < VMM_VIRTIO_PCI_NOTIFY)
		return config_access(v, offset - VMM_VIRTIO_PCI_DEVICE, size, data, is_write);
	if (!is_write)
		memset(data, 0, size);
	if (is_write && offset >= VMM_VIRTIO_PCI_NOTIFY && !(offset & 3))
		vmm_virtio_kick(v, (offset - VMM_VIRTIO_PCI_NOTIFY) >> 2);
	else if (!is_write && offset == VMM_VIRTIO_PCI_ISR)
		data[0] = (uint8_t)vmm_virtio_isr_take(v, UINT32_MAX);
	return VMM_ACCESS_DONE;
}

void vmm_virtio_faces(struct vmm_virtio *v)
{
	v->mmio.access = mmio_access;
	v->pci.access = pci_access;
}

struct vmm_dev *vmm_virtio_mmio(struct vmm_virtio *v)
{
	return &v->mmio;
}

struct vmm_dev *vmm_virtio_pci(struct vmm_virtio *v)
{
	return &v->pci;
}
