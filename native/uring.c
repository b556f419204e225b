/* io_uring by its system calls. */
#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif

static int setup(uint32_t entries, struct io_uring_params *p)
{
	/* COOP_TASKRUN (Linux 5.19): we enter the kernel soon anyway, so no interrupt is needed
	 * to have completions run. */
	static const uint32_t flags[] = { IORING_SETUP_COOP_TASKRUN, 0 };
	long fd = -1;

	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		memset(p, 0, sizeof(*p));
		p->flags = flags[i] | IORING_SETUP_R_DISABLED;
		fd = syscall(__NR_io_uring_setup, entries, p);
		if (fd >= 0 || errno != EINVAL)
			break;
	}
	return fd < 0 ? -errno : (int)fd;
}

static int call_register(int fd, unsigned int what, const void *arg, uint32_t nr)
{
	return syscall(__NR_io_uring_register, fd, what, arg, nr) < 0 ? -errno : 0;
}

/* What can be submitted is fixed now: these operations on these files. */
static int restrict_to(int fd, const int *files, uint32_t nr_files, const uint8_t *ops,
		       uint32_t nr_ops)
{
	struct io_uring_restriction r[16];
	uint32_t nr = 0;
	int rc;

	if (nr_ops > 13)
		return -EINVAL;
	memset(r, 0, sizeof(r));
	for (; nr < nr_ops; nr++) {
		r[nr].opcode = IORING_RESTRICTION_SQE_OP;
		r[nr].sqe_op = ops[nr];
	}
	r[nr].opcode = IORING_RESTRICTION_REGISTER_OP;
	r[nr++].register_op = IORING_UNREGISTER_FILES;
	r[nr].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
	r[nr++].sqe_flags = IOSQE_FIXED_FILE;
	rc = call_register(fd, IORING_REGISTER_FILES, files, nr_files);
	if (!rc)
		rc = call_register(fd, IORING_REGISTER_RESTRICTIONS, r, nr);
	if (!rc)
		rc = call_register(fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	return rc;
}

static int map(struct vmm_uring *u, const struct io_uring_params *p)
{
	const size_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	const size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
	uint8_t *base;

	if (!(p->features & IORING_FEAT_SINGLE_MMAP))
		return -ENOSYS;
	u->rings_len = sq > cq ? sq : cq;
	u->sqes_len = p->sq_entries * sizeof(struct io_uring_sqe);
	u->rings = mmap(NULL, u->rings_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
			u->fd, IORING_OFF_SQ_RING);
	if (u->rings == MAP_FAILED) {
		u->rings = NULL;
		return -errno;
	}
	u->sqes = mmap(NULL, u->sqes_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd,
		       IORING_OFF_SQES);
	if (u->sqes == MAP_FAILED) {
		u->sqes = NULL;
		return -errno;
	}
	base = u->rings;
	u->sq_tail = (uint32_t *)(void *)(base + p->sq_off.tail);
	u->sq_array = (uint32_t *)(void *)(base + p->sq_off.array);
	u->cq_head = (uint32_t *)(void *)(base + p->cq_off.head);
	u->cq_tail = (uint32_t *)(void *)(base + p->cq_off.tail);
	u->cqes = (struct io_uring_cqe *)(void *)(base + p->cq_off.cqes);
	u->sq_mask = p->sq_entries - 1;
	u->cq_mask = p->cq_entries - 1;
	u->entries = p->sq_entries;
	return 0;
}

int vmm_uring_init(struct vmm_uring *u, uint32_t entries, const int *files, uint32_t nr_files,
		   const uint8_t *ops, uint32_t nr_ops)
{
	struct io_uring_params p;
	int rc;

	memset(u, 0, sizeof(*u));
	u->fd = setup(entries, &p);
	if (u->fd < 0)
		return u->fd;
	rc = map(u, &p);
	if (!rc)
		rc = restrict_to(u->fd, files, nr_files, ops, nr_ops);
	if (rc)
		vmm_uring_fini(u);
	return rc;
}

void vmm_uring_fini(struct vmm_uring *u)
{
	if (u->fd < 0)
		return;
	/* The ring itself goes some time after it was closed; the files shall be free now. */
	call_register(u->fd, IORING_UNREGISTER_FILES, NULL, 0);
	if (u->sqes)
		munmap(u->sqes, u->sqes_len);
	if (u->rings)
		munmap(u->rings, u->rings_len);
	close(u->fd);
	u->fd = -1;
}

struct io_uring_sqe *vmm_uring_queue(struct vmm_uring *u)
{
	const uint32_t at = u->tail & u->sq_mask;
	struct io_uring_sqe *sqe = &u->sqes[at];

	if (u->queued == u->entries)
		return NULL;
	memset(sqe, 0, sizeof(*sqe));
	u->sq_array[at] = at;
	u->tail++;
	u->queued++;
	return sqe;
}

int vmm_uring_submit(struct vmm_uring *u, uint32_t wait)
{
	while (u->queued || wait) {
		long n;

		__atomic_store_n(u->sq_tail, u->tail, __ATOMIC_RELEASE);
		n = syscall(__NR_io_uring_enter, u->fd, u->queued, wait,
			    wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < 0)
			return -errno;
		u->queued -= (uint32_t)n;
		wait = 0;
	}
	return 0;
}

void vmm_uring_forget(struct vmm_uring *u)
{
	u->tail -= u->queued;
	u->queued = 0;
}

bool vmm_uring_reap(struct vmm_uring *u, uint64_t *user_data, int32_t *res)
{
	const uint32_t head = *u->cq_head;
	const struct io_uring_cqe *cqe = &u->cqes[head & u->cq_mask];

	if (head == __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE))
		return false;
	*user_data = cqe->user_data;
	*res = cqe->res;
	__atomic_store_n(u->cq_head, head + 1, __ATOMIC_RELEASE);
	return true;
}
