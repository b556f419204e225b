/* Discarding and zeroing parts of a disk: virtio-v1.3 §5.2.6. The file system or the block device
 * is asked first; zeros are written by hand where it has no better way. */
#define _GNU_SOURCE
#include "blk_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK 65536
#define CHUNKS 64 /* of a pwritev2() */

static bool unsupported(int rc)
{
	return rc == -EOPNOTSUPP || rc == -ENOTTY || rc == -ENOSYS || rc == -EINVAL;
}

static int allocate(int fd, int mode, const struct vmm_blk_segment *s)
{
	int rc;

	do
		rc = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)s->offset, (off_t)s->len);
	while (rc && errno == EINTR);
	return rc ? -errno : 0;
}

/* A hint: where nobody can take it, it has been taken. */
static int discard(const struct vmm_blk_config *config, const struct vmm_blk_segment *s)
{
	uint64_t range[2] = { s->offset, s->len };
	int rc;

	if (config->device)
		rc = ioctl(config->fd, BLKDISCARD, range) ? -errno : 0;
	else
		rc = allocate(config->fd, FALLOC_FL_PUNCH_HOLE, s);
	return unsupported(rc) ? 0 : rc;
}

static int write_zeros(int fd, const struct vmm_blk_segment *s, const bool *cancel)
{
	static const uint8_t zeros[CHUNK];
	struct iovec iov[CHUNKS];
	uint64_t done = 0;

	while (done < s->len) {
		int nr = 0;
		ssize_t n;

		for (uint64_t at = done; at < s->len && nr < CHUNKS; at += CHUNK)
			iov[nr++] = (struct iovec){ (void *)(uintptr_t)zeros,
						    s->len - at < CHUNK ? s->len - at : CHUNK };
		if (__atomic_load_n(cancel, __ATOMIC_RELAXED))
			return -ECANCELED;
		n = pwritev(fd, iov, nr, (off_t)(s->offset + done));
		if (n < 0 && errno != EINTR)
			return -errno;
		if (!n)
			return -EIO;
		done += n > 0 ? (uint64_t)n : 0;
	}
	return 0;
}

static int zero(const struct vmm_blk_config *config, const struct vmm_blk_segment *s,
		const bool *cancel)
{
	int rc = -EOPNOTSUPP;

	if (s->unmap)
		rc = allocate(config->fd, FALLOC_FL_PUNCH_HOLE, s);
	if (unsupported(rc))
		rc = allocate(config->fd, FALLOC_FL_ZERO_RANGE, s);
	if (unsupported(rc))
		rc = write_zeros(config->buffered_fd, s, cancel);
	return rc;
}

/* Someone made the file shorter: there is nothing to zero any more. */
static bool inside(const struct vmm_blk_config *config, const struct vmm_blk_segment *s)
{
	struct stat st;

	return config->device || fstat(config->fd, &st) ||
	       s->offset + s->len < (uint64_t)st.st_size + config->block;
}

int vmm_blk_zero(const struct vmm_blk_config *config, const struct vmm_blk_request *r,
		 const bool *cancel)
{
	int rc = 0;

	for (uint32_t i = 0; i < r->nr_segments && !rc; i++) {
		const struct vmm_blk_segment *s = &r->segments[i];

		if (!s->len)
			continue;
		if (__atomic_load_n(cancel, __ATOMIC_RELAXED))
			rc = -ECANCELED;
		else if (!inside(config, s))
			rc = -EIO;
		else
			rc = r->op == VMM_BLK_DISCARD ? discard(config, s) :
							zero(config, s, cancel);
	}
	if (!rc && r->durable && fdatasync(config->buffered_fd))
		rc = -errno;
	return rc;
}
