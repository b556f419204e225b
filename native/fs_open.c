/* FUSE: files are opened, made and closed. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#ifndef FUSE_OPEN_KILL_SUIDGID
#define FUSE_OPEN_KILL_SUIDGID 1
#endif

/* How often a name may change between being there and not while it is opened. */
#define TRIES 16

/* What of the guest's flags counts. O_DIRECT would make demands on where the guest's memory is. */
int fs_open_flags(const struct vmm_fs *fs, uint32_t asked)
{
	int flags = (int)asked & (O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC | O_DSYNC);

	if ((flags & O_ACCMODE) == O_ACCMODE)
		return -EINVAL;
	if (fs->config.read_only && ((flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC))
		return -EROFS;
	if (fs->config.writeback) {
		/* The guest's cache reads what it was given to write, and knows where the end is. */
		if ((flags & O_ACCMODE) == O_WRONLY)
			flags = (flags & ~O_ACCMODE) | O_RDWR;
		flags &= ~O_APPEND;
	}
	return flags;
}

/* Whether a file is as it was when the guest opened it last. */
static bool unchanged(struct vmm_fs *fs, struct fs_inode *inode, const struct statx *stx)
{
	const struct fs_version now = {
		.mtime = stx->stx_mtime.tv_sec,
		.ctime = stx->stx_ctime.tv_sec,
		.mtime_ns = stx->stx_mtime.tv_nsec,
		.ctime_ns = stx->stx_ctime.tv_nsec,
		.size = stx->stx_size,
	};
	const struct fs_version *old = &inode->version;
	bool same;

	pthread_mutex_lock(&fs->lock);
	same = inode->seen && old->mtime == now.mtime && old->mtime_ns == now.mtime_ns &&
	       old->ctime == now.ctime && old->ctime_ns == now.ctime_ns && old->size == now.size;
	inode->version = now;
	inode->seen = true;
	pthread_mutex_unlock(&fs->lock);
	return same;
}

static uint32_t cache_flags(struct vmm_fs *fs, struct fs_inode *inode, int fd)
{
	struct statx stx;

	switch (fs->config.cache) {
	case VMM_FS_ALWAYS:
		return FOPEN_KEEP_CACHE;
	case VMM_FS_NEVER:
		return FOPEN_DIRECT_IO;
	default:
		return !fs_stat_fd(fd, &stx) && unchanged(fs, inode, &stx) ? FOPEN_KEEP_CACHE : 0;
	}
}

/* The answer for a descriptor, which is taken whatever happens. */
static int opened(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *inode, int fd,
		  int flags, uint32_t open_flags)
{
	struct fuse_open_out out = { 0 };
	int rc;

	if (flags & O_TRUNC && open_flags & FUSE_OPEN_KILL_SUIDGID)
		fs_kill_suid(fs, fd);
	out.open_flags = cache_flags(fs, inode, fd);
	rc = fs_handle_add(fs, inode, fd, flags, &out.fh);
	if (rc)
		return rc;
	rc = fs_put(r, &out, sizeof(out));
	if (rc)
		fs_handle_close(fs, out.fh, false);
	return rc;
}

/* A regular file that is there, or -errno. Nothing else is ever opened. */
static int open_inode(struct vmm_fs *fs, struct fs_inode *inode, int flags)
{
	int fd;

	if (!S_ISREG(inode->id.type))
		return S_ISDIR(inode->id.type) ? -EISDIR : S_ISLNK(inode->id.type) ? -ELOOP : -ENXIO;
	fd = fs_inode_fd(fs, inode);
	return fd < 0 ? fd : fs_reopen(fs, fd, flags);
}

FS_HANDLER(open)
{
	struct fuse_open_in in;
	struct fs_inode *inode;
	int flags, rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	flags = fs_open_flags(fs, in.flags);
	if (flags < 0)
		return flags;
	inode = fs_inode_get(fs, r->in.nodeid);
	if (!inode)
		return -ENOENT;
	rc = open_inode(fs, inode, flags);
	if (rc >= 0)
		rc = opened(fs, r, inode, rc, flags, in.open_flags);
	fs_inode_put(fs, inode);
	return rc;
}

/* ---- create ---- */

static void unmask(const struct vmm_fs *fs, int fd, uint32_t mode)
{
	const uint32_t lost = mode & fs->config.umask & 0777;
	struct stat st;

	if (!fs_thread_alone() && lost && !fstat(fd, &st))
		fchmod(fd, (st.st_mode & 07777) | lost);
}

/* A file that is new for certain; or -errno. `name` NULL: one without a name. */
static int make_file(struct vmm_fs *fs, struct fs_request *r, int dirfd, const char *name,
		     int flags, uint32_t mode)
{
	const int how = name ? O_CREAT | O_EXCL | O_NOFOLLOW : O_TMPFILE;
	struct fs_ids ids;
	int fd = fs_ids_as(fs, r, &ids);

	if (fd)
		return fd;
	flags = (flags & ~O_TRUNC) | how | O_CLOEXEC;
	if (!name && (flags & O_ACCMODE) == O_RDONLY)
		flags |= O_RDWR; /* the host insists */
	fd = openat(dirfd, name ? name : ".", flags, mode & 07777);
	if (fd < 0)
		fd = errno == EMFILE ? -ENFILE : -errno;
	fs_ids_back(&ids);
	if (fd >= 0)
		unmask(fs, fd, mode);
	return fd;
}

/* The inode of a file just made, which keeps a descriptor of it. */
static int intern_file(struct vmm_fs *fs, struct fs_inode *parent, const char *name, int fd,
		       struct fs_inode **inode, struct statx *stx)
{
	int rc = fs_stat_fd(fd, stx);

	if (!rc)
		rc = fs_inode_intern(fs, parent, name, stx, inode);
	if (rc)
		return rc;
	rc = fs_reopen(fs, fd, O_PATH);
	if (rc >= 0) {
		fs_inode_adopt(fs, *inode, rc);
		return 0;
	}
	fs_inode_forget(fs, (*inode)->nodeid, 1);
	fs_inode_put(fs, *inode);
	return rc;
}

/* One that is new, or if the guest allows that one that is there. The descriptor, or -errno. */
static int make_or_open(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *parent,
			const char *name, const struct fuse_create_in *in, int flags,
			struct fs_inode **inode, struct statx *stx)
{
	for (int i = 0; i < TRIES; i++) {
		const int dirfd = fs_inode_fd(fs, parent);
		int fd, rc;

		if (dirfd < 0)
			return dirfd;
		fd = make_file(fs, r, dirfd, name, flags, in->mode);
		if (fd >= 0) {
			rc = intern_file(fs, parent, name, fd, inode, stx);
			if (rc)
				close(fd);
			return rc ? rc : fd;
		}
		if (fd != -EEXIST || in->flags & O_EXCL)
			return fd;
		rc = fs_lookup_name(fs, parent, name, inode, stx);
		if (!rc) {
			fd = open_inode(fs, *inode, flags);
			if (fd >= 0 && flags & O_TRUNC)
				fs_stat_fd(fd, stx);
			if (fd >= 0)
				return fd;
			fs_inode_forget(fs, (*inode)->nodeid, 1);
			fs_inode_put(fs, *inode);
			rc = fd;
		}
		if (rc != -ENOENT && rc != -ESTALE)
			return rc;
	}
	return -ESTALE;
}

static int created(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *inode, int fd,
		   const struct statx *stx, int flags, uint32_t open_flags)
{
	struct fuse_entry_out out;
	int rc;

	fs_entry_of(fs, inode, stx, &out);
	rc = fs_put(r, &out, sizeof(out));
	if (rc)
		close(fd);
	else
		rc = opened(fs, r, inode, fd, flags, open_flags);
	if (rc)
		fs_inode_forget(fs, inode->nodeid, 1);
	fs_inode_put(fs, inode);
	return rc;
}

FS_HANDLER(create)
{
	struct fuse_create_in in;
	struct fs_inode *parent, *inode;
	char name[FS_NAME];
	struct statx stx;
	int flags, fd, rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_name(r, name);
	if (rc)
		return rc;
	flags = fs_open_flags(fs, in.flags);
	if (flags < 0)
		return flags;
	parent = fs_inode_get(fs, r->in.nodeid);
	if (!parent)
		return -ENOENT;
	fd = make_or_open(fs, r, parent, name, &in, flags, &inode, &stx);
	fs_inode_put(fs, parent);
	return fd < 0 ? fd : created(fs, r, inode, fd, &stx, flags, in.open_flags);
}

FS_HANDLER(tmpfile)
{
	struct fuse_create_in in;
	struct fs_inode *parent, *inode;
	struct statx stx;
	int flags, fd, rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	flags = fs_open_flags(fs, in.flags);
	if (flags < 0)
		return flags;
	parent = fs_inode_get(fs, r->in.nodeid);
	if (!parent)
		return -ENOENT;
	fd = fs_inode_fd(fs, parent);
	if (fd >= 0)
		fd = make_file(fs, r, fd, NULL, flags, in.mode);
	fs_inode_put(fs, parent);
	if (fd < 0)
		return fd;
	rc = intern_file(fs, NULL, NULL, fd, &inode, &stx);
	if (rc) {
		close(fd);
		return rc;
	}
	return created(fs, r, inode, fd, &stx, flags, in.open_flags);
}

/* ---- the end ---- */

FS_HANDLER(flush)
{
	struct fuse_flush_in in;
	struct fs_handle *h;

	if (!fs->config.host_locks)
		return -ENOSYS; /* and so never asked again: a write's error was said at once */
	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	fs_locks_release(fs, h->inode, in.lock_owner);
	fs_handle_put(fs, h);
	return 0;
}

FS_HANDLER(release)
{
	struct fuse_release_in in;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_handle_close(fs, in.fh, false);
	fs_locks_wake(fs);
	return rc;
}
