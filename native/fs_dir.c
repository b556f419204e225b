/* FUSE: directories are listed. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Entries read from the host at a time, kept while a directory is open. */
#define AHEAD 8192

struct entry { /* of getdents64(2) */
	uint64_t ino;
	uint64_t offset; /* of the next one */
	uint16_t len;
	uint8_t type;
	char name[];
};

FS_HANDLER(opendir)
{
	struct fs_inode *inode = fs_inode_get(fs, r->in.nodeid);
	struct fuse_open_out out = { 0 };
	int fd = -1, rc;

	if (!inode)
		return -ENOENT;
	rc = S_ISDIR(inode->id.type) ? 0 : -ENOTDIR;
	if (!rc && !inode->hidden) {
		rc = fs_inode_fd(fs, inode);
		if (rc >= 0)
			rc = fs_reopen(fs, rc, O_RDONLY | O_DIRECTORY);
		fd = rc;
	}
	if (rc >= 0)
		rc = fs_handle_add(fs, inode, fd, O_DIRECTORY, &out.fh);
	if (!rc && fs->config.cache == VMM_FS_ALWAYS)
		out.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR;
	if (!rc) {
		rc = fs_put(r, &out, sizeof(out));
		if (rc)
			fs_handle_close(fs, out.fh, true);
	}
	fs_inode_put(fs, inode);
	return rc;
}

FS_HANDLER(releasedir)
{
	struct fuse_release_in in;

	return fs_take(r, &in, sizeof(in)) ? fs_handle_close(fs, in.fh, true) : -EINVAL;
}

/* The entry at h->at, or NULL at the end; *rc is 0 or -errno. */
static const struct entry *next_entry(struct fs_handle *h, int *rc)
{
	const struct entry *e;
	long n;

	*rc = 0;
	if (h->at >= h->end) {
		if (!h->entries)
			h->entries = malloc(AHEAD);
		n = h->entries ? syscall(SYS_getdents64, h->fd, h->entries, AHEAD) : -1;
		h->at = 0;
		h->end = n > 0 ? (uint32_t)n : 0;
		if (n <= 0) {
			*rc = !h->entries ? -ENOMEM : n < 0 && errno != ENOENT ? -errno : 0;
			return NULL;
		}
	}
	e = (const struct entry *)(h->entries + h->at);
	return e;
}

static void take(struct fs_handle *h, const struct entry *e)
{
	h->offset = e->offset;
	h->at += e->len;
}

/* Goes on at an offset that was an entry's. */
static int seek_to(struct fs_handle *h, uint64_t offset)
{
	if (offset == h->offset)
		return 0;
	h->at = h->end = 0;
	if (lseek(h->fd, (off_t)offset, SEEK_SET) < 0)
		return -errno;
	h->offset = offset;
	return 0;
}

static bool dots(const char *name)
{
	return !strcmp(name, ".") || !strcmp(name, "..");
}

/* One entry into the answer; -EINVAL when there is no more room for it. */
static int put_entry(struct vmm_fs *fs, struct fs_request *r, struct fs_handle *h,
		     const struct entry *e, bool plus)
{
	const uint32_t len = (uint32_t)strlen(e->name);
	uint8_t out[sizeof(struct fuse_direntplus) + FS_NAME + 8] = { 0 };
	struct fuse_direntplus *full = (struct fuse_direntplus *)out;
	struct fuse_dirent *d = plus ? &full->dirent : (struct fuse_dirent *)out;
	const uint32_t head = (uint32_t)((uint8_t *)d - out) + FUSE_NAME_OFFSET;
	const uint32_t size = FUSE_DIRENT_ALIGN(head + len);
	struct fs_inode *inode = NULL;
	struct statx stx;

	if (r->room - r->out_len < size)
		return -EINVAL;
	if (plus && !dots(e->name) && fs_lookup_name(fs, h->inode, e->name, &inode, &stx))
		inode = NULL; /* gone meanwhile, or too many: the guest will look it up */
	if (plus)
		fs_entry_of(fs, inode, &stx, &full->entry_out);
	d->ino = inode ? full->entry_out.attr.ino : fs_ino_of(fs, h->inode->id.dev, e->ino);
	if (h->inode == fs->root && !strcmp(e->name, ".."))
		d->ino = fs->root->id.ino; /* what is above is nobody's business */
	d->off = e->offset;
	d->namelen = len;
	d->type = inode ? inode->id.type >> 12 : e->type;
	memcpy(d->name, e->name, len);
	fs_put(r, out, size);
	if (inode)
		fs_inode_put(fs, inode);
	return 0;
}

static int list(struct vmm_fs *fs, struct fs_request *r, struct fs_handle *h, uint64_t offset,
		bool plus)
{
	const struct entry *e;
	int rc = seek_to(h, offset);

	while (!rc && (e = next_entry(h, &rc))) {
		if (strlen(e->name) >= FS_NAME) {
			take(h, e); /* no name that Linux would take */
			continue;
		}
		if (put_entry(fs, r, h, e, plus))
			break;
		take(h, e);
	}
	return r->out_len ? 0 : rc;
}

static int read_dir(struct vmm_fs *fs, struct fs_request *r, bool plus)
{
	struct fuse_read_in in;
	struct fs_handle *h;
	int rc = 0;

	if (!fs_take(r, &in, sizeof(in)))
		return -EINVAL;
	h = fs_handle_get(fs, in.fh, true);
	if (!h)
		return -EBADF;
	if (h->inode->nodeid != r->in.nodeid)
		rc = -EBADF;
	if (in.size < r->room)
		r->room = in.size;
	if (h->fd >= 0 && !rc) {
		pthread_mutex_lock(&h->lock);
		rc = list(fs, r, h, in.offset, plus);
		pthread_mutex_unlock(&h->lock);
	}
	fs_handle_put(fs, h);
	return rc;
}

FS_HANDLER(readdir)
{
	return read_dir(fs, r, false);
}

FS_HANDLER(readdirplus)
{
	return read_dir(fs, r, true);
}
