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
	pthread_cond_t cond, taken;
	uint8_t *ring;
	uint32_t capacity;
	uint64_t total;
	bool closed;
	uint32_t nr_watch, matched;
	struct watch watch[MAX_WATCH];
	struct vmm_reader *readers;
	bool starved; /* somebody found no room and waits to be told */
	pthread_mutex_t notify; /* listeners; taken before `lock`, never while holding it */
	struct vmm_listener *listeners;
};

void vmm_cond_init(pthread_cond_t *cond)
{
	pthread_condattr_t attr;

	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(cond, &attr);
	pthread_condattr_destroy(&attr);
}

struct timespec vmm_deadline(int timeout_ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (timeout_ms % 1000) * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_nsec -= 1000000000L;
		until.tv_sec++;
	}
	return until;
}

struct vmm_stream *vmm_stream_create(uint32_t capacity)
{
	struct vmm_stream *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->capacity = capacity ? capacity : 1;
	s->ring = malloc(s->capacity);
	if (!s->ring) {
		free(s);
		return NULL;
	}
	pthread_mutex_init(&s->lock, NULL);
	pthread_mutex_init(&s->notify, NULL);
	vmm_cond_init(&s->cond);
	vmm_cond_init(&s->taken);
	return s;
}

void vmm_stream_destroy(struct vmm_stream *s)
{
	if (!s)
		return;
	pthread_mutex_destroy(&s->lock);
	pthread_mutex_destroy(&s->notify);
	pthread_cond_destroy(&s->cond);
	pthread_cond_destroy(&s->taken);
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

/* Where ring byte `at` is; *run gets how many bytes follow before the ring wraps. */
static uint8_t *slot(struct vmm_stream *s, uint64_t at, uint64_t *run)
{
	const uint32_t i = (uint32_t)(at % s->capacity);

	*run = s->capacity - i;
	return &s->ring[i];
}

/* Under the lock. */
static void append(struct vmm_stream *s, const uint8_t *data, uint32_t len)
{
	uint64_t at = s->total, run;
	uint32_t skip = len > s->capacity ? len - s->capacity : 0, n;

	for (uint32_t w = 0; w < s->nr_watch; w++)
		for (uint32_t i = 0; i < len; i++)
			feed(s, w, data[i]);
	for (at += skip, data += skip, len -= skip; len; at += n, data += n, len -= n) {
		uint8_t *to = slot(s, at, &run);

		n = len < run ? len : (uint32_t)run;
		memcpy(to, data, n);
	}
	s->total = at;
	for (struct vmm_reader *r = s->readers; r; r = r->next) {
		if (s->total - r->at <= s->capacity)
			continue;
		r->lost += s->total - s->capacity - r->at;
		r->at = s->total - s->capacity;
	}
	pthread_cond_broadcast(&s->cond);
}

/* Under the lock. */
static uint32_t room(const struct vmm_stream *s)
{
	uint64_t backlog = 0;

	if (!s->readers)
		return UINT32_MAX;
	for (const struct vmm_reader *r = s->readers; r; r = r->next)
		if (s->total - r->at > backlog)
			backlog = s->total - r->at;
	return s->capacity - (uint32_t)backlog;
}

int vmm_stream_write(struct vmm_stream *s, const uint8_t *data, uint32_t len)
{
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	if (s->closed)
		rc = -EPIPE;
	else
		append(s, data, len);
	pthread_mutex_unlock(&s->lock);
	return rc;
}

uint32_t vmm_stream_offer(struct vmm_stream *s, const uint8_t *data, uint32_t len)
{
	pthread_mutex_lock(&s->lock);
	if (!s->closed) {
		const uint32_t free = room(s);

		if (len > free) {
			len = free;
			s->starved = true;
		}
		if (len)
			append(s, data, len);
	}
	pthread_mutex_unlock(&s->lock);
	return len;
}

uint32_t vmm_stream_room(struct vmm_stream *s)
{
	uint32_t n;

	pthread_mutex_lock(&s->lock);
	n = s->closed ? UINT32_MAX : room(s);
	pthread_mutex_unlock(&s->lock);
	return n;
}

void vmm_stream_listen(struct vmm_stream *s, struct vmm_listener *l)
{
	pthread_mutex_lock(&s->notify);
	l->next = s->listeners;
	s->listeners = l;
	pthread_mutex_unlock(&s->notify);
}

void vmm_stream_unlisten(struct vmm_stream *s, struct vmm_listener *l)
{
	pthread_mutex_lock(&s->notify);
	for (struct vmm_listener **p = &s->listeners; *p; p = &(*p)->next) {
		if (*p != l)
			continue;
		*p = l->next;
		break;
	}
	pthread_mutex_unlock(&s->notify);
}

/* After room may have come back: tells who waits for it. Called without the lock. */
static void tell_room(struct vmm_stream *s)
{
	bool tell;

	pthread_mutex_lock(&s->notify);
	pthread_mutex_lock(&s->lock);
	/* Not for each byte: a writer and a reader would wake each other all the time. */
	tell = s->starved && (s->closed || room(s) > s->capacity / 4);
	if (tell)
		s->starved = false;
	pthread_mutex_unlock(&s->lock);
	for (struct vmm_listener *l = tell ? s->listeners : NULL; l; l = l->next)
		l->notify(l);
	pthread_mutex_unlock(&s->notify);
}

void vmm_stream_attach(struct vmm_stream *s, struct vmm_reader *r, bool past)
{
	pthread_mutex_lock(&s->lock);
	r->at = s->total;
	if (past)
		r->at = s->total > s->capacity ? s->total - s->capacity : 0;
	r->lost = past ? r->at : 0;
	r->stop = false;
	r->next = s->readers;
	s->readers = r;
	pthread_mutex_unlock(&s->lock);
}

void vmm_stream_detach(struct vmm_stream *s, struct vmm_reader *r)
{
	pthread_mutex_lock(&s->lock);
	for (struct vmm_reader **p = &s->readers; *p; p = &(*p)->next) {
		if (*p != r)
			continue;
		*p = r->next;
		break;
	}
	pthread_mutex_unlock(&s->lock);
	tell_room(s);
}

/* Under the lock. */
static uint32_t copy_out(struct vmm_stream *s, uint64_t from, uint8_t *dst, uint32_t len)
{
	uint32_t done = 0, n;
	uint64_t run;

	if (s->total - from < len)
		len = (uint32_t)(s->total - from);
	for (; done < len; done += n) {
		const uint8_t *at = slot(s, from + done, &run);

		n = len - done < run ? len - done : (uint32_t)run;
		memcpy(dst + done, at, n);
	}
	return len;
}

uint32_t vmm_stream_peek(struct vmm_stream *s, struct vmm_reader *r, uint8_t *dst, uint32_t len,
			 uint64_t *start)
{
	uint32_t n;

	pthread_mutex_lock(&s->lock);
	while (r->at == s->total && !s->closed && !r->stop)
		pthread_cond_wait(&s->cond, &s->lock);
	*start = r->at;
	n = copy_out(s, r->at, dst, len);
	pthread_mutex_unlock(&s->lock);
	return n;
}

void vmm_stream_take(struct vmm_stream *s, struct vmm_reader *r, uint64_t upto)
{
	bool starved;

	pthread_mutex_lock(&s->lock);
	/* Further already when bytes were overwritten since they were looked at. */
	if (upto > r->at && upto <= s->total)
		r->at = upto;
	starved = s->starved;
	pthread_cond_broadcast(&s->taken);
	pthread_mutex_unlock(&s->lock);
	if (starved)
		tell_room(s);
}

int vmm_stream_drain(struct vmm_stream *s, const struct vmm_reader *r, int timeout_ms)
{
	const struct timespec until = vmm_deadline(timeout_ms);
	uint64_t upto;
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	upto = s->total;
	while (r->at < upto && !rc)
		rc = pthread_cond_timedwait(&s->taken, &s->lock, &until);
	rc = r->at < upto ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&s->lock);
	return rc;
}

void vmm_stream_stop(struct vmm_stream *s, struct vmm_reader *r)
{
	pthread_mutex_lock(&s->lock);
	r->stop = true;
	pthread_cond_broadcast(&s->cond);
	pthread_mutex_unlock(&s->lock);
}

uint64_t vmm_stream_backlog(struct vmm_stream *s, const struct vmm_reader *r)
{
	uint64_t n;

	pthread_mutex_lock(&s->lock);
	n = s->total - r->at;
	pthread_mutex_unlock(&s->lock);
	return n;
}

uint64_t vmm_stream_lost(struct vmm_stream *s, const struct vmm_reader *r)
{
	uint64_t n;

	pthread_mutex_lock(&s->lock);
	n = r->lost;
	pthread_mutex_unlock(&s->lock);
	return n;
}

uint32_t vmm_stream_read(struct vmm_stream *s, uint64_t from, uint8_t *dst, uint32_t len,
			 uint64_t *start)
{
	uint64_t oldest;

	pthread_mutex_lock(&s->lock);
	oldest = s->total > s->capacity ? s->total - s->capacity : 0;
	if (from < oldest)
		from = oldest;
	if (from > s->total)
		from = s->total;
	len = copy_out(s, from, dst, len);
	*start = from;
	pthread_mutex_unlock(&s->lock);
	return len;
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
	const struct timespec until = vmm_deadline(timeout_ms);
	uint64_t total;

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
	tell_room(s);
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
	return (int)(w - s->watch);
}

void vmm_stream_unwatch(struct vmm_stream *s, int eventfd)
{
	pthread_mutex_lock(&s->lock);
	for (uint32_t i = 0; i < s->nr_watch; i++)
		if (s->watch[i].eventfd == eventfd)
			s->watch[i].eventfd = -1;
	pthread_mutex_unlock(&s->lock);
}

uint32_t vmm_stream_matched(struct vmm_stream *s)
{
	uint32_t matched;

	pthread_mutex_lock(&s->lock);
	matched = s->matched;
	pthread_mutex_unlock(&s->lock);
	return matched;
}
