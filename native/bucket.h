/* A token bucket, to the unit exact over any time. */
#ifndef VMM_BUCKET_H
#define VMM_BUCKET_H

#include <stdint.h>

/* cdef: begin */

/* `rate` units a second (bytes, packets, operations) on average, up to `burst` of them at once. A
 * bucket belongs to one thread; to change it live, do so on that thread. All zero: no limit. */
struct vmm_bucket {
	uint64_t rate, burst;
	uint64_t full_at; /* ns: when it will be full again */
	uint64_t rest;	  /* of the last division, so that no unit is lost or given twice */
};

/* rate 0: no limit; burst 0: as much as one second gives. The bucket starts full. */
void vmm_bucket_set(struct vmm_bucket *b, uint64_t rate, uint64_t burst);
/* Nanoseconds until something may be taken again; 0: now. */
uint64_t vmm_bucket_wait(const struct vmm_bucket *b, uint64_t now);
/* Takes an amount of any size, and puts the bucket into debt if that is more than it has: what is
 * larger than the burst gets through too, and the rate still holds. Ask vmm_bucket_wait() first.
 * `now` is CLOCK_MONOTONIC in nanoseconds, see vmm_now(). */
void vmm_bucket_take(struct vmm_bucket *b, uint64_t now, uint64_t amount);

/* cdef: end */

#endif
