/* FUSE: bytes, straight between the host's files and the guest's memory. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define OUT_HEADER sizeof(struct fuse_out_header)

static void count(uint64_t *what, uint64_t by)
{
	__atomic_fetch_add(what, by, __ATOMIC_RELAXED);
}

/* ---- read ---- */

/* Reads on until all is there, the file ends, or (at once) the host would have to wait: 1. */
static int read_on(struct fs_request *r, int fd, uint64_t offset, uint32_t want, bool at_once)
{
	while (r->done < want) {
		const uint32_t nr = fs_slice(r->out, r->nr_out, OUT_HEADER + r->done,
					     want - r->done, r->data);
		/* SAFETY: parts of iovs that vmm_vq_pop() found to be RAM. */
		const ssize_t n = preadv2(fd, r->data, (int)nr, (off_t)(offset + r->done),
					  at_once ? RWF_NOWAIT : 0);

		if (n > 0)
			r->done += (uint32_t)n;
		else if (!n)
			return 0;
		else if (at_once)
			return 1;
		else if (errno != EINTR)
			return r->done ? 0 : -errno;
	}
	return 0;
}

FS_HANDLER(read)
{
	struct fuse_read_in in;
	struct fs_handle *h;
	uint32_t want;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	want = in.size < r->room ? in.size : r->room;
	if (in.offset > (uint64_t)INT64_MAX - want)
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	rc = read_on(r, h->fd, in.offset, want, !r->worker);
	fs_handle_put(fs, h);
	if (rc > 0) {
		/* Again, on a worker: what came from a cache stays. */
		r->at = sizeof(struct fuse_in_header);
		return FS_TO_WORKER;
	}
	if (!rc) {
		r->out_len = r->done;
		count(&fs->bytes_read, r->done);
	}
	return rc;
}

/* ---- write ---- */

static int write_on(struct fs_request *r, int fd, uint64_t offset, uint32_t want, uint32_t *done)
{
	while (*done < want) {
		const uint32_t nr = fs_slice(r->chain.iov, r->chain.nr_read, r->at + *done,
					     want - *done, r->data);
		/* SAFETY: parts of iovs that vmm_vq_pop() found to be RAM. */
		const ssize_t n = pwritev(fd, r->data, (int)nr, (off_t)(offset + *done));

		if (n > 0)
			*done += (uint32_t)n;
		else if (!n)
			return 0;
		else if (errno != EINTR)
			return *done ? 0 : -errno;
	}
	return 0;
}

/* What the guest's cache writes back belongs where it says, through whatever handle it comes. */
static int write_back_fd(struct vmm_fs *fs, const struct fs_handle *h)
{
	const int fd = fs_inode_fd(fs, h->inode);

	return fd < 0 ? fd : fs_reopen(fs, fd, O_WRONLY);
}

FS_HANDLER(write)
{
	struct fuse_write_in in;
	struct fuse_write_out out = { 0 };
	struct fs_handle *h;
	int fd, own = -1, rc;

	if (!fs_take(r, &in, sizeof(in)) || in.size > fs_left(r))
		return -EINVAL;
	if (in.offset > (uint64_t)INT64_MAX - in.size)
		return -EFBIG;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	if (!r->worker && (in.size > FS_SMALL_WRITE || h->sync)) {
		fs_handle_put(fs, h);
		r->at = sizeof(struct fuse_in_header);
		return FS_TO_WORKER;
	}
	fd = h->fd;
	if (h->append && in.write_flags & FUSE_WRITE_CACHE)
		fd = own = write_back_fd(fs, h);
	rc = fd < 0 ? fd : write_on(r, fd, in.offset, in.size, &out.size);
	if (!rc && in.write_flags & FUSE_WRITE_KILL_SUIDGID)
		fs_kill_suid(fs, fd);
	if (own >= 0)
		close(own);
	fs_handle_put(fs, h);
	if (rc)
		return rc;
	count(&fs->bytes_written, out.size);
	return fs_put(r, &out, sizeof(out));
}

/* ---- the rest ---- */

static int sync_handle(struct vmm_fs *fs, struct fs_request *r, bool dir)
{
	struct fuse_fsync_in in;
	struct fs_handle *h;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, dir);
	if (!h)
		return -EBADF;
	rc = h->fd < 0				       ? 0
	     : in.fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(h->fd)
						     : fsync(h->fd);
	rc = rc ? -errno : 0;
	fs_handle_put(fs, h);
	return rc;
}

FS_HANDLER(fsync)
{
	return sync_handle(fs, r, false);
}

FS_HANDLER(fsyncdir)
{
	return sync_handle(fs, r, true);
}

FS_HANDLER(syncfs)
{
	int fd, rc;

	(void)r;
	fd = fs_reopen(fs, fs->root->fd, O_RDONLY | O_DIRECTORY);
	if (fd < 0)
		return fd;
	rc = syncfs(fd) ? -errno : 0;
	close(fd);
	return rc;
}

FS_HANDLER(fallocate)
{
	struct fuse_fallocate_in in;
	struct fs_handle *h;
	int rc;

	if (!fs_take(r, &in, sizeof(in)) || in.offset > INT64_MAX || in.length > INT64_MAX)
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	rc = fallocate(h->fd, (int)in.mode, (off_t)in.offset, (off_t)in.length) ? -errno : 0;
	fs_handle_put(fs, h);
	return rc;
}

FS_HANDLER(lseek)
{
	struct fuse_lseek_in in;
	struct fuse_lseek_out out;
	struct fs_handle *h;
	off_t at;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	/* The guest knows its own position; only these ask for something. */
	if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE)
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	at = lseek(h->fd, (off_t)in.offset, (int)in.whence);
	out.offset = (uint64_t)at;
	fs_handle_put(fs, h);
	return at < 0 ? -errno : fs_put(r, &out, sizeof(out));
}

FS_HANDLER(copy_file_range)
{
	struct fuse_copy_file_range_in in;
	struct fuse_write_out out = { 0 };
	struct fs_handle *from, *to;
	ssize_t n = -1;
	int rc = -EBADF;

	if (!fs_take(r, &in, sizeof(in)) || in.flags)
		return -EINVAL;
	from = fs_handle_get(fs, in.fh_in, false);
	to = fs_handle_get(fs, in.fh_out, false);
	if (from && to) {
		off_t in_at = (off_t)in.off_in, out_at = (off_t)in.off_out;
		/* The answer has 32 bits, of which the guest's kernel takes whole pages. */
		const size_t len = in.len < INT_MAX - 4095 ? in.len : INT_MAX - 4095;

		n = syscall(SYS_copy_file_range, from->fd, &in_at, to->fd, &out_at, len, 0);
		rc = n < 0 ? -errno : 0;
	}
	if (from)
		fs_handle_put(fs, from);
	if (to)
		fs_handle_put(fs, to);
	if (rc)
		return rc;
	out.size = (uint32_t)n;
	return fs_put(r, &out, sizeof(out));
}
