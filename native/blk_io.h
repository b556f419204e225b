/* The file side of a disk: reads, writes, flushes, discards, by io_uring or by worker threads. */
#ifndef VMM_BLK_IO_H
#define VMM_BLK_IO_H

#include "pool.h"
#include "ring.h"
#include "uring.h"

/* cdef: begin */

/* What becomes of a request the host could not carry out. PAUSE keeps it until vmm_blk_retry(). */
enum { VMM_BLK_REPORT, VMM_BLK_IGNORE, VMM_BLK_PAUSE, VMM_BLK_ENOSPC };
enum { VMM_BLK_MAX_SEGMENTS = 32, VMM_BLK_MAX_DISCARD = 1 << 21 }; /* the latter in sectors */

struct vmm_blk_config {
	int fd;		      /* where requests go; O_DIRECT when align is set */
	int buffered_fd;      /* the same file without O_DIRECT, for what is not aligned */
	int held_fd;	      /* an eventfd: a request is held (PAUSE); or -1 */
	uint32_t align;	      /* 0, or what O_DIRECT wants of offset, length and memory */
	uint32_t block;	      /* bytes: requests start and end on a multiple */
	uint8_t read_only, no_uring;
	uint8_t device;	      /* a block device, not a file */
	uint8_t discard;      /* DISCARD and WRITE_ZEROES are offered */
	uint8_t write_back;   /* at power-on: a finished write may be in the host's cache only */
	uint8_t read_error, write_error; /* VMM_BLK_REPORT... */
	uint16_t queues;
	uint16_t queue_size;  /* the longest a ring may be */
	uint64_t size;	      /* bytes; the last block may be part of one */
	uint8_t serial[20];   /* VIRTIO_BLK_T_GET_ID, padded with zeros */
};

/* cdef: end */

#define VMM_BLK_SECTOR 512
#define VMM_BLK_PENDING 1
/* Threads of a disk, at most. */
#define VMM_BLK_WORKERS 16

enum vmm_blk_op { VMM_BLK_READ, VMM_BLK_WRITE, VMM_BLK_FLUSH, VMM_BLK_DISCARD, VMM_BLK_ZERO };

struct vmm_blk_segment {
	uint64_t offset, len; /* bytes */
	bool unmap;
};

/* One request, from pop to push. data/nr_data is what is still to be moved. */
struct vmm_blk_request {
	struct vmm_chain chain;
	enum vmm_blk_op op;
	bool durable; /* what it changes is on the disk when it ends */
	struct iovec *data;
	uint32_t nr_data;
	uint32_t type;	 /* as the driver said */
	uint64_t offset; /* of data, in the file */
	uint64_t len, done;
	uint8_t *status; /* in guest RAM */
	struct vmm_blk_segment *segments; /* of DISCARD and ZERO */
	uint32_t nr_segments;
	struct vmm_blk_request *next; /* free, held or finished */
	struct vmm_job job;
	struct vmm_blk_io *io;
	int rc; /* of a worker */
};

/* What the queues of a disk share. */
struct vmm_blk_file {
	struct vmm_blk_config config;
	uint64_t size; /* atomic: bytes, changes when the disk is resized */
	struct vmm_pool *pool;
};

/* One queue's. A worker touches nothing of it but what is under the lock. */
struct vmm_blk_io {
	struct vmm_blk_file *file;
	bool async; /* io_uring */
	struct vmm_uring ring;
	uint32_t in_ring, in_pool; /* pending requests */
	bool looked;		   /* `end` is what it was a moment ago */
	uint64_t end;		   /* of a file that someone made shorter, or UINT64_MAX */
	bool cancel;		   /* atomic: whoever takes long may give up */
	int event;		   /* an eventfd: `finished` is no longer empty */
	pthread_mutex_t lock;
	pthread_cond_t cond;
	struct vmm_blk_request *finished;
};

int vmm_blk_io_init(struct vmm_blk_io *io, struct vmm_blk_file *file);
void vmm_blk_io_fini(struct vmm_blk_io *io);
/* VMM_BLK_PENDING, or how it ended: 0 or -errno. r->done counts the bytes moved; what an earlier
 * try moved is not moved again. */
int vmm_blk_io_begin(struct vmm_blk_io *io, struct vmm_blk_request *r);
/* Hands pending requests to the kernel, and ends a batch; 0 or -errno. */
int vmm_blk_io_submit(struct vmm_blk_io *io);
/* The next pending request that ended, or NULL; *rc is 0 or -errno. */
struct vmm_blk_request *vmm_blk_io_next(struct vmm_blk_io *io, int *rc);
/* Waits until at least one pending request can be had; false when none is left to wait for. */
bool vmm_blk_io_wait(struct vmm_blk_io *io);
/* Fills buffers with zeros. */
void vmm_blk_blank(const struct iovec *iov, uint32_t nr);

/* blk_zero.c: discards or zeroes segments of the file; 0 or -errno. Takes as long as it takes,
 * unless *cancel becomes true. */
int vmm_blk_zero(const struct vmm_blk_config *config, const struct vmm_blk_request *r,
		 const bool *cancel);

#endif
