/* Disk I/O. Reads go through io_uring where the host allows it: what is in the page cache is done
 * when the submission returns, what is not runs beside other requests. Where it does not, workers
 * wait for what would block. Buffered writes are a copy into the page cache, which costs less done
 * here than handed over. */
#define _GNU_SOURCE
#include "blk_io.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of the files registered with the ring. */
enum { MAIN, BUFFERED, NR_FILES };

static int start_ring(struct vmm_blk_io *io, const struct vmm_blk_config *config)
{
	static const uint8_t ops[] = { IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC };
	const int files[NR_FILES] = { config->fd, config->buffered_fd };

	return vmm_uring_init(&io->ring, config->queue_size, files, NR_FILES, ops, sizeof(ops));
}

int vmm_blk_io_init(struct vmm_blk_io *io, struct vmm_blk_file *file)
{
	io->file = file;
	io->ring.fd = -1;
	io->async = !file->config.no_uring && !start_ring(io, &file->config);
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->cond, NULL);
	io->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return io->event < 0 ? -errno : 0;
}

void vmm_blk_io_fini(struct vmm_blk_io *io)
{
	vmm_uring_fini(&io->ring);
	if (io->event >= 0)
		close(io->event);
	pthread_cond_destroy(&io->cond);
	pthread_mutex_destroy(&io->lock);
}

/* O_DIRECT wants aligned offset, memory and lengths; what is not goes through the page cache. */
static int file_for(const struct vmm_blk_io *io, const struct vmm_blk_request *r)
{
	const uint32_t align = io->file->config.align;
	uint64_t bits = r->offset;

	if (!align)
		return BUFFERED;
	for (uint32_t i = 0; i < r->nr_data; i++)
		bits |= (uintptr_t)r->data[i].iov_base | r->data[i].iov_len;
	return bits & (align - 1) ? BUFFERED : MAIN;
}

void vmm_blk_blank(const struct iovec *iov, uint32_t nr)
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
		if (r->op == VMM_BLK_WRITE ||
		    r->offset < __atomic_load_n(&io->file->size, __ATOMIC_RELAXED))
			return -EIO;
		vmm_blk_blank(r->data, r->nr_data);
		n = r->len - r->done;
	}
	r->done += n;
	r->offset += n;
	vmm_iov_skip(&r->data, &r->nr_data, n);
	return r->done < r->len ? VMM_BLK_PENDING : 0;
}

/* ---- plain system calls ---- */

static int file_descriptor(const struct vmm_blk_io *io, int file)
{
	return file == MAIN ? io->file->config.fd : io->file->config.buffered_fd;
}

static int move_once(struct vmm_blk_io *io, struct vmm_blk_request *r, int flags)
{
	const int fd = file_descriptor(io, file_for(io, r));
	ssize_t n;

	/* SAFETY: the kernel checks the addresses again; all of them are guest RAM. */
	if (r->op == VMM_BLK_WRITE)
		n = pwritev2(fd, r->data, (int)r->nr_data, (off_t)r->offset, flags);
	else
		n = preadv2(fd, r->data, (int)r->nr_data, (off_t)r->offset, flags);
	if (n < 0)
		return errno == EINTR ? VMM_BLK_PENDING : -errno;
	return advance(io, r, (uint64_t)n);
}

/* Until it is done, however long that takes. */
static int run(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	int rc;

	if (r->op == VMM_BLK_DISCARD || r->op == VMM_BLK_ZERO)
		return vmm_blk_zero(&io->file->config, r, &io->cancel);
	do
		if (r->op == VMM_BLK_FLUSH)
			rc = !fdatasync(io->file->config.fd) ? 0 :
			     errno == EINTR		     ? VMM_BLK_PENDING :
							       -errno;
		else
			rc = move_once(io, r, r->durable ? RWF_DSYNC : 0);
	while (rc == VMM_BLK_PENDING);
	return rc;
}

/* ---- worker threads ---- */

static void run_job(struct vmm_job *job)
{
	struct vmm_blk_request *r =
		(struct vmm_blk_request *)((uint8_t *)job - offsetof(struct vmm_blk_request, job));
	struct vmm_blk_io *io = r->io;
	const uint64_t one = 1;

	r->rc = run(io, r);
	pthread_mutex_lock(&io->lock);
	r->next = io->finished;
	io->finished = r;
	pthread_cond_signal(&io->cond);
	/* Under the lock: whoever waited may free all this as soon as it is released. */
	while (!r->next && write(io->event, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_mutex_unlock(&io->lock);
}

static int hand_over(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	r->io = io;
	r->job.run = run_job;
	io->in_pool++;
	vmm_pool_submit(io->file->pool, &r->job);
	return VMM_BLK_PENDING;
}

/* What the page cache can answer needs no worker. */
static int read_cached(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	int rc;

	do
		rc = move_once(io, r, RWF_NOWAIT);
	while (rc == VMM_BLK_PENDING);
	return rc == -EAGAIN || rc == -EOPNOTSUPP ? hand_over(io, r) : rc;
}

/* ---- a file that became shorter ---- */

/* A write past its end would make it longer again, and what had been between would read as zeros
 * that nobody wrote. Once for a batch. */
static bool past_end(struct vmm_blk_io *io, const struct vmm_blk_request *r)
{
	struct stat st;

	if (!io->looked && !io->file->config.device) {
		const uint64_t size = __atomic_load_n(&io->file->size, __ATOMIC_RELAXED);
		const bool shorter = !fstat(io->file->config.fd, &st) &&
				     (uint64_t)st.st_size < size;

		io->end = shorter ? (uint64_t)st.st_size : UINT64_MAX;
		io->looked = true;
	}
	return !io->file->config.device && r->offset + (r->len - r->done) > io->end;
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
	if (r->op == VMM_BLK_WRITE && r->durable)
		sqe->rw_flags = RWF_DSYNC;
	return VMM_BLK_PENDING;
}

int vmm_blk_io_begin(struct vmm_blk_io *io, struct vmm_blk_request *r)
{
	const bool moves = r->op == VMM_BLK_READ || r->op == VMM_BLK_WRITE;
	const int file = moves ? file_for(io, r) : BUFFERED;
	int rc;

	if (moves && r->done == r->len)
		return 0;
	if (r->op == VMM_BLK_WRITE && past_end(io, r))
		return -EIO;
	if (r->op == VMM_BLK_WRITE && file == BUFFERED && !r->durable)
		return run(io, r);
	if (!io->async && r->op == VMM_BLK_READ && file == BUFFERED)
		return read_cached(io, r);
	if (!io->async || r->op == VMM_BLK_DISCARD || r->op == VMM_BLK_ZERO)
		return hand_over(io, r);
	rc = queue(io, r, file);
	io->in_ring += rc == VMM_BLK_PENDING;
	return rc;
}

int vmm_blk_io_submit(struct vmm_blk_io *io)
{
	io->looked = false;
	return io->async ? vmm_uring_submit(&io->ring, 0) : 0;
}

static struct vmm_blk_request *next_of_ring(struct vmm_blk_io *io, int *rc)
{
	uint64_t data;
	int32_t res;

	while (vmm_uring_reap(&io->ring, &data, &res)) {
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
		io->in_ring--;
		return r;
	}
	return NULL;
}

struct vmm_blk_request *vmm_blk_io_next(struct vmm_blk_io *io, int *rc)
{
	struct vmm_blk_request *r = io->in_ring ? next_of_ring(io, rc) : NULL;

	if (r || !io->in_pool)
		return r;
	pthread_mutex_lock(&io->lock);
	r = io->finished;
	if (r) {
		io->finished = r->next;
		io->in_pool--;
		*rc = r->rc;
	}
	pthread_mutex_unlock(&io->lock);
	return r;
}

bool vmm_blk_io_wait(struct vmm_blk_io *io)
{
	if (io->in_pool) {
		pthread_mutex_lock(&io->lock);
		while (!io->finished)
			pthread_cond_wait(&io->cond, &io->lock);
		pthread_mutex_unlock(&io->lock);
		return true;
	}
	if (io->async && vmm_uring_submit(&io->ring, 0)) {
		/* The kernel takes no more: what it has not seen will never end. */
		io->in_ring -= io->ring.queued;
		vmm_uring_forget(&io->ring);
	}
	if (!io->in_ring)
		return false;
	vmm_uring_submit(&io->ring, 1);
	return true;
}
