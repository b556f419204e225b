/* What is typed at the guest: a bounded FIFO. */
#define _GNU_SOURCE
#include "chario.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct vmm_input {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	uint8_t *ring;
	uint32_t capacity, size, at, level;
	uint64_t total;
	bool closed, hungry;
	uint32_t breaks, events;
	int room_fd; /* an eventfd that waits for room, or -1 */
	pthread_mutex_t notify; /* listeners; taken before `lock`, never while holding it */
	struct vmm_listener *listeners;
	struct vmm_feed *feed;
};

struct vmm_input *vmm_input_create(uint32_t capacity)
{
	struct vmm_input *in = calloc(1, sizeof(*in));

	if (!in)
		return NULL;
	in->capacity = capacity ? capacity : 1;
	in->size = in->capacity + VMM_INPUT_SPARE;
	in->ring = malloc(in->size);
	if (!in->ring) {
		free(in);
		return NULL;
	}
	in->hungry = true;
	in->room_fd = -1;
	pthread_mutex_init(&in->lock, NULL);
	pthread_mutex_init(&in->notify, NULL);
	vmm_cond_init(&in->cond);
	return in;
}

void vmm_input_destroy(struct vmm_input *in)
{
	if (!in)
		return;
	vmm_input_unsource(in);
	pthread_mutex_destroy(&in->lock);
	pthread_mutex_destroy(&in->notify);
	pthread_cond_destroy(&in->cond);
	free(in->ring);
	free(in);
}

void vmm_input_listen(struct vmm_input *in, struct vmm_listener *l)
{
	pthread_mutex_lock(&in->notify);
	l->next = in->listeners;
	in->listeners = l;
	pthread_mutex_unlock(&in->notify);
}

void vmm_input_unlisten(struct vmm_input *in, struct vmm_listener *l)
{
	pthread_mutex_lock(&in->notify);
	for (struct vmm_listener **p = &in->listeners; *p; p = &(*p)->next) {
		if (*p != l)
			continue;
		*p = l->next;
		break;
	}
	pthread_mutex_unlock(&in->notify);
}

static void tell(struct vmm_input *in)
{
	pthread_mutex_lock(&in->notify);
	for (struct vmm_listener *l = in->listeners; l; l = l->next)
		l->notify(l);
	pthread_mutex_unlock(&in->notify);
}

static void signal_fd(int fd)
{
	const uint64_t one = 1;

	while (fd >= 0 && write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Under the lock, so that whoever closes the eventfd can wait for it. */
static void tell_room(struct vmm_input *in)
{
	if (in->room_fd < 0 || in->level > in->capacity / 2)
		return;
	signal_fd(in->room_fd);
	in->room_fd = -1;
}

void vmm_input_want_room(struct vmm_input *in, int eventfd)
{
	pthread_mutex_lock(&in->lock);
	in->room_fd = eventfd;
	if (eventfd >= 0)
		tell_room(in);
	pthread_mutex_unlock(&in->lock);
}

/* Under the lock. */
static uint32_t room(const struct vmm_input *in)
{
	return in->level < in->capacity ? in->capacity - in->level : 0;
}

uint32_t vmm_input_push(struct vmm_input *in, const uint8_t *data, uint32_t len)
{
	bool hungry;

	pthread_mutex_lock(&in->lock);
	if (in->closed)
		len = 0;
	if (len > room(in))
		len = room(in);
	for (uint32_t i = 0; i < len; i++)
		in->ring[(in->at + in->level + i) % in->size] = data[i];
	in->level += len;
	in->total += len;
	hungry = in->hungry && len;
	if (hungry)
		in->hungry = false;
	pthread_mutex_unlock(&in->lock);
	if (hungry)
		tell(in);
	return len;
}

uint32_t vmm_input_pull(struct vmm_input *in, uint8_t *dst, uint32_t len)
{
	pthread_mutex_lock(&in->lock);
	if (len >= in->level) {
		in->hungry = true;
		len = in->level;
	}
	for (uint32_t i = 0; i < len; i++)
		dst[i] = in->ring[(in->at + i) % in->size];
	in->at = (in->at + len) % in->size;
	in->level -= len;
	tell_room(in);
	pthread_cond_broadcast(&in->cond);
	pthread_mutex_unlock(&in->lock);
	return len;
}

void vmm_input_unpull(struct vmm_input *in, const uint8_t *data, uint32_t len)
{
	pthread_mutex_lock(&in->lock);
	if (len > in->size - in->level)
		len = in->size - in->level;
	in->at = (in->at + in->size - len) % in->size;
	for (uint32_t i = 0; i < len; i++)
		in->ring[(in->at + i) % in->size] = data[i];
	in->level += len;
	pthread_mutex_unlock(&in->lock);
}

uint32_t vmm_input_level(struct vmm_input *in)
{
	uint32_t n;

	pthread_mutex_lock(&in->lock);
	n = in->level;
	pthread_mutex_unlock(&in->lock);
	return n;
}

uint64_t vmm_input_total(struct vmm_input *in)
{
	uint64_t n;

	pthread_mutex_lock(&in->lock);
	n = in->total;
	pthread_mutex_unlock(&in->lock);
	return n;
}

uint32_t vmm_input_wait(struct vmm_input *in, int timeout_ms)
{
	const struct timespec until = vmm_deadline(timeout_ms);
	uint32_t n;

	pthread_mutex_lock(&in->lock);
	while (!room(in) && !in->closed)
		if (pthread_cond_timedwait(&in->cond, &in->lock, &until))
			break;
	n = room(in);
	pthread_mutex_unlock(&in->lock);
	return n;
}

int vmm_input_drain(struct vmm_input *in, int timeout_ms)
{
	const struct timespec until = vmm_deadline(timeout_ms);
	int rc = 0;

	pthread_mutex_lock(&in->lock);
	while (in->level && !rc)
		rc = pthread_cond_timedwait(&in->cond, &in->lock, &until);
	rc = in->level ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&in->lock);
	return rc;
}

void vmm_input_break(struct vmm_input *in)
{
	pthread_mutex_lock(&in->lock);
	in->breaks++;
	pthread_mutex_unlock(&in->lock);
	tell(in);
}

bool vmm_input_take_break(struct vmm_input *in)
{
	bool yes;

	pthread_mutex_lock(&in->lock);
	yes = in->breaks > 0;
	in->breaks -= yes;
	pthread_mutex_unlock(&in->lock);
	return yes;
}

void vmm_input_close(struct vmm_input *in)
{
	pthread_mutex_lock(&in->lock);
	in->closed = true;
	pthread_cond_broadcast(&in->cond);
	pthread_mutex_unlock(&in->lock);
	tell(in);
}

int vmm_input_eof(struct vmm_input *in)
{
	int eof;

	pthread_mutex_lock(&in->lock);
	eof = in->closed && !in->level;
	pthread_mutex_unlock(&in->lock);
	return eof;
}

uint32_t vmm_input_events(struct vmm_input *in)
{
	uint32_t events;

	pthread_mutex_lock(&in->lock);
	events = in->events;
	in->events = 0;
	pthread_mutex_unlock(&in->lock);
	return events;
}

void vmm_input_raise(struct vmm_input *in, uint32_t bit, int eventfd)
{
	pthread_mutex_lock(&in->lock);
	in->events |= bit;
	pthread_mutex_unlock(&in->lock);
	signal_fd(eventfd);
}

int vmm_input_source(struct vmm_input *in, struct vmm_loop *loop, int fd, int escapes, int eventfd)
{
	return in->feed ? -EBUSY : vmm_feed_create(&in->feed, in, loop, fd, escapes, eventfd);
}

void vmm_input_unsource(struct vmm_input *in)
{
	vmm_feed_destroy(in->feed);
	in->feed = NULL;
}

void vmm_input_kick(struct vmm_input *in)
{
	if (in->feed)
		vmm_feed_kick(in->feed);
}
