/* The files a guest knows: found by their number, and by what makes them the same file. */
#define _GNU_SOURCE
#include "fs_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#define FIRST_BUCKETS 256

/* ---- by identity ---- */

static uint32_t bucket_of(const struct vmm_fs *fs, const struct fs_id *id)
{
	uint64_t h = (id->ino ^ id->dev << 32 ^ id->mount << 20) * 0x9e3779b97f4a7c15ULL;

	return (uint32_t)(h >> 32) & (fs->nr_buckets - 1);
}

struct fs_inode *fs_inode_by_id(struct vmm_fs *fs, const struct fs_id *id)
{
	struct fs_inode *inode = fs->buckets[bucket_of(fs, id)];

	while (inode && !fs_id_same(&inode->id, id))
		inode = inode->next;
	return inode;
}

static void link_bucket(struct vmm_fs *fs, struct fs_inode *inode)
{
	struct fs_inode **bucket = &fs->buckets[bucket_of(fs, &inode->id)];

	inode->next = *bucket;
	*bucket = inode;
}

static void unlink_bucket(struct vmm_fs *fs, struct fs_inode *inode)
{
	struct fs_inode **at = &fs->buckets[bucket_of(fs, &inode->id)];

	while (*at != inode)
		at = &(*at)->next;
	*at = inode->next;
}

/* A longer table once chains get long; without memory they stay long. */
static void spread(struct vmm_fs *fs)
{
	const uint32_t nr = fs->nr_buckets;
	struct fs_inode **old = fs->buckets, **wide;

	if (fs->inodes.used < nr || nr > UINT32_MAX / 4)
		return;
	wide = calloc((size_t)nr * 2, sizeof(*wide));
	if (!wide)
		return;
	fs->buckets = wide;
	fs->nr_buckets = nr * 2;
	for (uint32_t i = 0; i < nr; i++) {
		for (struct fs_inode *inode = old[i], *next; inode; inode = next) {
			next = inode->next;
			link_bucket(fs, inode);
		}
	}
	free(old);
}

/* ---- life ---- */

static bool wanted(const struct vmm_fs *fs, const struct fs_inode *inode)
{
	return inode->lookups || inode->users || inode->children || inode == fs->root;
}

/* Frees what nobody wants, and then perhaps its parent. */
static void release(struct vmm_fs *fs, struct fs_inode *inode)
{
	while (inode && !wanted(fs, inode)) {
		struct fs_inode *parent = inode->parent;

		unlink_bucket(fs, inode);
		fs_slots_remove(&fs->inodes, inode->nodeid);
		fs_inode_drop_fd(fs, inode);
		fs_locks_free(fs, inode);
		free(inode->name);
		free(inode);
		if (parent)
			parent->children--;
		inode = parent;
	}
}

struct fs_inode *fs_inode_get(struct vmm_fs *fs, uint64_t nodeid)
{
	struct fs_inode *inode;

	pthread_mutex_lock(&fs->lock);
	inode = fs_slots_find(&fs->inodes, nodeid);
	if (inode && !inode->lookups && inode != fs->root)
		inode = NULL; /* it was forgotten */
	if (inode)
		inode->users++;
	pthread_mutex_unlock(&fs->lock);
	return inode;
}

void fs_inode_unuse(struct vmm_fs *fs, struct fs_inode *inode)
{
	inode->users--;
	release(fs, inode);
}

void fs_inode_put(struct vmm_fs *fs, struct fs_inode *inode)
{
	pthread_mutex_lock(&fs->lock);
	fs_inode_unuse(fs, inode);
	pthread_mutex_unlock(&fs->lock);
}

void fs_inode_forget(struct vmm_fs *fs, uint64_t nodeid, uint64_t lookups)
{
	struct fs_inode *inode;

	pthread_mutex_lock(&fs->lock);
	inode = fs_slots_find(&fs->inodes, nodeid);
	if (inode && inode != fs->root) {
		inode->lookups -= lookups < inode->lookups ? lookups : inode->lookups;
		release(fs, inode);
	}
	pthread_mutex_unlock(&fs->lock);
}

/* ---- names ---- */

/* Whether a directory would come to be below itself, as where the host moved things about. */
static bool loops(const struct fs_inode *inode, const struct fs_inode *parent)
{
	for (int depth = 0; parent; parent = parent->parent)
		if (parent == inode || ++depth > FS_DEPTH)
			return true;
	return false;
}

int fs_inode_name(struct vmm_fs *fs, struct fs_inode *inode, struct fs_inode *parent,
		  const char *name)
{
	struct fs_inode *old = inode->parent;
	char *copy;

	if (inode == fs->root || (old && old == parent && !strcmp(inode->name, name)))
		return 0;
	if (parent && (old != parent && S_ISDIR(inode->id.type) && loops(inode, parent)))
		return 0;
	copy = parent ? strdup(name) : NULL;
	if (parent && !copy)
		return -ENOMEM;
	free(inode->name);
	inode->name = copy;
	inode->parent = parent;
	if (parent) {
		parent->children++;
		inode->pinned = false;
	}
	if (old) {
		old->children--;
		release(fs, old);
	}
	return 0;
}

/* ---- finding ---- */

/* What must not be shared: the kernel's own, where a name is a way to memory, descriptors and
 * roots of processes, this one's too. Bits of f_type as in magic(7). */
int vmm_fs_pseudo(int fd)
{
	static const uint32_t kinds[] = {
		0x9fa0,	    /* proc */
		0x62656572, /* sysfs */
		0x1cd1,	    /* devpts */
		0x27e0eb,   /* cgroup */
		0x63677270, /* cgroup2 */
		0x64626720, /* debugfs */
		0x74726163, /* tracefs */
		0x73636673, /* securityfs */
		0xf97cff8c, /* selinux */
		0x43415d53, /* smack */
		0x5a3c69f0, /* apparmor */
		0x6165676c, /* pstore */
		0xde5e81e4, /* efivarfs */
		0xcafe4a11, /* bpf */
		0x62656570, /* configfs */
		0x42494e4d, /* binfmt_misc */
		0x19800202, /* mqueue */
		0x65735543, /* fusectl */
		0x6e736673, /* nsfs */
		0x67596969, /* rpc_pipefs */
		0xabba1974, /* xenfs */
		0x6c6f6f70, /* binder */
		0x7655821,  /* resctrl */
		0x0187,	    /* autofs */
		0x6e667364, /* nfsd */
		0x9fa1,	    /* openprom */
		0x9fa2,	    /* usbfs */
		0x0a647361, /* functionfs */
	};
	struct statfs st;

	if (fstatfs(fd, &st))
		return -errno;
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
		if ((uint32_t)st.f_type == kinds[i])
			return 1;
	return 0;
}

/* Whether what a name led to on another file system is such a one: 0, 1 or -errno. */
static int look_behind(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
		       const struct fs_id *id)
{
	const int dirfd = fs_inode_fd(fs, parent);
	struct statx again;
	struct fs_id now;
	int fd, rc;

	if (dirfd < 0)
		return dirfd;
	fd = fs_open_at(fs, dirfd, name, 0);
	if (fd < 0)
		return fd;
	rc = fs_stat_fd(fd, &again);
	if (!rc) {
		fs_id_of(&again, &now);
		rc = fs_id_same(&now, id) ? vmm_fs_pseudo(fd) : -ESTALE;
	}
	close(fd);
	return rc;
}

static struct fs_inode *make(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
			     const struct fs_id *id)
{
	struct fs_inode *inode = calloc(1, sizeof(*inode));

	if (!inode)
		return NULL;
	inode->id = *id;
	inode->fd = -1;
	inode->pinned = !parent;
	inode->name = parent ? strdup(name) : NULL;
	if (!parent || inode->name)
		inode->nodeid = fs_slots_add(&fs->inodes, inode);
	else
		errno = ENOMEM;
	if (!inode->nodeid) {
		free(inode->name);
		free(inode);
		return NULL;
	}
	inode->parent = parent;
	if (parent)
		parent->children++;
	link_bucket(fs, inode);
	spread(fs);
	return inode;
}

int fs_inode_intern(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
		    const struct statx *stx, struct fs_inode **out)
{
	struct fs_inode *inode;
	struct fs_id id;
	int behind = 0;

	fs_id_of(stx, &id);
	pthread_mutex_lock(&fs->lock);
	inode = fs_inode_by_id(fs, &id);
	if (!inode && parent && (parent->id.dev != id.dev || parent->id.mount != id.mount)) {
		pthread_mutex_unlock(&fs->lock);
		behind = look_behind(fs, parent, name, &id);
		pthread_mutex_lock(&fs->lock);
		inode = fs_inode_by_id(fs, &id);
	}
	if (!inode && behind >= 0) {
		inode = make(fs, parent, name, &id);
		behind = inode ? behind : -errno;
		if (inode)
			inode->hidden = behind;
	} else if (inode && parent) {
		fs_inode_name(fs, inode, parent, name);
	}
	if (inode) {
		inode->lookups++;
		inode->users++;
	}
	pthread_mutex_unlock(&fs->lock);
	*out = inode;
	return inode ? 0 : behind;
}

/* ---- all of them ---- */

int fs_inodes_init(struct vmm_fs *fs)
{
	struct statx stx;
	struct fs_id id;
	int rc = fs_stat_fd(fs->config.root_fd, &stx);

	if (rc)
		return rc;
	TAILQ_INIT(&fs->lru);
	fs->inodes.max = fs->config.inodes_max;
	fs->nr_buckets = FIRST_BUCKETS;
	fs->buckets = calloc(fs->nr_buckets, sizeof(struct fs_inode *));
	if (!fs->buckets)
		return -ENOMEM;
	fs_id_of(&stx, &id);
	fs->root = make(fs, NULL, NULL, &id);
	if (!fs->root)
		return -errno;
	fs->root->fd = fs->config.root_fd;
	return fs->root->nodeid == FUSE_ROOT_ID ? 0 : -EINVAL;
}

/* No request and no handle is left, so that all go with the last lookups. */
void fs_inodes_drop(struct vmm_fs *fs)
{
	pthread_mutex_lock(&fs->lock);
	for (uint32_t i = 0; i < fs->inodes.nr; i++) {
		struct fs_inode *inode = fs->inodes.slots[i].what;

		if (inode && inode != fs->root) {
			inode->lookups = 0;
			release(fs, inode);
		}
	}
	fs->root->seen = false;
	pthread_mutex_unlock(&fs->lock);
}

void fs_inodes_fini(struct vmm_fs *fs)
{
	if (fs->root) {
		fs_inodes_drop(fs);
		fs_locks_free(fs, fs->root);
		free(fs->root);
	}
	free(fs->buckets);
	free(fs->inodes.slots);
}
