/* What the guest printed: a ring that remembers the tail and recognises patterns. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_WATCH 8
#define MAX_PATTERN 63

struct watch {
	char text[MAX_PATTERN + 1];
	uint8_t len, at;
	uint8_t fail[MAX_PATTERN + 1]; /* Knuth-Morris-Pratt: where to go on after a mismatch */
	int eventfd;
};

struct vmm_stream {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	uint8_t *ring;
	uint32_t capacity;
	uint64_t total;
	bool closed;
	uint32_t nr_watch, matched;
	struct watch watch[MAX_WATCH];
};

struct vmm_stream *vmm_stream_create(uint32_t capacity)
{
	struct vmm_stream *s = calloc(1, sizeof(*s));
	pthread_condattr_t attr;

	if (!s)
		return NULL;
	s->capacity = capacity ? capacity : 1;
	s->ring = malloc(s->capacity);
	if (!s->ring) {
		free(s);
		return NULL;
	}
	pthread_mutex_init(&s->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->cond, &attr);
	pthread_condattr_destroy(&attr);
	return s;
}

void vmm_stream_destroy(struct vmm_stream *s)
{
	if (!s)
		return;
	pthread_mutex_destroy(&s->lock);
	pthread_cond_destroy(&s->cond);
	free(s->ring);
	free(s);
}

static void feed(struct vmm_stream *s, uint32_t nr, uint8_t c)
{
	struct watch *w = &s->watch[nr];
	const uint64_t one = 1;

	while (w->at && (uint8_t)w->text[w->at] != c)
		w->at = w->fail[w->at];
	if ((uint8_t)w->text[w->at] == c)
		w->at++;
	if (w->at < w->len)
		return;
	w->at = w->fail[w->len];
	if (!(s->matched & (1U << nr))) {
		s->matched |= 1U << nr;
		if (w->eventfd >= 0 && write(w->eventfd, &one, sizeof(one)) < 0)
			return; /* full: whoever waits on it is awake already */
	}
}

int vmm_stream_write(struct vmm_stream *s, const uint8_t *data, uint32_t len)
{
	pthread_mutex_lock(&s->lock);
	if (s->closed) {
		pthread_mutex_unlock(&s->lock);
		return -EPIPE;
	}
	for (uint32_t i = 0; i < len; i++) {
		s->ring[(s->total + i) % s->capacity] = data[i];
		for (uint32_t w = 0; w < s->nr_watch; w++)
			feed(s, w, data[i]);
	}
	s->total += len;
	pthread_cond_broadcast(&s->cond);
	pthread_mutex_unlock(&s->lock);
	return 0;
}

uint32_t vmm_stream_read(struct vmm_stream *s, uint64_t from, uint8_t *dst, uint32_t len,
			 uint64_t *start)
{
	uint64_t oldest, n;

	pthread_mutex_lock(&s->lock);
	oldest = s->total > s->capacity ? s->total - s->capacity : 0;
	if (from < oldest)
		from = oldest;
	if (from > s->total)
		from = s->total;
	n = s->total - from;
	if (n > len)
		n = len;
	for (uint64_t i = 0; i < n; i++)
		dst[i] = s->ring[(from + i) % s->capacity];
	*start = from;
	pthread_mutex_unlock(&s->lock);
	return (uint32_t)n;
}

uint64_t vmm_stream_total(struct vmm_stream *s)
{
	uint64_t total;

	pthread_mutex_lock(&s->lock);
	total = s->total;
	pthread_mutex_unlock(&s->lock);
	return total;
}

uint64_t vmm_stream_wait(struct vmm_stream *s, uint64_t from, int timeout_ms)
{
	struct timespec until;
	uint64_t total;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (timeout_ms % 1000) * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_nsec -= 1000000000L;
		until.tv_sec++;
	}
	pthread_mutex_lock(&s->lock);
	while (s->total <= from && !s->closed)
		if (pthread_cond_timedwait(&s->cond, &s->lock, &until))
			break;
	total = s->total;
	pthread_mutex_unlock(&s->lock);
	return total;
}

void vmm_stream_close(struct vmm_stream *s)
{
	pthread_mutex_lock(&s->lock);
	s->closed = true;
	pthread_cond_broadcast(&s->cond);
	pthread_mutex_unlock(&s->lock);
}

int vmm_stream_watch(struct vmm_stream *s, const char *pattern, int eventfd)
{
	const size_t len = strlen(pattern);
	struct watch *w;
	uint32_t k = 0;

	if (!len || len > MAX_PATTERN)
		return -EINVAL;
	pthread_mutex_lock(&s->lock);
	if (s->nr_watch == MAX_WATCH) {
		pthread_mutex_unlock(&s->lock);
		return -ENOSPC;
	}
	w = &s->watch[s->nr_watch];
	memset(w, 0, sizeof(*w));
	memcpy(w->text, pattern, len);
	w->len = (uint8_t)len;
	w->eventfd = eventfd;
	for (uint32_t i = 1; i < len; i++) {
		while (k && pattern[i] != pattern[k])
			k = w->fail[k];
		if (pattern[i] == pattern[k])
			k++;
		w->fail[i + 1] = (uint8_t)k;
	}
	s->nr_watch++;
	pthread_mutex_unlock(&s->lock);
	return 0;
}

uint32_t vmm_stream_matched(struct vmm_stream *s)
{
	uint32_t matched;

	pthread_mutex_lock(&s->lock);
	matched = s->matched;
	pthread_mutex_unlock(&s->lock);
	return matched;
}
