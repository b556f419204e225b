/* Token bucket as a virtual schedule: instead of counting tokens, the time is kept at which all of
 * them are back. */
#include "bucket.h"

#define SECOND 1000000000ULL

static uint64_t to_ns(uint64_t amount, uint64_t rate)
{
	const unsigned __int128 ns = (unsigned __int128)amount * SECOND / rate;

	return ns > UINT64_MAX / 4 ? UINT64_MAX / 4 : (uint64_t)ns;
}

void vmm_bucket_set(struct vmm_bucket *b, uint64_t rate, uint64_t burst)
{
	b->rate = rate;
	b->burst = burst ? burst : rate;
	b->full_at = 0;
	b->rest = 0;
}

uint64_t vmm_bucket_wait(const struct vmm_bucket *b, uint64_t now)
{
	uint64_t lacking;

	if (!b->rate || b->full_at <= now)
		return 0;
	/* At least one is there when no more than the others have yet to come back. */
	lacking = to_ns(b->burst - 1, b->rate);
	return b->full_at - now <= lacking ? 0 : b->full_at - now - lacking;
}

void vmm_bucket_take(struct vmm_bucket *b, uint64_t now, uint64_t amount)
{
	unsigned __int128 cost;

	if (!b->rate)
		return;
	if (b->full_at < now) {
		b->full_at = now;
		b->rest = 0;
	}
	cost = (unsigned __int128)amount * SECOND + b->rest;
	b->rest = (uint64_t)(cost % b->rate);
	cost /= b->rate;
	/* A debt of more than a century is one of a century. */
	b->full_at += cost > UINT64_MAX / 4 ? UINT64_MAX / 4 : (uint64_t)cost;
	if (b->full_at > UINT64_MAX / 2)
		b->full_at = UINT64_MAX / 2;
}
