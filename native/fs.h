/* virtio-fs (virtio-v1.3 §5.11): a directory of the host, served to the guest as FUSE. */
#ifndef VMM_FS_H
#define VMM_FS_H

#include "service.h"

/* cdef: begin */

struct vmm_fs;

/* How long the guest may believe what it was told. AUTO: a second, and file contents until they
 * change; ALWAYS: for good; NEVER: not at all. */
enum { VMM_FS_AUTO, VMM_FS_ALWAYS, VMM_FS_NEVER };
/* Whose files are whose. PASS: numbers mean the same on both sides; SQUASH: the host's user is the
 * guest's root. */
enum { VMM_FS_PASS, VMM_FS_SQUASH };
enum { VMM_FS_TAG = 36 };

struct vmm_fs_config {
	int root_fd;	     /* O_PATH: the directory */
	int proc_fd;	     /* O_PATH: /proc/self/fd */
	uint8_t read_only, cache, ids, writeback, host_locks;
	uint8_t workers_only; /* requests do not run on the I/O threads, which others use too */
	uint16_t queues;     /* for requests; queue 0, for what must not wait, is one more */
	uint16_t queue_size; /* the longest a ring may be */
	uint32_t umask;	     /* of this process */
	uint32_t inodes_max; /* how many the guest may know at once */
	uint32_t fds_max;    /* descriptors to use, for open files and directories */
};

struct vmm_fs_stats {
	uint64_t requests, errors, bytes_read, bytes_written;
	uint64_t inodes, handles, fds, waiting;
};

/* Queue i works on the thread of loops[i], of config->queues + 1. The descriptors are borrowed.
 * NULL with errno. */
struct vmm_fs *vmm_fs_create(struct vmm_loop **loops, const struct vmm_fs_config *config);
void vmm_fs_destroy(struct vmm_fs *fs);
/* The queue is config->index. 0 or -errno. */
int vmm_fs_start(struct vmm_fs *fs, const struct vmm_service_config *config);
/* Stops every queue and waits for requests in flight; the guest's files are closed. */
void vmm_fs_stop(struct vmm_fs *fs);
/* One queue only, which may be started again; files stay open. */
void vmm_fs_stop_queue(struct vmm_fs *fs, uint32_t index);
/* Sums since the start, and what is in use now. Any thread. */
void vmm_fs_stats(struct vmm_fs *fs, struct vmm_fs_stats *out);
/* Whether a descriptor is of a file system that is a window into the kernel (procfs, sysfs...),
 * which is not shared. -errno. */
int vmm_fs_pseudo(int fd);

/* cdef: end */

#endif
