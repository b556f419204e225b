/* What is typed at the guest: a bounded FIFO, and the descriptor that feeds it. */
#define _GNU_SOURCE
#include "chario.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK 4096
#define ESCAPE 0x01 /* Ctrl-A */

/* What feeds the FIFO. All but `loop` and the descriptors belongs to the I/O thread. */
struct source {
	struct vmm_loop *loop;
	struct vmm_source data, kick;
	enum vmm_chan chan;
	bool polled; /* epoll knows the descriptor; a file it does not */
	bool tty, escapes, prefix, ended;
	int eventfd;
	uint8_t held[2 * CHUNK]; /* read, not yet accepted: Ctrl-A may come out one byte late */
	uint32_t held_at, held_len;
};

struct vmm_input {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	uint8_t *ring;
	uint32_t capacity, size, at, level;
	uint64_t total;
	bool closed, hungry, stalled;
	uint32_t breaks, events;
	pthread_mutex_t notify; /* listeners; taken before `lock`, never while holding it */
	struct vmm_listener *listeners;
	struct source src;
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
	bool kick;

	pthread_mutex_lock(&in->lock);
	if (len >= in->level) {
		in->hungry = true;
		len = in->level;
	}
	for (uint32_t i = 0; i < len; i++)
		dst[i] = in->ring[(in->at + i) % in->size];
	in->at = (in->at + len) % in->size;
	in->level -= len;
	kick = in->stalled && in->level <= in->capacity / 2;
	if (kick)
		in->stalled = false;
	pthread_cond_broadcast(&in->cond);
	/* Under the lock, so that taking the source away waits for it. */
	if (kick)
		signal_fd(in->src.kick.fd);
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

static void raise_event(struct vmm_input *in, uint32_t bit)
{
	pthread_mutex_lock(&in->lock);
	in->events |= bit;
	pthread_mutex_unlock(&in->lock);
	signal_fd(in->src.eventfd);
}

/* ---- the source, on the I/O thread ---------------------------------------------------------- */

/* One typed byte into held[]. */
static void typed(struct vmm_input *in, uint8_t c)
{
	struct source *s = &in->src;

	if (!s->escapes) {
		s->held[s->held_len++] = c;
		return;
	}
	if (!s->prefix) {
		s->prefix = c == ESCAPE;
		if (!s->prefix)
			s->held[s->held_len++] = c;
		return;
	}
	s->prefix = false;
	switch (c) {
	case 'x':
	case 'X':
		raise_event(in, VMM_INPUT_QUIT);
		break;
	case 'h':
	case '?':
		raise_event(in, VMM_INPUT_HELP);
		break;
	case 'b':
		vmm_input_break(in);
		break;
	default: /* a shell's own Ctrl-A goes on working, one key late */
		s->held[s->held_len++] = ESCAPE;
		if (c != 'a' && c != ESCAPE)
			s->held[s->held_len++] = c;
	}
}

static void ended(struct vmm_input *in)
{
	in->src.ended = true;
	vmm_input_close(in);
	raise_event(in, VMM_INPUT_EOF);
}

/* Reads once into held[], which is empty. False when there is nothing (more) for now. */
static bool fill(struct vmm_input *in)
{
	struct source *s = &in->src;
	uint8_t buf[CHUNK];
	ssize_t n;

	if (s->chan == VMM_CHAN_SOCKET) {
		n = recv(s->data.fd, buf, sizeof(buf), MSG_DONTWAIT);
	} else if (s->chan == VMM_CHAN_BLOCK) {
		struct pollfd p = { .fd = s->data.fd, .events = POLLIN };

		if (poll(&p, 1, 0) <= 0)
			return false;
		n = read(s->data.fd, buf, sizeof(buf));
	} else {
		n = read(s->data.fd, buf, sizeof(buf));
	}
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	/* A terminal refuses its background processes with EIO; vmm_input_kick looks again. */
	if (n < 0 && errno == EIO && s->tty && tcgetpgrp(s->data.fd) > 0 &&
	    tcgetpgrp(s->data.fd) != getpgrp()) {
		s->held_len = 0;
		pthread_mutex_lock(&in->lock);
		in->stalled = true;
		pthread_mutex_unlock(&in->lock);
		return false;
	}
	if (n <= 0) {
		ended(in);
		return false;
	}
	s->held_at = s->held_len = 0;
	for (ssize_t i = 0; i < n; i++)
		typed(in, buf[i]);
	return true;
}

/* Hands on what is held; true when nothing is left. Otherwise a pull will kick the source. */
static bool hand_on(struct vmm_input *in)
{
	struct source *s = &in->src;
	bool empty;

	s->held_at += vmm_input_push(in, s->held + s->held_at, s->held_len - s->held_at);
	pthread_mutex_lock(&in->lock);
	in->stalled = s->held_at < s->held_len;
	empty = !in->stalled;
	/* Pulled empty in between: nobody will kick. */
	if (in->stalled && in->level <= in->capacity / 2) {
		in->stalled = false;
		signal_fd(s->kick.fd);
	}
	pthread_mutex_unlock(&in->lock);
	return empty;
}

static void pump(struct vmm_input *in)
{
	struct source *s = &in->src;
	bool stalled;

	if (s->ended || !hand_on(in))
		return;
	if (fill(in) && !hand_on(in))
		return;
	pthread_mutex_lock(&in->lock);
	stalled = in->stalled;
	pthread_mutex_unlock(&in->lock);
	if (s->ended || stalled)
		return;
	/* One turn of the loop per chunk, so that everything else is served in between. */
	if (s->polled)
		vmm_loop_modify(s->loop, &s->data, EPOLLIN | EPOLLONESHOT);
	else
		signal_fd(s->kick.fd);
}

static void data_ready(struct vmm_source *src, uint32_t events)
{
	struct source *s = (void *)((char *)src - offsetof(struct source, data));

	(void)events;
	pump((void *)((char *)s - offsetof(struct vmm_input, src)));
}

static void kick_ready(struct vmm_source *src, uint32_t events)
{
	struct source *s = (void *)((char *)src - offsetof(struct source, kick));
	uint64_t junk;

	(void)events;
	if (read(src->fd, &junk, sizeof(junk)) < 0)
		return; /* nobody kicked: the event was another source's */
	pump((void *)((char *)s - offsetof(struct vmm_input, src)));
}

int vmm_input_source(struct vmm_input *in, struct vmm_loop *loop, int fd, int escapes, int eventfd_)
{
	struct source *s = &in->src;
	int rc;

	if (s->loop)
		return -EBUSY;
	memset(s, 0, sizeof(*s));
	s->eventfd = eventfd_;
	s->data.ready = data_ready;
	s->kick.ready = kick_ready;
	s->tty = isatty(fd);
	s->escapes = escapes && s->tty;
	s->data.fd = vmm_chan_open(fd, O_RDONLY, &s->chan);
	if (s->data.fd < 0)
		return s->data.fd;
	s->kick.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rc = s->kick.fd < 0 ? -errno : vmm_loop_add(loop, &s->kick, EPOLLIN);
	if (rc)
		goto fail;
	s->loop = loop;
	s->polled = true;
	rc = vmm_loop_add(loop, &s->data, EPOLLIN | EPOLLONESHOT);
	if (rc == -EPERM) { /* a regular file, /dev/null: always ready */
		s->polled = false;
		signal_fd(s->kick.fd);
		rc = 0;
	}
	if (!rc)
		return 0;
	vmm_loop_remove(loop, &s->kick);
fail:
	s->loop = NULL;
	close(s->data.fd);
	if (s->kick.fd >= 0)
		close(s->kick.fd);
	return rc;
}

void vmm_input_unsource(struct vmm_input *in)
{
	struct source *s = &in->src;

	if (!s->loop)
		return;
	if (s->polled)
		vmm_loop_remove(s->loop, &s->data);
	vmm_loop_remove(s->loop, &s->kick);
	pthread_mutex_lock(&in->lock);
	in->stalled = false;
	s->loop = NULL;
	pthread_mutex_unlock(&in->lock);
	close(s->data.fd);
	close(s->kick.fd);
}

void vmm_input_kick(struct vmm_input *in)
{
	pthread_mutex_lock(&in->lock);
	in->stalled = false;
	if (in->src.loop)
		signal_fd(in->src.kick.fd);
	pthread_mutex_unlock(&in->lock);
}
