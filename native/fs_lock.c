/* FUSE: locks that the host and other guests see too. Each of the guest's owners has an open file
 * of its own on the host, with that file's locks (F_OFD_SETLK). Who waits for a lock waits in a
 * list, not on a thread. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <unistd.h>

#define MS 1000000ULL
/* How often those that wait try again: the host does not tell when a lock is free. */
#define RETRY_NS (50 * MS)
/* Linux's driver does not send on when a process that waits gets a signal: it shall not be stuck. */
#define PATIENCE_NS (10000 * MS)

/* ---- owners ---- */

static void free_owner(struct vmm_fs *fs, struct fs_owner **at)
{
	struct fs_owner *o = *at;

	*at = o->next;
	close(o->fd);
	free(o);
	__atomic_fetch_sub(&fs->nr_owners, 1, __ATOMIC_RELAXED);
}

void fs_locks_free(struct vmm_fs *fs, struct fs_inode *inode)
{
	while (inode->owners)
		free_owner(fs, &inode->owners);
}

static struct fs_owner **owner_at(struct fs_inode *inode, uint64_t owner)
{
	struct fs_owner **at = &inode->owners;

	while (*at && (*at)->owner != owner)
		at = &(*at)->next;
	return at;
}

/* With locks_lock held. */
static int make_owner(struct vmm_fs *fs, struct fs_inode *inode, uint64_t owner)
{
	struct fs_owner *o;
	int fd = fs_inode_fd(fs, inode);

	if (fs->nr_owners >= fs->config.fds_max / 8)
		return -ENOLCK;
	if (fd < 0)
		return fd;
	if (!S_ISREG(inode->id.type))
		return -EINVAL;
	o = calloc(1, sizeof(*o));
	if (!o)
		return -ENOMEM;
	o->owner = owner;
	o->fd = fs->config.read_only ? -EROFS : fs_reopen(fs, fd, O_RDWR);
	if (o->fd < 0)
		o->fd = fs_reopen(fs, fd, O_RDONLY);
	if (o->fd < 0) {
		fd = o->fd;
		free(o);
		return fd;
	}
	o->next = inode->owners;
	inode->owners = o;
	__atomic_fetch_add(&fs->nr_owners, 1, __ATOMIC_RELAXED);
	return 0;
}

void fs_locks_release(struct vmm_fs *fs, struct fs_inode *inode, uint64_t owner)
{
	struct fs_owner **at;
	bool had;

	pthread_mutex_lock(&fs->locks_lock);
	at = owner_at(inode, owner);
	had = *at;
	if (had)
		free_owner(fs, at);
	pthread_mutex_unlock(&fs->locks_lock);
	if (had)
		fs_locks_wake(fs);
}

/* ---- one lock ---- */

static int to_host(const struct fuse_file_lock *lk, struct flock *fl)
{
	if (lk->start > INT64_MAX || lk->end > INT64_MAX || lk->end < lk->start)
		return -EINVAL;
	if (lk->type != F_RDLCK && lk->type != F_WRLCK && lk->type != F_UNLCK)
		return -EINVAL;
	*fl = (struct flock){
		.l_type = (short)lk->type,
		.l_whence = SEEK_SET,
		.l_start = (off_t)lk->start,
		.l_len = lk->end == INT64_MAX ? 0 : (off_t)(lk->end - lk->start + 1),
	};
	return 0;
}

static int posix_lock(struct vmm_fs *fs, struct fs_inode *inode, const struct fuse_lk_in *in)
{
	const bool unlock = in->lk.type == F_UNLCK;
	struct fs_owner **at;
	struct flock fl;
	int rc = to_host(&in->lk, &fl);

	if (rc)
		return rc;
	pthread_mutex_lock(&fs->locks_lock);
	at = owner_at(inode, in->owner);
	if (!*at && !unlock) {
		rc = make_owner(fs, inode, in->owner);
		at = owner_at(inode, in->owner);
	}
	if (!rc && *at && unlock && !fl.l_start && !fl.l_len)
		free_owner(fs, at);
	else if (!rc && *at)
		rc = fcntl((*at)->fd, F_OFD_SETLK, &fl) ? -errno : 0;
	pthread_mutex_unlock(&fs->locks_lock);
	if (!rc && unlock)
		fs_locks_wake(fs);
	return rc;
}

static int flock_lock(struct vmm_fs *fs, const struct fs_handle *h, const struct fuse_lk_in *in)
{
	const int how = in->lk.type == F_RDLCK	 ? LOCK_SH
			: in->lk.type == F_WRLCK ? LOCK_EX
						 : LOCK_UN;

	if (flock(h->fd, how | LOCK_NB))
		return -errno;
	if (how == LOCK_UN)
		fs_locks_wake(fs);
	return 0;
}

static int lock(struct vmm_fs *fs, struct fs_request *r)
{
	struct fuse_lk_in in;
	struct fs_handle *h;
	int rc;

	if (!fs->config.host_locks)
		return -ENOSYS;
	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	rc = in.lk_flags & FUSE_LK_FLOCK ? flock_lock(fs, h, &in) : posix_lock(fs, h->inode, &in);
	fs_handle_put(fs, h);
	return rc == -EACCES ? -EAGAIN : rc;
}

FS_HANDLER(setlk)
{
	return lock(fs, r);
}

FS_HANDLER(getlk)
{
	struct fuse_lk_in in;
	struct fuse_lk_out out = { 0 };
	struct fs_owner **at;
	struct fs_handle *h;
	struct flock fl;
	int rc;

	if (!fs->config.host_locks)
		return -ENOSYS;
	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	rc = to_host(&in.lk, &fl);
	h = fs_handle_get(fs, in.fh, false);
	if (!h)
		return -EBADF;
	if (!rc) {
		pthread_mutex_lock(&fs->locks_lock);
		at = owner_at(h->inode, in.owner);
		/* One without locks of its own asks as the open file does, which has none either. */
		rc = fcntl(*at ? (*at)->fd : h->fd, F_OFD_GETLK, &fl) ? -errno : 0;
		pthread_mutex_unlock(&fs->locks_lock);
	}
	fs_handle_put(fs, h);
	if (rc)
		return rc;
	out.lk.type = (uint32_t)fl.l_type;
	out.lk.start = (uint64_t)fl.l_start;
	out.lk.end = fl.l_len ? (uint64_t)(fl.l_start + fl.l_len - 1) : INT64_MAX;
	out.lk.pid = fl.l_pid > 0 ? (uint32_t)fl.l_pid : 0;
	return fs_put(r, &out, sizeof(out));
}

/* ---- waiting ---- */

FS_HANDLER(setlkw)
{
	const int rc = lock(fs, r);
	const uint64_t now = vmm_now();
	bool stop;

	if (rc != -EAGAIN)
		return rc;
	if (!r->deadline)
		r->deadline = now + PATIENCE_NS;
	if (now >= r->deadline)
		return -EINTR;
	r->at = sizeof(struct fuse_in_header);
	pthread_mutex_lock(&fs->locks_lock);
	stop = r->queue->stopping;
	if (!stop) {
		r->next = fs->waiting;
		fs->waiting = r;
		if (!fs->retry.set)
			vmm_timer_set(&fs->retry, RETRY_NS);
	}
	pthread_mutex_unlock(&fs->locks_lock);
	return stop ? -EINTR : FS_PARKED;
}

void fs_locks_wake(struct vmm_fs *fs)
{
	struct fs_request *r, *next;

	if (!fs->config.host_locks)
		return;
	pthread_mutex_lock(&fs->locks_lock);
	r = fs->waiting;
	fs->waiting = NULL;
	pthread_mutex_unlock(&fs->locks_lock);
	for (; r; r = next) {
		next = r->next;
		fs_to_worker(fs, r);
	}
}

void fs_locks_expired(struct vmm_timer *timer)
{
	fs_locks_wake((struct vmm_fs *)((uint8_t *)timer - offsetof(struct vmm_fs, retry)));
}

void fs_locks_abandon(struct vmm_fs *fs, struct fs_queue *q)
{
	struct fs_request **at = &fs->waiting, *r;

	pthread_mutex_lock(&fs->locks_lock);
	q->stopping = true;
	while ((r = *at)) {
		if (r->queue == q) {
			*at = r->next;
			q->busy--;
		} else {
			at = &r->next;
		}
	}
	pthread_mutex_unlock(&fs->locks_lock);
}

FS_HANDLER(interrupt)
{
	struct fuse_interrupt_in in;
	struct fs_request **at = &fs->waiting, *found;

	if (!fs_take(r, &in, sizeof(in)))
		return FS_SILENT;
	pthread_mutex_lock(&fs->locks_lock);
	while (*at && (*at)->in.unique != in.unique)
		at = &(*at)->next;
	found = *at;
	if (found)
		*at = found->next;
	pthread_mutex_unlock(&fs->locks_lock);
	if (found)
		fs_finish(found, -EINTR);
	return FS_SILENT;
}
