/* What feeds an input: a terminal, a pipe, a socket, a file, served by the I/O thread. */
#define _GNU_SOURCE
#include "chario.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK 4096
#define ESCAPE 0x01 /* Ctrl-A */

/* All but `loop` and the descriptors belongs to the I/O thread. */
struct vmm_feed {
	struct vmm_source data, kick;
	struct vmm_input *in;
	struct vmm_loop *loop;
	enum vmm_chan chan;
	bool polled; /* epoll knows the descriptor; a file it does not */
	bool tty, escapes, prefix, ended;
	int eventfd;
	uint8_t held[2 * CHUNK]; /* read, not yet accepted: Ctrl-A may come out one byte late */
	uint32_t held_at, held_len;
};

/* One typed byte into held[]. */
static void typed(struct vmm_feed *f, uint8_t c)
{
	const bool prefix = f->prefix;

	if (!f->escapes || (!prefix && c != ESCAPE)) {
		f->held[f->held_len++] = c;
		return;
	}
	f->prefix = !prefix;
	if (!prefix)
		return;
	switch (c) {
	case 'x':
	case 'X':
		vmm_input_raise(f->in, VMM_INPUT_QUIT, f->eventfd);
		break;
	case 'h':
	case '?':
		vmm_input_raise(f->in, VMM_INPUT_HELP, f->eventfd);
		break;
	case 'b':
		vmm_input_break(f->in);
		break;
	default: /* a shell's own Ctrl-A goes on working, one key late */
		f->held[f->held_len++] = ESCAPE;
		if (c != 'a' && c != ESCAPE)
			f->held[f->held_len++] = c;
	}
}

static ssize_t read_some(struct vmm_feed *f, uint8_t *buf, size_t len)
{
	struct pollfd p = { .fd = f->data.fd, .events = POLLIN };

	if (f->chan == VMM_CHAN_SOCKET)
		return recv(f->data.fd, buf, len, MSG_DONTWAIT);
	if (f->chan == VMM_CHAN_BLOCK && poll(&p, 1, 0) <= 0) {
		errno = EAGAIN;
		return -1;
	}
	return read(f->data.fd, buf, len);
}

/* A terminal refuses a background process with EIO; once in the foreground, it is kicked. */
static bool in_background(const struct vmm_feed *f)
{
	const pid_t foreground = f->tty ? tcgetpgrp(f->data.fd) : -1;

	return foreground > 0 && foreground != getpgrp();
}

/* Hands on what is held; true when nothing is left. Otherwise room kicks the feed. */
static bool hand_on(struct vmm_feed *f)
{
	f->held_at += vmm_input_push(f->in, f->held + f->held_at, f->held_len - f->held_at);
	if (f->held_at == f->held_len)
		return true;
	vmm_input_want_room(f->in, f->kick.fd);
	return false;
}

static void kick(struct vmm_feed *f)
{
	const uint64_t one = 1;

	while (write(f->kick.fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Reads once, if what was read before is gone. */
static void pump(struct vmm_feed *f)
{
	uint8_t buf[CHUNK];
	ssize_t n;

	if (f->ended || !hand_on(f))
		return;
	n = read_some(f, buf, sizeof(buf));
	if (n < 0 && errno == EIO && in_background(f))
		return;
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
		f->ended = true;
		vmm_input_close(f->in);
		vmm_input_raise(f->in, VMM_INPUT_EOF, f->eventfd);
		return;
	}
	f->held_at = f->held_len = 0;
	for (ssize_t i = 0; i < n; i++)
		typed(f, buf[i]);
	if (!hand_on(f))
		return;
	/* One turn of the loop per chunk, so that everything else is served in between. */
	if (f->polled)
		vmm_loop_modify(f->loop, &f->data, EPOLLIN | EPOLLONESHOT);
	else
		kick(f);
}

static void data_ready(struct vmm_source *src, uint32_t events)
{
	(void)events;
	pump((void *)((char *)src - offsetof(struct vmm_feed, data)));
}

static void kick_ready(struct vmm_source *src, uint32_t events)
{
	uint64_t junk;

	(void)events;
	if (read(src->fd, &junk, sizeof(junk)) < 0)
		return; /* nobody kicked: the event was another source's */
	pump((void *)((char *)src - offsetof(struct vmm_feed, kick)));
}

void vmm_feed_kick(struct vmm_feed *f)
{
	kick(f);
}

int vmm_feed_create(struct vmm_feed **feed, struct vmm_input *in, struct vmm_loop *loop, int fd,
		    int escapes, int eventfd_)
{
	struct vmm_feed *f = calloc(1, sizeof(*f));
	int rc;

	if (!f)
		return -ENOMEM;
	f->in = in;
	f->loop = loop;
	f->eventfd = eventfd_;
	f->data.ready = data_ready;
	f->kick.ready = kick_ready;
	f->tty = isatty(fd);
	f->escapes = escapes && f->tty;
	f->polled = true;
	f->kick.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	f->data.fd = f->kick.fd < 0 ? -errno : vmm_chan_open(fd, O_RDONLY, &f->chan);
	rc = f->data.fd < 0 ? f->data.fd : vmm_loop_add(loop, &f->kick, EPOLLIN);
	if (!rc) {
		rc = vmm_loop_add(loop, &f->data, EPOLLIN | EPOLLONESHOT);
		if (rc == -EPERM) { /* a regular file, /dev/null: always ready */
			f->polled = false;
			kick(f);
			rc = 0;
		}
		if (rc)
			vmm_loop_remove(loop, &f->kick);
	}
	if (!rc) {
		*feed = f;
		return 0;
	}
	if (f->data.fd >= 0)
		close(f->data.fd);
	if (f->kick.fd >= 0)
		close(f->kick.fd);
	free(f);
	return rc;
}

void vmm_feed_destroy(struct vmm_feed *f)
{
	if (!f)
		return;
	if (f->polled)
		vmm_loop_remove(f->loop, &f->data);
	vmm_loop_remove(f->loop, &f->kick);
	vmm_input_want_room(f->in, -1);
	close(f->data.fd);
	close(f->kick.fd);
	free(f);
}
