/* One queue of a disk: what its I/O thread does. */
#ifndef VMM_BLK_QUEUE_H
#define VMM_BLK_QUEUE_H

#include "blk.h"
#include "bucket.h"
#include "timer.h"

struct vmm_blk_queue {
	struct vmm_service service;    /* first */
	struct vmm_source completions; /* of io_uring */
	struct vmm_source finished;    /* of workers */
	struct vmm_timer timer;	       /* until the limits allow more */
	struct vmm_blk *blk;
	struct vmm_blk_io io;
	struct vmm_blk_stats stats;
	bool flushes; /* the driver can flush */
	/* As many as the ring can have in flight; each is in flight or in one of the lists. */
	struct vmm_blk_request *free, *held;
	struct vmm_blk_request *requests;
	struct iovec *iov;
	struct vmm_blk_segment *segments;
};

struct vmm_blk {
	struct vmm_blk_file file;
	bool write_back; /* atomic */
	int error;	 /* atomic: of the request that was held last */
	bool limited;	 /* atomic: the buckets are to be asked */
	pthread_mutex_t lock; /* bytes, requests */
	struct vmm_bucket bytes, requests;
	uint32_t nr_queues;
	struct vmm_blk_queue queues[];
};

static inline void vmm_blk_count(uint64_t *what, uint64_t by)
{
	/* One writer, the I/O thread; readers want no torn values. */
	__atomic_store_n(what, *what + by, __ATOMIC_RELAXED);
}

/* blk_request.c: a chain becomes a request. false: it has no header or no status byte. */
bool vmm_blk_parse(struct vmm_blk_request *r, uint64_t *sector);
/* What the driver asks for, checked: VMM_BLK_GO, or the status it ends with at once. */
#define VMM_BLK_GO (-1)
int vmm_blk_check(const struct vmm_blk *blk, struct vmm_blk_request *r, uint64_t sector);

int vmm_blk_queue_init(struct vmm_blk_queue *q, struct vmm_blk *blk, struct vmm_loop *loop);
void vmm_blk_queue_fini(struct vmm_blk_queue *q);
int vmm_blk_queue_start(struct vmm_blk_queue *q, const struct vmm_service_config *config);
void vmm_blk_queue_retry(struct vmm_blk_queue *q);
/* The limits are different now. */
void vmm_blk_queue_limits(struct vmm_blk_queue *q);

#endif
