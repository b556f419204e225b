/* Disk I/O. Reads go through io_uring where the host allows it: what is in the page cache is done
 * when the submission returns, what is not runs beside other requests. Buffered writes are a copy
 * into the page cache, which costs less done here than handed over. */
#define _GNU_SOURCE
#include "blk_io.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of the files registered with the ring. */
enum { MAIN, BUFFERED, NR_FILES };

int vmm_blk_io_init(struct vmm_blk_io *io, const struct vmm_blk_config *config)
{
	static const uint8_t ops[] = { IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC };
	const int files[NR_FILES] = { config->fd, config->buffered_fd };

	if (config->align & (config->align - 1) || config->size > INT64_MAX - VMM_BLK_SECTOR ||
	    !config->queue_size || config->queue_size > IOV_MAX)
		return -EINVAL;
	io->config = *config;
	io->ring.fd = -1;
	io->async = !config->sync && !vmm_uring_init(&io->ring, config->queue_size, files,
						     NR_FILES, ops, sizeof(ops));
	return 0;
}

void vmm_blk_io_fini(struct vmm_blk_io *io)
{
	vmm_uring_fini(&io->ring);
}

/* O_DIRECT wants aligned offset, memory and lengths; what is not goes through the page cache. */
static int file_for(const struct vmm_blk_io *io, const struct vmm_blk_request *r)
{
	const uint32_t align = io->config.align;
	uint64_t bits = r->offset;

	if (!align)
		return BUFFERED;
	for (uint32_t i = 0; i < r->nr_data; i++)
		bits |= (uintptr_t)r->data[i].iov_base | r->data[i].iov_len;
	return bits & (align - 1) ? BUFFERED : MAIN;
}

static void zero(const struct iovec *iov, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++)
		/* SAFETY: iov came from vmm_vq_pop(): it is RAM. */
		memset(iov[i].iov_base, 0, iov[i].iov_len);
}

/* After n bytes were moved: VMM_BLK_PENDING while there are more, 0 or -errno. */
static int advance(const struct vmm_blk_io *io, struct vmm_blk_request *r, uint64_t n)
{
	if (!n) {
		/* The end of the file: fine inside the last sector, otherwise someone made the
		 * file shorter. */
		if (r->op == VMM_BLK_WRITE || r->offset < io->config.size)
			return -EIO;
		zero(r->data, r->nr_data);
		n = r->len - r->done;
	}
	r->done += n;
	r->offset += n;
	vmm_iov_skip(&r->data, &r->nr_data, n);
	return r->done < r->len ? VMM_BLK_PENDING : 0;
}

/* ---- plain system calls ---- */

static int sync_once(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	const int fd = file_for(io, r) == MAIN ? io->config.fd : io->config.buffered_fd;
	ssize_t n;

	/* SAFETY: the kernel checks the addresses again; all of them are guest RAM. */
	if (r->op == VMM_BLK_WRITE)
		n = pwritev2(fd, r->data, (int)r->nr_data, (off_t)r->offset,
			     io->write_through ? RWF_DSYNC : 0);
	else
		n = preadv2(fd, r->data, (int)r->nr_data, (off_t)r->offset, 0);
	if (n < 0)
		return errno == EINTR ? VMM_BLK_PENDING : -errno;
	return advance(io, r, (uint64_t)n);
}

static int run_sync(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	int rc;

	if (r->op == VMM_BLK_FLUSH) {
		do
			rc = fdatasync(io->config.fd) ? -errno : 0;
		while (rc == -EINTR);
		return rc;
	}
	do
		rc = sync_once(io, r);
	while (rc == VMM_BLK_PENDING);
	return rc;
}

/* ---- io_uring ---- */

static int queue(struct vmm_blk_io *io, struct vmm_blk_request *r, int file)
{
	struct io_uring_sqe *sqe = vmm_uring_queue(&io->ring);

	if (!sqe)
		return -EBUSY; /* cannot be: as many entries as the queue has descriptors */
	sqe->fd = file;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = (uintptr_t)r;
	if (r->op == VMM_BLK_FLUSH) {
		sqe->opcode = IORING_OP_FSYNC;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
		return VMM_BLK_PENDING;
	}
	sqe->opcode = r->op == VMM_BLK_WRITE ? IORING_OP_WRITEV : IORING_OP_READV;
	sqe->addr = (uintptr_t)r->data;
	sqe->len = r->nr_data;
	sqe->off = r->offset;
	if (r->op == VMM_BLK_WRITE && io->write_through)
		sqe->rw_flags = RWF_DSYNC;
	return VMM_BLK_PENDING;
}

int vmm_blk_io_begin(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	const int file = r->op == VMM_BLK_FLUSH ? BUFFERED : file_for(io, r);
	int rc;

	r->done = 0;
	if (r->op != VMM_BLK_FLUSH && !r->len)
		return 0;
	if (!io->async || (r->op == VMM_BLK_WRITE && file == BUFFERED && !io->write_through))
		return run_sync(io, r);
	rc = queue(io, r, file);
	io->inflight += rc == VMM_BLK_PENDING;
	return rc;
}

int vmm_blk_io_submit(struct vmm_blk_io *io)
{
	return vmm_uring_submit(&io->ring, 0);
}

struct vmm_blk_request *vmm_blk_io_next(struct vmm_blk_io *io, int *rc)
{
	uint64_t data;
	int32_t res;

	while (io->async && vmm_uring_reap(&io->ring, &data, &res)) {
		struct vmm_blk_request *r = (struct vmm_blk_request *)(uintptr_t)data;

		if (res == -EINTR || res == -EAGAIN)
			*rc = VMM_BLK_PENDING;
		else if (res < 0 || r->op == VMM_BLK_FLUSH)
			*rc = res;
		else
			*rc = advance(io, r, (uint64_t)res);
		if (*rc == VMM_BLK_PENDING) {
			const int file = r->op == VMM_BLK_FLUSH ? BUFFERED : file_for(io, r);

			*rc = queue(io, r, file);
			if (*rc == VMM_BLK_PENDING)
				continue; /* the caller submits once it has them all */
		}
		io->inflight--;
		return r;
	}
	return NULL;
}

bool vmm_blk_io_wait(struct vmm_blk_io *io)
{
	if (io->async && vmm_uring_submit(&io->ring, 0)) {
		/* The kernel takes no more: what it has not seen will never end. */
		io->inflight -= io->ring.queued;
		vmm_uring_forget(&io->ring);
	}
	if (!io->inflight)
		return false;
	vmm_uring_submit(&io->ring, 1);
	return true;
}
