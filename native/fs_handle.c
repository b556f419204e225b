/* What the guest has open. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

int fs_handle_add(struct vmm_fs *fs, struct fs_inode *inode, int fd, int flags, uint64_t *fh)
{
	struct fs_handle *h = calloc(1, sizeof(*h));
	int rc = h ? 0 : -ENOMEM;

	if (h) {
		pthread_mutex_init(&h->lock, NULL);
		h->inode = inode;
		h->fd = fd;
		h->dir = flags & O_DIRECTORY;
		h->append = flags & O_APPEND;
		h->sync = flags & (O_SYNC | O_DSYNC);
		pthread_mutex_lock(&fs->lock);
		h->fh = fs_slots_add(&fs->handles, h);
		if (h->fh) {
			inode->users++;
			inode->opens++;
		} else {
			rc = -errno;
		}
		pthread_mutex_unlock(&fs->lock);
	}
	if (!rc) {
		*fh = h->fh;
		return 0;
	}
	if (h)
		pthread_mutex_destroy(&h->lock);
	free(h);
	if (fd >= 0)
		close(fd);
	return rc;
}

struct fs_handle *fs_handle_get(struct vmm_fs *fs, uint64_t fh, bool dir)
{
	struct fs_handle *h;

	pthread_mutex_lock(&fs->lock);
	h = fs_slots_find(&fs->handles, fh);
	if (h && h->dir != dir)
		h = NULL;
	if (h)
		h->users++;
	pthread_mutex_unlock(&fs->lock);
	return h;
}

void fs_handle_put(struct vmm_fs *fs, struct fs_handle *h)
{
	bool last;

	pthread_mutex_lock(&fs->lock);
	last = --h->users == 0 && h->dead;
	if (last) {
		h->inode->opens--;
		fs_inode_unuse(fs, h->inode);
	}
	pthread_mutex_unlock(&fs->lock);
	if (!last)
		return;
	if (h->fd >= 0)
		close(h->fd);
	pthread_mutex_destroy(&h->lock);
	free(h->entries);
	free(h);
}

int fs_handle_close(struct vmm_fs *fs, uint64_t fh, bool dir)
{
	struct fs_handle *h;

	pthread_mutex_lock(&fs->lock);
	h = fs_slots_find(&fs->handles, fh);
	if (h && h->dir != dir)
		h = NULL;
	if (h) {
		fs_slots_remove(&fs->handles, fh);
		h->dead = true;
		h->users++;
	}
	pthread_mutex_unlock(&fs->lock);
	if (!h)
		return -EBADF;
	fs_handle_put(fs, h);
	return 0;
}

void fs_handles_drop(struct vmm_fs *fs)
{
	for (uint32_t i = 0; i < fs->handles.nr; i++) {
		struct fs_handle *h;
		uint64_t fh = 0;

		pthread_mutex_lock(&fs->lock);
		h = fs->handles.slots[i].what;
		if (h)
			fh = h->fh;
		pthread_mutex_unlock(&fs->lock);
		if (h)
			fs_handle_close(fs, fh, h->dir);
	}
}
