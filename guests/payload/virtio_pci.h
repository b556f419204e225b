/* What virtio_pci.S and its users share. virtio-v1.3 §2.7. */
#ifndef VIRTIO_PCI_H
#define VIRTIO_PCI_H

#include "payload.h"

#define VIRTIO_BLK	0x10421af4	/* device and vendor of the modern block device */
#define VQ_SIZE		256

#define F_NEXT		1
#define F_WRITE		2
#define F_INDIRECT	4
#define NO_INTERRUPT	1

#endif
