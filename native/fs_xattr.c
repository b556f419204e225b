/* FUSE: extended attributes. A guest writes those of users and reads what programs carry; what
 * gives rights on the host (security, trusted, ACLs) it does not set. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

static bool begins(const char *name, const char *with)
{
	return !strncmp(name, with, strlen(with)) && name[strlen(with)];
}

static bool may_read(const char *name)
{
	return begins(name, "user.") || !strcmp(name, "security.capability");
}

/* The inode and, in path, what system calls know it by. */
static int find(struct vmm_fs *fs, struct fs_request *r, struct fs_inode **inode,
		char path[FS_PATH])
{
	int fd;

	*inode = fs_inode_get(fs, r->in.nodeid);
	if (!*inode)
		return -ENOENT;
	fd = fs_inode_fd(fs, *inode);
	if (fd >= 0) {
		fs_path(path, fd);
		return 0;
	}
	fs_inode_put(fs, *inode);
	return fd == -EACCES && (*inode)->hidden ? -EOPNOTSUPP : fd;
}

FS_HANDLER(getxattr)
{
	struct fuse_getxattr_in in;
	struct fuse_getxattr_out size = { 0 };
	struct fs_inode *inode;
	char name[FS_NAME], path[FS_PATH];
	void *value = NULL;
	ssize_t n;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_string(r, name, sizeof(name));
	if (rc)
		return rc;
	if (!may_read(name))
		return -EOPNOTSUPP;
	if (in.size) {
		in.size = in.size < XATTR_SIZE_MAX ? in.size : XATTR_SIZE_MAX;
		value = malloc(in.size);
		if (!value)
			return -ENOMEM;
	}
	rc = find(fs, r, &inode, path);
	if (!rc) {
		n = getxattr(path, name, value, in.size);
		size.size = (uint32_t)n;
		rc = n < 0 ? -errno
			   : fs_put(r, in.size ? value : &size,
				    in.size ? (uint32_t)n : sizeof(size));
		fs_inode_put(fs, inode);
	}
	free(value);
	return rc;
}

/* Keeps the names a guest may read; the new length. */
static uint32_t sift(char *names, uint32_t len)
{
	uint32_t kept = 0;

	for (uint32_t at = 0; at < len;) {
		const uint32_t n = (uint32_t)strlen(names + at) + 1;

		if (may_read(names + at)) {
			memmove(names + kept, names + at, n);
			kept += n;
		}
		at += n;
	}
	return kept;
}

FS_HANDLER(listxattr)
{
	struct fuse_getxattr_in in;
	struct fuse_getxattr_out size = { 0 };
	struct fs_inode *inode;
	char path[FS_PATH], *names;
	ssize_t n;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	names = malloc(XATTR_LIST_MAX + 1);
	if (!names)
		return -ENOMEM;
	rc = find(fs, r, &inode, path);
	if (!rc) {
		n = listxattr(path, names, XATTR_LIST_MAX);
		rc = n < 0 ? -errno : 0;
		if (!rc) {
			names[n] = 0;
			size.size = sift(names, (uint32_t)n);
			if (!in.size)
				rc = fs_put(r, &size, sizeof(size));
			else
				rc = size.size > in.size ? -ERANGE : fs_put(r, names, size.size);
		}
		fs_inode_put(fs, inode);
	}
	free(names);
	return rc;
}

FS_HANDLER(setxattr)
{
	struct { /* FUSE_COMPAT_SETXATTR_IN_SIZE bytes */
		uint32_t size, flags;
	} in;
	struct fs_inode *inode;
	char name[FS_NAME], path[FS_PATH];
	void *value;
	int rc;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = fs_take_string(r, name, sizeof(name));
	if (rc)
		return rc;
	if (!begins(name, "user."))
		return -EOPNOTSUPP;
	if (in.size > fs_left(r))
		return -EINVAL;
	if (in.size > XATTR_SIZE_MAX)
		return -E2BIG;
	value = malloc(in.size + 1);
	if (!value)
		return -ENOMEM;
	fs_take(r, value, in.size);
	rc = find(fs, r, &inode, path);
	if (!rc) {
		rc = setxattr(path, name, value, in.size, (int)in.flags) ? -errno : 0;
		fs_inode_put(fs, inode);
	}
	free(value);
	return rc;
}

FS_HANDLER(removexattr)
{
	struct fs_inode *inode;
	char name[FS_NAME], path[FS_PATH];
	int rc = fs_take_string(r, name, sizeof(name));

	if (rc)
		return rc;
	if (!begins(name, "user."))
		return -EOPNOTSUPP;
	rc = find(fs, r, &inode, path);
	if (rc)
		return rc;
	rc = removexattr(path, name) ? -errno : 0;
	fs_inode_put(fs, inode);
	return rc;
}
