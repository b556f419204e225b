/* FUSE: new files that are not opened: nodes, directories, symbolic and hard links. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* The answer for what was just made. */
static int made(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *parent, const char *name)
{
	struct fs_inode *inode;
	struct statx stx;
	const int rc = fs_lookup_name(fs, parent, name, &inode, &stx);

	return rc ? rc : fs_put_entry(fs, r, inode, &stx);
}

/* Where threads share a umask, what it took away is given back. */
static void unmask(struct vmm_fs *fs, int dirfd, const char *name, uint32_t mode)
{
	const uint32_t lost = mode & fs->config.umask & 0777;
	struct statx stx;
	char path[FS_PATH];
	int fd;

	if (fs_thread_alone() || !lost)
		return;
	fd = fs_open_at(fs, dirfd, name, 0);
	if (fd < 0)
		return;
	if (!fs_stat_fd(fd, &stx) && !S_ISLNK(stx.stx_mode))
		fchmodat(AT_FDCWD, fs_path(path, fd), (stx.stx_mode & 07777) | lost, 0);
	close(fd);
}

enum kind { NODE, DIRECTORY, SYMLINK };

static int make(struct vmm_fs *fs, struct fs_request *r, enum kind kind, const char *name,
		uint32_t mode, const char *target)
{
	struct fs_inode *parent = fs_inode_get(fs, r->in.nodeid);
	struct fs_ids ids;
	int dirfd, rc;

	if (!parent)
		return -ENOENT;
	dirfd = fs_inode_fd(fs, parent);
	rc = dirfd < 0 ? dirfd : fs_ids_as(fs, r, &ids);
	if (!rc) {
		switch (kind) {
		case NODE:
			rc = mknodat(dirfd, name, mode, 0);
			break;
		case DIRECTORY:
			rc = mkdirat(dirfd, name, mode & 07777);
			break;
		case SYMLINK:
			rc = symlinkat(target, dirfd, name);
			break;
		}
		rc = rc ? -errno : 0;
		fs_ids_back(&ids);
	}
	if (!rc && kind != SYMLINK)
		unmask(fs, dirfd, name, mode);
	if (!rc)
		rc = made(fs, r, parent, name);
	fs_inode_put(fs, parent);
	return rc;
}

FS_HANDLER(mknod)
{
	struct fuse_mknod_in in;
	char name[FS_NAME];
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_name(r, name);
	if (rc)
		return rc;
	/* A device of the guest's would be one of the host's too. */
	if (!S_ISREG(in.mode) && !S_ISFIFO(in.mode) && !S_ISSOCK(in.mode))
		return -EPERM;
	return make(fs, r, NODE, name, in.mode & (S_IFMT | 07777), NULL);
}

FS_HANDLER(mkdir)
{
	struct fuse_mkdir_in in;
	char name[FS_NAME];
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_name(r, name);
	return rc ? rc : make(fs, r, DIRECTORY, name, in.mode, NULL);
}

FS_HANDLER(symlink)
{
	char name[FS_NAME], target[4097];
	int rc = fs_take_name(r, name);

	if (!rc)
		rc = fs_take_string(r, target, sizeof(target));
	return rc ? rc : make(fs, r, SYMLINK, name, 0, target);
}

FS_HANDLER(link)
{
	struct fuse_link_in in;
	struct fs_inode *parent, *inode;
	char name[FS_NAME], path[FS_PATH];
	int fd, dirfd, rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_name(r, name);
	if (rc)
		return rc;
	parent = fs_inode_get(fs, r->in.nodeid);
	inode = fs_inode_get(fs, in.oldnodeid);
	rc = -ENOENT;
	if (parent && inode) {
		fd = fs_inode_fd(fs, inode);
		dirfd = fs_inode_fd(fs, parent);
		rc = fd < 0 ? fd : dirfd < 0 ? dirfd : 0;
		/* The descriptor's own link is followed, and nothing after it. */
		if (!rc && linkat(AT_FDCWD, fs_path(path, fd), dirfd, name, AT_SYMLINK_FOLLOW))
			rc = -errno;
		if (!rc)
			rc = made(fs, r, parent, name);
	}
	if (parent)
		fs_inode_put(fs, parent);
	if (inode)
		fs_inode_put(fs, inode);
	return rc;
}
