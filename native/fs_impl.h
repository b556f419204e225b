/* The parts of the FUSE server, between themselves. */
#ifndef VMM_FS_IMPL_H
#define VMM_FS_IMPL_H

#include "fs.h"
#include "pool.h"
#include "timer.h"

#include <linux/fuse.h>
#include <sys/queue.h>
#include <sys/stat.h>

struct statx;

/* A name, with its NUL. */
#define FS_NAME 256
/* Directories above one another; more is no path that Linux could walk. */
#define FS_DEPTH 4096
#define FS_HANDLES 16384
#define FS_WORKERS 8
#define FS_MAX_WRITE (1 << 20)
#define FS_MAX_PAGES 256
/* A write up to this into the host's cache is quicker done than handed to a worker. */
#define FS_SMALL_WRITE 16384

/* Numbers that come as pointers' stead: an index, and how often it was given out before. */
struct fs_slot {
	void *what;
	uint32_t turn, next;
};

struct fs_slots {
	struct fs_slot *slots;
	uint32_t nr, free, used, max;
};

/* What makes a file the same file. */
struct fs_id {
	uint64_t dev, ino, mount;
	int64_t born_s;
	uint32_t born_ns, type;
};

/* What a file's contents were like when the guest opened it last. */
struct fs_version {
	int64_t mtime, ctime;
	uint32_t mtime_ns, ctime_ns;
	uint64_t size;
};

/* A lock owner of the guest, and the open file that stands for it on the host. */
struct fs_owner {
	uint64_t owner;
	int fd;
	struct fs_owner *next;
};

/* A file the guest knows. It is found again by its name below its parent as long as it has no
 * descriptor; whether what is found is the same file is always checked. */
struct fs_inode {
	struct fs_id id;
	uint64_t nodeid;
	uint64_t lookups; /* that the guest has not forgotten */
	uint32_t users;	  /* requests and handles */
	uint32_t children;
	uint32_t opens;	  /* handles */
	int fd;		  /* O_PATH, or -1 */
	bool pinned;	  /* has no name any more: fd stays */
	bool hidden;	  /* a pseudo file system is mounted here */
	bool seen;	  /* version is known */
	struct fs_version version;
	struct fs_inode *parent;
	char *name;
	struct fs_owner *owners;
	struct fs_inode *next; /* in its bucket */
	TAILQ_ENTRY(fs_inode) lru;
};

/* A file or directory the guest has open. */
struct fs_handle {
	uint64_t fh;
	struct fs_inode *inode;
	int fd; /* -1: a hidden directory */
	uint32_t users;
	bool dead, append, sync, dir;
	pthread_mutex_t lock; /* what follows: a directory's entries, read ahead */
	uint8_t *entries;
	uint32_t at, end;
	uint64_t offset; /* of the entry at `at` */
};

struct fs_queue;

struct fs_request {
	struct vmm_job job; /* first */
	struct fs_queue *queue;
	struct vmm_chain chain;
	const struct iovec *out;
	uint32_t nr_out;
	struct iovec *data; /* room for part of a chain */
	struct fuse_in_header in;
	uint32_t room;	  /* for the answer, without its header */
	uint32_t at;	  /* the next byte of its arguments */
	uint32_t out_len; /* of the answer so far, without its header */
	uint32_t done;	  /* bytes moved before it went to a worker */
	bool worker;	  /* runs on a worker: may take long */
	uint64_t deadline; /* of a lock that it waits for */
	struct fs_request *next;
};

struct fs_queue {
	struct vmm_service service; /* first */
	struct vmm_fs *fs;
	pthread_cond_t idle;
	uint32_t busy; /* requests out of `free`, under the service's lock */
	bool stopping; /* under locks_lock */
	struct fs_request *free, *requests;
	struct iovec *iov;
};

struct vmm_fs {
	struct vmm_fs_config config;
	struct vmm_pool *pool;
	uint64_t requests, errors, bytes_read, bytes_written; /* atomic */
	uint32_t uid, gid;
	bool privileged; /* may act as other users */

	pthread_mutex_t lock; /* of all that follows */
	bool greeted;	      /* FUSE_INIT came */
	struct fs_slots inodes, handles;
	struct fs_inode *root;
	struct fs_inode **buckets;
	uint32_t nr_buckets;
	uint32_t nr_fds, nr_pinned;
	TAILQ_HEAD(fs_lru, fs_inode) lru; /* those with a descriptor, least used first */

	pthread_mutex_t locks_lock; /* owners, waiting */
	struct fs_request *waiting;
	uint32_t nr_owners; /* atomic */
	struct vmm_timer retry;
	struct vmm_loop *loop; /* of the timer */

	uint32_t nr_queues;
	struct fs_queue queues[];
};

/* What a handler says besides 0 and -errno. */
enum {
	FS_SILENT = 1, /* there is no answer */
	FS_TO_WORKER,  /* again, on a worker */
	FS_PARKED,     /* somebody else has it now */
};

/* ---- fs_request.c: arguments and answers */

/* Copies a struct of the arguments; false when the request is shorter. */
bool fs_take(struct fs_request *r, void *to, uint32_t len);
/* How much of the arguments is left. */
uint32_t fs_left(const struct fs_request *r);
/* A string up to its NUL, of less than `room` bytes with it: 0, -EINVAL, -ENAMETOOLONG. */
int fs_take_string(struct fs_request *r, char *to, uint32_t room);
/* The same for the name of a directory's entry: no slash, not "", ".", "..". */
int fs_take_name(struct fs_request *r, char name[FS_NAME]);
/* Adds to the answer. -EINVAL: the guest left no room for it. */
int fs_put(struct fs_request *r, const void *from, uint32_t len);
/* The part of buffers from `offset` on, up to len bytes of it, into `to`. Returns how many. */
uint32_t fs_slice(const struct iovec *iov, uint32_t nr, uint64_t offset, uint64_t len,
		  struct iovec *to);
/* fs_dispatch.c: carries a request out; as a handler does. */
int fs_dispatch(struct vmm_fs *fs, struct fs_request *r);
/* fs.c: a worker takes it. */
void fs_to_worker(struct vmm_fs *fs, struct fs_request *r);
/* The answer of one that was parked. */
void fs_finish(struct fs_request *r, int rc);

/* ---- fs_slots.c */
/* A number, or 0 with errno when there are too many. */
uint64_t fs_slots_add(struct fs_slots *s, void *what);
void *fs_slots_find(const struct fs_slots *s, uint64_t number);
void fs_slots_remove(struct fs_slots *s, uint64_t number);

/* ---- fs_inode.c: the table */
int fs_inodes_init(struct vmm_fs *fs);
void fs_inodes_fini(struct vmm_fs *fs);
/* The guest is gone: as if it had forgotten all. */
void fs_inodes_drop(struct vmm_fs *fs);
/* Counts a user; NULL: there is no such number. */
struct fs_inode *fs_inode_get(struct vmm_fs *fs, uint64_t nodeid);
void fs_inode_put(struct vmm_fs *fs, struct fs_inode *inode);
/* With the lock held. */
void fs_inode_unuse(struct vmm_fs *fs, struct fs_inode *inode);
struct fs_inode *fs_inode_by_id(struct vmm_fs *fs, const struct fs_id *id);
/* The inode of what statx(2) found as `name` in `parent` (NULL: it has no name), with one lookup
 * and one user more. 0 or -errno. */
int fs_inode_intern(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
		    const struct statx *stx, struct fs_inode **out);
void fs_inode_forget(struct vmm_fs *fs, uint64_t nodeid, uint64_t lookups);
/* It has this name now; parent NULL: none. With the lock held. */
int fs_inode_name(struct vmm_fs *fs, struct fs_inode *inode, struct fs_inode *parent,
		  const char *name);

/* ---- fs_fd.c: descriptors */
#define FS_STATX (STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID)
void fs_id_of(const struct statx *stx, struct fs_id *id);
bool fs_id_same(const struct fs_id *a, const struct fs_id *b);
/* An O_PATH descriptor, which stays open while its caller is a user; or -errno. */
int fs_inode_fd(struct vmm_fs *fs, struct fs_inode *inode);
/* Gives it one, which is taken whatever happens; the inode has a user. */
void fs_inode_adopt(struct vmm_fs *fs, struct fs_inode *inode, int fd);
/* With the lock held. */
void fs_inode_drop_fd(struct vmm_fs *fs, struct fs_inode *inode);
/* Attributes, without opening anything that is not open. 0 or -errno. */
int fs_inode_stat(struct vmm_fs *fs, struct fs_inode *inode, struct statx *stx);
/* statx(2) of a name in a directory, or of a descriptor. 0 or -errno. */
int fs_stat_at(int dirfd, const char *name, struct statx *stx);
int fs_stat_fd(int fd, struct statx *stx);
/* open(2) of what an O_PATH descriptor is of: a regular file or a directory. Or -errno. */
int fs_reopen(struct vmm_fs *fs, int fd, int flags);
/* The same from a directory's entry, which is not followed: O_PATH. Or -errno. */
int fs_open_at(struct vmm_fs *fs, int dirfd, const char *name, int flags);
/* After EMFILE: closes what can be opened again; whether there was any. */
bool fs_spare_fds(struct vmm_fs *fs);
/* The name of a descriptor for system calls that want a path. */
#define FS_PATH 32
const char *fs_path(char path[FS_PATH], int fd);
/* What the thread needs once: a umask and a directory of its own, if the host allows it. */
void fs_thread_enter(struct vmm_fs *fs);
bool fs_thread_alone(void);

/* ---- fs_ids.c: users */
struct fs_ids {
	bool changed;
};
/* Acts as the guest's user where that is asked for, on this thread, until fs_ids_back(). */
int fs_ids_as(struct vmm_fs *fs, const struct fs_request *r, struct fs_ids *ids);
void fs_ids_back(struct fs_ids *ids);
uint32_t fs_uid_out(const struct vmm_fs *fs, uint32_t uid);
uint32_t fs_gid_out(const struct vmm_fs *fs, uint32_t gid);
/* What to give chown(2), -1 for no change; -EPERM. */
int fs_owner_in(const struct vmm_fs *fs, const struct statx *now, uint32_t *uid, uint32_t *gid);

/* ---- fs_attr.c */
void fs_attr_of(const struct vmm_fs *fs, const struct statx *stx, bool hidden,
		struct fuse_attr *attr);
uint64_t fs_ino_of(const struct vmm_fs *fs, uint64_t dev, uint64_t ino);
void fs_entry_of(const struct vmm_fs *fs, const struct fs_inode *inode, const struct statx *stx,
		 struct fuse_entry_out *out);
/* Clears setuid and setgid as a write by an ordinary user would. */
void fs_kill_suid(struct vmm_fs *fs, int fd);

/* ---- fs_handle.c */
/* A number for a descriptor opened with these flags (O_DIRECTORY: a directory), which is taken
 * whatever happens. 0 or -errno. */
int fs_handle_add(struct vmm_fs *fs, struct fs_inode *inode, int fd, int flags, uint64_t *fh);
struct fs_handle *fs_handle_get(struct vmm_fs *fs, uint64_t fh, bool dir);
void fs_handle_put(struct vmm_fs *fs, struct fs_handle *h);
int fs_handle_close(struct vmm_fs *fs, uint64_t fh, bool dir);
void fs_handles_drop(struct vmm_fs *fs);

/* ---- fs_lookup.c */
int fs_lookup_name(struct vmm_fs *fs, struct fs_inode *parent, const char *name,
		   struct fs_inode **out, struct statx *stx);
/* Answers with an inode just looked up, and gives the user back. */
int fs_put_entry(struct vmm_fs *fs, struct fs_request *r, struct fs_inode *inode,
		 const struct statx *stx);
/* fs_open.c */
int fs_open_flags(const struct vmm_fs *fs, uint32_t asked);

/* ---- handlers, named after their opcodes */
#define FS_HANDLER(name) int fs_do_##name(struct vmm_fs *fs, struct fs_request *r)
FS_HANDLER(init);
FS_HANDLER(destroy);
FS_HANDLER(lookup);
FS_HANDLER(forget);
FS_HANDLER(batch_forget);
FS_HANDLER(getattr);
FS_HANDLER(setattr);
FS_HANDLER(readlink);
FS_HANDLER(symlink);
FS_HANDLER(mknod);
FS_HANDLER(mkdir);
FS_HANDLER(unlink);
FS_HANDLER(rmdir);
FS_HANDLER(rename);
FS_HANDLER(rename2);
FS_HANDLER(link);
FS_HANDLER(open);
FS_HANDLER(create);
FS_HANDLER(tmpfile);
FS_HANDLER(read);
FS_HANDLER(write);
FS_HANDLER(statfs);
FS_HANDLER(release);
FS_HANDLER(releasedir);
FS_HANDLER(fsync);
FS_HANDLER(fsyncdir);
FS_HANDLER(flush);
FS_HANDLER(opendir);
FS_HANDLER(readdir);
FS_HANDLER(readdirplus);
FS_HANDLER(fallocate);
FS_HANDLER(lseek);
FS_HANDLER(copy_file_range);
FS_HANDLER(syncfs);
FS_HANDLER(setxattr);
FS_HANDLER(getxattr);
FS_HANDLER(listxattr);
FS_HANDLER(removexattr);
FS_HANDLER(getlk);
FS_HANDLER(setlk);
FS_HANDLER(setlkw);
FS_HANDLER(interrupt);

/* ---- fs_lock.c */
/* The guest's owner is done with the file. */
void fs_locks_release(struct vmm_fs *fs, struct fs_inode *inode, uint64_t owner);
/* Those that wait try again. */
void fs_locks_wake(struct vmm_fs *fs);
/* All owners of an inode that goes. */
void fs_locks_free(struct vmm_fs *fs, struct fs_inode *inode);
/* Nobody waits any more for requests of this queue; they are never answered. */
void fs_locks_abandon(struct vmm_fs *fs, struct fs_queue *q);
void fs_locks_expired(struct vmm_timer *timer);

#endif
