/* The file side of a disk: reads, writes and flushes, by io_uring or by plain system calls. */
#ifndef VMM_BLK_IO_H
#define VMM_BLK_IO_H

#include "ring.h"
#include "uring.h"

/* cdef: begin */

struct vmm_blk_config {
	int fd;		      /* where requests go; O_DIRECT when align is set */
	int buffered_fd;      /* the same file without O_DIRECT, for what is not aligned */
	uint32_t align;	      /* 0, or what O_DIRECT wants of offset, length and memory */
	int read_only;
	int sync;	      /* do without io_uring */
	uint64_t size;	      /* bytes; the last sector may be part of one */
	uint16_t queue_size;  /* the longest the ring may be */
	uint8_t serial[20];   /* VIRTIO_BLK_T_GET_ID, padded with zeros */
};

/* cdef: end */

#define VMM_BLK_SECTOR 512
#define VMM_BLK_PENDING 1

enum vmm_blk_op { VMM_BLK_READ, VMM_BLK_WRITE, VMM_BLK_FLUSH };

/* One request, from pop to push. data/nr_data is what is still to be moved. */
struct vmm_blk_request {
	struct vmm_chain chain;
	enum vmm_blk_op op;
	struct iovec *data;
	uint32_t nr_data;
	uint32_t type;	 /* as the driver said */
	uint64_t offset; /* of data, in the file */
	uint64_t len, done;
	uint8_t *status; /* in guest RAM */
	struct vmm_blk_request *next_free;
};

struct vmm_blk_io {
	struct vmm_blk_config config;
	bool write_through; /* a finished write is on the disk */
	bool async;
	struct vmm_uring ring;
	uint32_t inflight;
};

int vmm_blk_io_init(struct vmm_blk_io *io, const struct vmm_blk_config *config);
void vmm_blk_io_fini(struct vmm_blk_io *io);
/* VMM_BLK_PENDING, or how it ended: 0 or -errno. r->done counts the bytes moved. */
int vmm_blk_io_begin(struct vmm_blk_io *io, struct vmm_blk_request *r);
/* Hands pending requests to the kernel; 0 or -errno. */
int vmm_blk_io_submit(struct vmm_blk_io *io);
/* The next pending request that ended, or NULL; *rc is 0 or -errno. */
struct vmm_blk_request *vmm_blk_io_next(struct vmm_blk_io *io, int *rc);
/* Waits until at least one pending request can be had; false when none is left to wait for. */
bool vmm_blk_io_wait(struct vmm_blk_io *io);

#endif
