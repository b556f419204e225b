/* FUSE: which request is whose, and how a session begins and ends. */
#include "fs_impl.h"

#include <errno.h>

/* Linux had virtio-fs from 5.4 on, which speaks 7.31. */
#define MINOR_MIN 31
/* Of which 7.36 is known here; structs grew at their ends only. */
#define MINOR 36
#define IN_MIN 16 /* fuse_init_in before 7.36 */
#define BACKGROUND 64

enum {
	SLOW = 1,   /* may make its caller wait long */
	CHANGES = 2, /* what a read-only share refuses */
	STATELESS = 4, /* also before the session */
};

static const struct {
	int (*handle)(struct vmm_fs *fs, struct fs_request *r);
	uint32_t how;
} ops[] = {
	[FUSE_LOOKUP] = { fs_do_lookup, 0 },
	[FUSE_FORGET] = { fs_do_forget, STATELESS },
	[FUSE_GETATTR] = { fs_do_getattr, 0 },
	[FUSE_SETATTR] = { fs_do_setattr, CHANGES },
	[FUSE_READLINK] = { fs_do_readlink, 0 },
	[FUSE_SYMLINK] = { fs_do_symlink, CHANGES },
	[FUSE_MKNOD] = { fs_do_mknod, CHANGES },
	[FUSE_MKDIR] = { fs_do_mkdir, CHANGES },
	[FUSE_UNLINK] = { fs_do_unlink, CHANGES },
	[FUSE_RMDIR] = { fs_do_rmdir, CHANGES },
	[FUSE_RENAME] = { fs_do_rename, CHANGES },
	[FUSE_LINK] = { fs_do_link, CHANGES },
	[FUSE_OPEN] = { fs_do_open, 0 },
	[FUSE_READ] = { fs_do_read, 0 },
	[FUSE_WRITE] = { fs_do_write, CHANGES },
	[FUSE_STATFS] = { fs_do_statfs, 0 },
	[FUSE_RELEASE] = { fs_do_release, 0 },
	[FUSE_FSYNC] = { fs_do_fsync, SLOW },
	[FUSE_SETXATTR] = { fs_do_setxattr, CHANGES },
	[FUSE_GETXATTR] = { fs_do_getxattr, 0 },
	[FUSE_LISTXATTR] = { fs_do_listxattr, 0 },
	[FUSE_REMOVEXATTR] = { fs_do_removexattr, CHANGES },
	[FUSE_FLUSH] = { fs_do_flush, 0 },
	[FUSE_INIT] = { fs_do_init, STATELESS },
	[FUSE_OPENDIR] = { fs_do_opendir, 0 },
	[FUSE_READDIR] = { fs_do_readdir, 0 },
	[FUSE_RELEASEDIR] = { fs_do_releasedir, 0 },
	[FUSE_FSYNCDIR] = { fs_do_fsyncdir, SLOW },
	[FUSE_GETLK] = { fs_do_getlk, 0 },
	[FUSE_SETLK] = { fs_do_setlk, 0 },
	[FUSE_SETLKW] = { fs_do_setlkw, 0 },
	[FUSE_CREATE] = { fs_do_create, CHANGES },
	[FUSE_INTERRUPT] = { fs_do_interrupt, STATELESS },
	[FUSE_DESTROY] = { fs_do_destroy, STATELESS },
	[FUSE_BATCH_FORGET] = { fs_do_batch_forget, STATELESS },
	[FUSE_FALLOCATE] = { fs_do_fallocate, CHANGES | SLOW },
	[FUSE_READDIRPLUS] = { fs_do_readdirplus, 0 },
	[FUSE_RENAME2] = { fs_do_rename2, CHANGES },
	[FUSE_LSEEK] = { fs_do_lseek, 0 },
	[FUSE_COPY_FILE_RANGE] = { fs_do_copy_file_range, CHANGES | SLOW },
	[50] = { fs_do_syncfs, SLOW }, /* FUSE_SYNCFS, FUSE_TMPFILE: newer than some headers */
	[51] = { fs_do_tmpfile, CHANGES },
};

int fs_dispatch(struct vmm_fs *fs, struct fs_request *r)
{
	const uint32_t op = r->in.opcode;
	bool greeted;

	if (op >= sizeof(ops) / sizeof(ops[0]) || !ops[op].handle)
		return -ENOSYS;
	pthread_mutex_lock(&fs->lock);
	greeted = fs->greeted;
	pthread_mutex_unlock(&fs->lock);
	if (!greeted && !(ops[op].how & STATELESS))
		return -EIO;
	if (ops[op].how & CHANGES && fs->config.read_only)
		return -EROFS;
	if (!r->worker && (fs->config.workers_only || ops[op].how & SLOW))
		return FS_TO_WORKER;
	return ops[op].handle(fs, r);
}

/* What is used of what the guest's kernel can do. */
static uint32_t features(const struct vmm_fs *fs)
{
	uint32_t flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS |
			 FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_ATOMIC_O_TRUNC |
			 FUSE_ASYNC_DIO | FUSE_HANDLE_KILLPRIV_V2;

	if (fs->config.host_locks)
		flags |= FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS;
	if (fs->config.writeback)
		flags |= FUSE_WRITEBACK_CACHE;
	flags |= fs->config.cache == VMM_FS_ALWAYS ? FUSE_CACHE_SYMLINKS : FUSE_AUTO_INVAL_DATA;
	return flags;
}

FS_HANDLER(init)
{
	struct fuse_init_in in = { 0 };
	struct fuse_init_out out = { .major = FUSE_KERNEL_VERSION, .minor = MINOR };

	/* The first fields are all there is to know. */
	if (!fs_take(r, &in, IN_MIN))
		return -EINVAL;
	if (in.major > FUSE_KERNEL_VERSION) /* it shall try again with ours */
		return fs_put(r, &out, sizeof(out));
	if (in.major < FUSE_KERNEL_VERSION || in.minor < MINOR_MIN)
		return -EPROTO;
	/* Whoever came before is gone. */
	fs_handles_drop(fs);
	fs_inodes_drop(fs);
	out.max_readahead = in.max_readahead;
	out.flags = in.flags & features(fs);
	out.max_background = BACKGROUND;
	out.congestion_threshold = BACKGROUND * 3 / 4;
	out.max_write = FS_MAX_WRITE;
	out.time_gran = 1;
	out.max_pages = FS_MAX_PAGES;
	pthread_mutex_lock(&fs->lock);
	fs->greeted = true;
	pthread_mutex_unlock(&fs->lock);
	return fs_put(r, &out, sizeof(out));
}

FS_HANDLER(destroy)
{
	(void)r;
	pthread_mutex_lock(&fs->lock);
	fs->greeted = false;
	pthread_mutex_unlock(&fs->lock);
	fs_handles_drop(fs);
	fs_inodes_drop(fs);
	return 0;
}
