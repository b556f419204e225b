/* FUSE: attributes of files, and of the file system. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef FATTR_KILL_SUIDGID
#define FATTR_KILL_SUIDGID (1 << 11)
#endif

/* Seconds the guest may believe attributes and names. */
#define FOR_A_WHILE 1
#define FOR_GOOD 86400

/* Several of the host's file systems are one to the guest, where a number must still name one
 * file: those but the root's get bits of their device mixed in. */
uint64_t fs_ino_of(const struct vmm_fs *fs, uint64_t dev, uint64_t ino)
{
	const uint64_t home = fs->root->id.dev;

	return dev == home ? ino : ino ^ ((dev - home) * 0x9e3779b97f4a7c15ULL >> 50 | 1) << 48;
}

/* As the kernel's new_encode_dev(). */
static uint32_t rdev_of(uint32_t major, uint32_t minor)
{
	return (minor & 0xff) | major << 8 | (minor & ~0xffU) << 12;
}

void fs_attr_of(const struct vmm_fs *fs, const struct statx *stx, bool hidden,
		struct fuse_attr *attr)
{
	const uint64_t dev = (uint64_t)stx->stx_dev_major << 32 | stx->stx_dev_minor;

	*attr = (struct fuse_attr){
		.ino = fs_ino_of(fs, dev, stx->stx_ino),
		.size = stx->stx_size,
		.blocks = stx->stx_blocks,
		.atime = (uint64_t)stx->stx_atime.tv_sec,
		.mtime = (uint64_t)stx->stx_mtime.tv_sec,
		.ctime = (uint64_t)stx->stx_ctime.tv_sec,
		.atimensec = stx->stx_atime.tv_nsec,
		.mtimensec = stx->stx_mtime.tv_nsec,
		.ctimensec = stx->stx_ctime.tv_nsec,
		.mode = stx->stx_mode,
		.nlink = stx->stx_nlink,
		.uid = fs_uid_out(fs, stx->stx_uid),
		.gid = fs_gid_out(fs, stx->stx_gid),
		.rdev = rdev_of(stx->stx_rdev_major, stx->stx_rdev_minor),
		.blksize = stx->stx_blksize,
	};
	if (hidden && S_ISDIR(attr->mode))
		attr->mode = S_IFDIR | 0555;
}

static uint64_t believed(const struct vmm_fs *fs)
{
	return fs->config.cache == VMM_FS_ALWAYS ? FOR_GOOD
	       : fs->config.cache == VMM_FS_AUTO ? FOR_A_WHILE
						 : 0;
}

void fs_entry_of(const struct vmm_fs *fs, const struct fs_inode *inode, const struct statx *stx,
		 struct fuse_entry_out *out)
{
	*out = (struct fuse_entry_out){
		.nodeid = inode ? inode->nodeid : 0,
		.entry_valid = believed(fs),
		.attr_valid = believed(fs),
	};
	if (inode)
		fs_attr_of(fs, stx, inode->hidden, &out->attr);
}

static int put_attr(struct vmm_fs *fs, struct fs_request *r, const struct fs_inode *inode,
		    const struct statx *stx)
{
	struct fuse_attr_out out = { .attr_valid = believed(fs) };

	fs_attr_of(fs, stx, inode->hidden, &out.attr);
	return fs_put(r, &out, sizeof(out));
}

FS_HANDLER(getattr)
{
	struct fuse_getattr_in in;
	struct fs_handle *h = NULL;
	struct fs_inode *inode;
	struct statx stx;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	inode = fs_inode_get(fs, r->in.nodeid);
	if (!inode)
		return -ENOENT;
	if (in.getattr_flags & FUSE_GETATTR_FH)
		h = fs_handle_get(fs, in.fh, false);
	rc = h && h->inode == inode ? fs_stat_fd(h->fd, &stx) : fs_inode_stat(fs, inode, &stx);
	if (h)
		fs_handle_put(fs, h);
	if (!rc)
		rc = put_attr(fs, r, inode, &stx);
	fs_inode_put(fs, inode);
	return rc;
}

/* ---- setattr ---- */

void fs_kill_suid(struct vmm_fs *fs, int fd)
{
	struct statx stx;
	mode_t mode;

	/* The host does it by itself for ordinary users. */
	if (!fs->privileged || fs_stat_fd(fd, &stx))
		return;
	mode = stx.stx_mode & 07777;
	if (mode & S_ISUID || (mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP)) {
		const mode_t kept = mode & S_IXGRP ? 01777 : 03777;

		fchmod(fd, mode & kept);
	}
}

static int set_mode(struct vmm_fs *fs, const struct fs_inode *inode, int fd, uint32_t mode)
{
	char path[FS_PATH];

	(void)fs;
	if (S_ISLNK(inode->id.type))
		return -EOPNOTSUPP;
	return fchmodat(AT_FDCWD, fs_path(path, fd), mode & 07777, 0) ? -errno : 0;
}

static int set_owner(struct vmm_fs *fs, int fd, const struct fuse_setattr_in *in)
{
	uint32_t uid = in->valid & FATTR_UID ? in->uid : UINT32_MAX;
	uint32_t gid = in->valid & FATTR_GID ? in->gid : UINT32_MAX;
	struct statx stx;
	int rc = fs_stat_fd(fd, &stx);

	if (!rc)
		rc = fs_owner_in(fs, &stx, &uid, &gid);
	if (rc || (uid == UINT32_MAX && gid == UINT32_MAX))
		return rc;
	return fchownat(fd, "", uid, gid, AT_EMPTY_PATH) ? -errno : 0;
}

static int set_size(struct vmm_fs *fs, const struct fs_inode *inode, int fd,
		    const struct fuse_setattr_in *in, const struct fs_handle *h)
{
	int own, rc;

	if (!S_ISREG(inode->id.type))
		return S_ISDIR(inode->id.type) ? -EISDIR : -EINVAL;
	if (in->size > INT64_MAX)
		return -EFBIG;
	own = h ? -1 : fs_reopen(fs, fd, O_WRONLY);
	if (!h && own < 0)
		return own;
	rc = ftruncate(h ? h->fd : own, (off_t)in->size) ? -errno : 0;
	if (!rc && in->valid & FATTR_KILL_SUIDGID)
		fs_kill_suid(fs, h ? h->fd : own);
	if (own >= 0)
		close(own);
	return rc;
}

static int set_times(const struct fs_inode *inode, int fd, const struct fuse_setattr_in *in)
{
	struct timespec ts[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_nsec = UTIME_OMIT } };
	char path[FS_PATH];
	int rc;

	if (in->valid & FATTR_ATIME_NOW)
		ts[0].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_ATIME)
		ts[0] = (struct timespec){ (time_t)in->atime, in->atimensec };
	if (in->valid & FATTR_MTIME_NOW)
		ts[1].tv_nsec = UTIME_NOW;
	else if (in->valid & FATTR_MTIME)
		ts[1] = (struct timespec){ (time_t)in->mtime, in->mtimensec };
	rc = utimensat(fd, "", ts, AT_EMPTY_PATH) ? -errno : 0;
	/* Before Linux 5.8. */
	if (rc == -EINVAL && !S_ISLNK(inode->id.type))
		rc = utimensat(AT_FDCWD, fs_path(path, fd), ts, 0) ? -errno : 0;
	return rc;
}

static int set_all(struct vmm_fs *fs, struct fs_inode *inode, int fd,
		   const struct fuse_setattr_in *in, const struct fs_handle *h)
{
	int rc = 0;

	if (in->valid & FATTR_MODE)
		rc = set_mode(fs, inode, fd, in->mode);
	if (!rc && in->valid & (FATTR_UID | FATTR_GID))
		rc = set_owner(fs, fd, in);
	if (!rc && in->valid & FATTR_SIZE)
		rc = set_size(fs, inode, fd, in, h);
	if (!rc && in->valid & (FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW))
		rc = set_times(inode, fd, in);
	return rc;
}

FS_HANDLER(setattr)
{
	struct fuse_setattr_in in;
	struct fs_handle *h = NULL;
	struct fs_inode *inode;
	struct statx stx;
	int fd, rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	inode = fs_inode_get(fs, r->in.nodeid);
	if (!inode)
		return -ENOENT;
	if (in.valid & FATTR_FH) {
		h = fs_handle_get(fs, in.fh, false);
		if (!h || h->inode != inode) {
			rc = -EBADF;
			goto out;
		}
	}
	fd = fs_inode_fd(fs, inode);
	rc = fd < 0 ? fd : set_all(fs, inode, fd, &in, h);
	if (!rc)
		rc = fs_stat_fd(fd, &stx);
	if (!rc)
		rc = put_attr(fs, r, inode, &stx);
out:
	if (h)
		fs_handle_put(fs, h);
	fs_inode_put(fs, inode);
	return rc;
}

/* ---- the rest ---- */

FS_HANDLER(readlink)
{
	struct fs_inode *inode = fs_inode_get(fs, r->in.nodeid);
	char target[4096];
	ssize_t n;
	int fd, rc;

	if (!inode)
		return -ENOENT;
	fd = fs_inode_fd(fs, inode);
	rc = fd;
	if (fd >= 0) {
		n = S_ISLNK(inode->id.type) ? readlinkat(fd, "", target, sizeof(target)) : -1;
		rc = n < 0 ? (S_ISLNK(inode->id.type) ? -errno : -EINVAL)
			   : fs_put(r, target, (uint32_t)n);
	}
	fs_inode_put(fs, inode);
	return rc;
}

FS_HANDLER(statfs)
{
	struct fs_inode *inode = fs_inode_get(fs, r->in.nodeid);
	struct fuse_statfs_out out = { 0 };
	struct statfs st;
	int rc;

	if (!inode)
		return -ENOENT;
	rc = inode->hidden ? fs->root->fd : fs_inode_fd(fs, inode);
	if (rc >= 0)
		rc = fstatfs(rc, &st) ? -errno : 0;
	fs_inode_put(fs, inode);
	if (rc)
		return rc;
	out.st.blocks = st.f_blocks;
	out.st.bfree = st.f_bfree;
	out.st.bavail = st.f_bavail;
	out.st.files = st.f_files;
	out.st.ffree = st.f_ffree;
	out.st.bsize = (uint32_t)st.f_bsize;
	out.st.namelen = st.f_namelen < FS_NAME ? (uint32_t)st.f_namelen : FS_NAME - 1;
	out.st.frsize = (uint32_t)st.f_frsize;
	return fs_put(r, &out, sizeof(out));
}
