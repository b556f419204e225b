/* FUSE: names go, or become others. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#define RENAME_EXCHANGE 2
#endif

/* The inode that a name stands for, if the guest knows it; counts a user. */
static struct fs_inode *known(struct vmm_fs *fs, int dirfd, const char *name)
{
	struct fs_inode *inode;
	struct statx stx;
	struct fs_id id;

	if (fs_stat_at(dirfd, name, &stx))
		return NULL;
	fs_id_of(&stx, &id);
	pthread_mutex_lock(&fs->lock);
	inode = fs_inode_by_id(fs, &id);
	if (inode)
		inode->users++;
	pthread_mutex_unlock(&fs->lock);
	return inode;
}

/* Before a name goes: what it stood for stays within reach of a guest that still uses it. There
 * is a limit to how much is kept for it. */
static bool pin(struct vmm_fs *fs, struct fs_inode *inode)
{
	bool kept;

	if (!inode || inode->hidden || inode->pinned || fs_inode_fd(fs, inode) < 0)
		return false;
	pthread_mutex_lock(&fs->lock);
	kept = inode->opens || fs->nr_fds < fs->config.fds_max / 2;
	if (kept)
		inode->pinned = true;
	pthread_mutex_unlock(&fs->lock);
	return kept;
}

static void unpin(struct vmm_fs *fs, struct fs_inode *inode)
{
	pthread_mutex_lock(&fs->lock);
	inode->pinned = false;
	pthread_mutex_unlock(&fs->lock);
}

static int remove_name(struct vmm_fs *fs, struct fs_request *r, int flags)
{
	struct fs_inode *parent, *victim;
	char name[FS_NAME];
	bool pinned;
	int dirfd, rc = fs_take_name(r, name);

	if (rc)
		return rc;
	parent = fs_inode_get(fs, r->in.nodeid);
	if (!parent)
		return -ENOENT;
	dirfd = fs_inode_fd(fs, parent);
	if (dirfd < 0) {
		fs_inode_put(fs, parent);
		return dirfd;
	}
	victim = known(fs, dirfd, name);
	pinned = pin(fs, victim);
	rc = unlinkat(dirfd, name, flags) ? -errno : 0;
	if (rc && pinned)
		unpin(fs, victim);
	if (victim)
		fs_inode_put(fs, victim);
	fs_inode_put(fs, parent);
	return rc;
}

FS_HANDLER(unlink)
{
	return remove_name(fs, r, 0);
}

FS_HANDLER(rmdir)
{
	return remove_name(fs, r, AT_REMOVEDIR);
}

static void renamed(struct vmm_fs *fs, struct fs_inode *inode, struct fs_inode *parent,
		    const char *name)
{
	if (!inode)
		return;
	pthread_mutex_lock(&fs->lock);
	fs_inode_name(fs, inode, parent, name);
	pthread_mutex_unlock(&fs->lock);
	fs_inode_put(fs, inode);
}

static int rename_at(struct vmm_fs *fs, struct fs_inode *from, const char *name,
		     struct fs_inode *to, const char *new_name, uint32_t flags)
{
	const int fromfd = fs_inode_fd(fs, from), tofd = fs_inode_fd(fs, to);
	struct fs_inode *moved, *other;
	bool pinned = false;
	int rc;

	if (fromfd < 0 || tofd < 0)
		return fromfd < 0 ? fromfd : tofd;
	moved = known(fs, fromfd, name);
	other = known(fs, tofd, new_name);
	if (!flags && other != moved)
		pinned = pin(fs, other);
	rc = renameat2(fromfd, name, tofd, new_name, flags) ? -errno : 0;
	if (rc) {
		if (pinned)
			unpin(fs, other);
		if (moved)
			fs_inode_put(fs, moved);
		if (other)
			fs_inode_put(fs, other);
		return rc;
	}
	if (flags & RENAME_EXCHANGE)
		renamed(fs, other, from, name);
	else if (other)
		fs_inode_put(fs, other);
	renamed(fs, moved, to, new_name);
	return 0;
}

static int do_rename(struct vmm_fs *fs, struct fs_request *r, uint64_t newdir, uint32_t flags)
{
	struct fs_inode *from, *to;
	char name[FS_NAME], new_name[FS_NAME];
	int rc = fs_take_name(r, name);

	if (!rc)
		rc = fs_take_name(r, new_name);
	if (rc)
		return rc;
	if (flags & ~(uint32_t)(RENAME_NOREPLACE | RENAME_EXCHANGE))
		return -EINVAL;
	from = fs_inode_get(fs, r->in.nodeid);
	to = fs_inode_get(fs, newdir);
	rc = from && to ? rename_at(fs, from, name, to, new_name, flags) : -ENOENT;
	if (from)
		fs_inode_put(fs, from);
	if (to)
		fs_inode_put(fs, to);
	return rc;
}

FS_HANDLER(rename)
{
	struct fuse_rename_in in;

	return fs_take(r, &in, sizeof(in)) ? do_rename(fs, r, in.newdir, 0) : -EINVAL;
}

FS_HANDLER(rename2)
{
	struct fuse_rename2_in in;

	return fs_take(r, &in, sizeof(in)) ? do_rename(fs, r, in.newdir, in.flags) : -EINVAL;
}
