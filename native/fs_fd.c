/* Descriptors for the files a guest knows. Every step is one name in one directory, never
 * followed; and what is found counts only if it is what the guest was told of. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* How many are closed when the host has no more. */
#define SPARE 64

void fs_id_of(const struct statx *stx, struct fs_id *id)
{
	id->dev = (uint64_t)stx->stx_dev_major << 32 | stx->stx_dev_minor;
	id->ino = stx->stx_ino;
	id->mount = stx->stx_mask & STATX_MNT_ID ? stx->stx_mnt_id : 0;
	id->born_s = stx->stx_mask & STATX_BTIME ? stx->stx_btime.tv_sec : 0;
	id->born_ns = stx->stx_mask & STATX_BTIME ? stx->stx_btime.tv_nsec : 0;
	id->type = stx->stx_mode & S_IFMT;
}

bool fs_id_same(const struct fs_id *a, const struct fs_id *b)
{
	return a->ino == b->ino && a->dev == b->dev && a->mount == b->mount &&
	       a->born_s == b->born_s && a->born_ns == b->born_ns && a->type == b->type;
}

int fs_stat_at(int dirfd, const char *name, struct statx *stx)
{
	return statx(dirfd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, FS_STATX, stx) ? -errno : 0;
}

int fs_stat_fd(int fd, struct statx *stx)
{
	return statx(fd, "", AT_EMPTY_PATH, FS_STATX, stx) ? -errno : 0;
}

/* ---- which stay open ---- */

void fs_inode_drop_fd(struct vmm_fs *fs, struct fs_inode *inode)
{
	if (inode->fd < 0 || inode == fs->root)
		return;
	close(inode->fd);
	inode->fd = -1;
	fs->nr_fds--;
	TAILQ_REMOVE(&fs->lru, inode, lru);
}

static bool can_close(const struct fs_inode *inode)
{
	return !inode->users && !inode->opens && !inode->pinned;
}

/* With the lock held: closes up to `nr` of those used least; how many there were. */
static uint32_t close_some(struct vmm_fs *fs, uint32_t nr)
{
	struct fs_inode *inode = TAILQ_FIRST(&fs->lru), *next;
	uint32_t looks = 4 * nr, closed = 0;

	for (; inode && closed < nr && looks; inode = next, looks--) {
		next = TAILQ_NEXT(inode, lru);
		if (can_close(inode)) {
			fs_inode_drop_fd(fs, inode);
			closed++;
		} else {
			/* Not looked at again soon. */
			TAILQ_REMOVE(&fs->lru, inode, lru);
			TAILQ_INSERT_TAIL(&fs->lru, inode, lru);
		}
	}
	return closed;
}

bool fs_spare_fds(struct vmm_fs *fs)
{
	bool some;

	pthread_mutex_lock(&fs->lock);
	some = close_some(fs, SPARE);
	pthread_mutex_unlock(&fs->lock);
	return some;
}

void fs_inode_adopt(struct vmm_fs *fs, struct fs_inode *inode, int fd)
{
	pthread_mutex_lock(&fs->lock);
	if (inode->fd < 0) {
		inode->fd = fd;
		fd = -1;
		TAILQ_INSERT_TAIL(&fs->lru, inode, lru);
		if (++fs->nr_fds > fs->config.fds_max / 2)
			close_some(fs, 2);
	}
	pthread_mutex_unlock(&fs->lock);
	if (fd >= 0)
		close(fd);
}

/* ---- opening ---- */

int fs_open_at(struct vmm_fs *fs, int dirfd, const char *name, int flags)
{
	int fd;

	do {
		fd = openat(dirfd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC | flags);
	} while (fd < 0 && (errno == EMFILE || errno == ENFILE) && fs_spare_fds(fs));
	return fd >= 0 ? fd : errno == EMFILE ? -ENFILE : -errno;
}

int fs_reopen(struct vmm_fs *fs, int fd, int flags)
{
	char name[12];
	int got;

	snprintf(name, sizeof(name), "%d", fd);
	do {
		got = openat(fs->config.proc_fd, name, flags | O_CLOEXEC | O_NOCTTY);
	} while (got < 0 && (errno == EMFILE || errno == ENFILE) && fs_spare_fds(fs));
	return got >= 0 ? got : errno == EMFILE ? -ENFILE : -errno;
}

/* One step on the way down: the topmost inode on the way to `inode` that has no descriptor gets
 * one. 0, or -errno; *fd is that of `inode` once it has one. */
static int step(struct vmm_fs *fs, struct fs_inode *inode, int *fd)
{
	struct fs_inode *at = inode, *parent;
	struct statx stx;
	struct fs_id id;
	char name[FS_NAME];
	int depth = 0, rc;

	pthread_mutex_lock(&fs->lock);
	if (inode->fd >= 0) {
		*fd = inode->fd;
		if (inode != fs->root) {
			TAILQ_REMOVE(&fs->lru, inode, lru);
			TAILQ_INSERT_TAIL(&fs->lru, inode, lru);
		}
		pthread_mutex_unlock(&fs->lock);
		return 0;
	}
	while ((parent = at->parent) && parent->fd < 0 && depth++ < FS_DEPTH)
		at = parent;
	if (!parent || parent->fd < 0) {
		pthread_mutex_unlock(&fs->lock);
		return -ESTALE;
	}
	at->users++;
	parent->users++;
	strcpy(name, at->name);
	pthread_mutex_unlock(&fs->lock);

	rc = fs_open_at(fs, parent->fd, name, 0);
	if (rc >= 0) {
		const int got = rc;

		rc = fs_stat_fd(got, &stx);
		if (!rc) {
			fs_id_of(&stx, &id);
			rc = fs_id_same(&id, &at->id) ? 0 : -ESTALE;
		}
		if (!rc)
			fs_inode_adopt(fs, at, got);
		else
			close(got);
	}
	fs_inode_put(fs, at);
	fs_inode_put(fs, parent);
	return rc == -ENOENT || rc == -ENOTDIR ? -ESTALE : rc;
}

int fs_inode_fd(struct vmm_fs *fs, struct fs_inode *inode)
{
	int fd = -1, rc = 0;

	if (inode->hidden)
		return -EACCES;
	for (int i = 0; i < 2 * FS_DEPTH && !rc && fd < 0; i++)
		rc = step(fs, inode, &fd);
	return rc ? rc : fd >= 0 ? fd : -ELOOP;
}

/* Attributes by name: for files that are only looked at no descriptor is worth its while. */
static int stat_by_name(struct vmm_fs *fs, struct fs_inode *inode, struct fs_inode *parent,
			const char *name, struct statx *stx)
{
	struct fs_id id;
	int rc = fs_inode_fd(fs, parent);

	if (rc >= 0)
		rc = fs_stat_at(rc, name, stx);
	if (rc)
		return rc == -ENOENT || rc == -ENOTDIR ? -ESTALE : rc;
	fs_id_of(stx, &id);
	return fs_id_same(&id, &inode->id) ? 0 : -ESTALE;
}

int fs_inode_stat(struct vmm_fs *fs, struct fs_inode *inode, struct statx *stx)
{
	struct fs_inode *parent;
	char name[FS_NAME];
	int fd, rc;

	pthread_mutex_lock(&fs->lock);
	fd = inode->fd;
	parent = inode->parent;
	if (fd < 0 && parent) {
		parent->users++;
		strcpy(name, inode->name);
	}
	pthread_mutex_unlock(&fs->lock);
	if (fd >= 0)
		return fs_stat_fd(fd, stx);
	if (!parent)
		return -ESTALE;
	rc = stat_by_name(fs, inode, parent, name, stx);
	fs_inode_put(fs, parent);
	return rc;
}

/* ---- threads ---- */

static __thread int alone; /* 1: yes, -1: the host does not allow it */

bool fs_thread_alone(void)
{
	return alone > 0;
}

/* New files get the very mode the guest asked for, and /proc/self/fd/N is found as "N". */
void fs_thread_enter(struct vmm_fs *fs)
{
	if (alone)
		return;
	alone = unshare(CLONE_FS) ? -1 : 1;
	if (alone < 0)
		return;
	umask(0);
	if (fchdir(fs->config.proc_fd))
		alone = -1;
}

const char *fs_path(char path[FS_PATH], int fd)
{
	snprintf(path, FS_PATH, alone > 0 ? "%d" : "/proc/self/fd/%d", fd);
	return path;
}
