/* One direction of one stream, between a virtio-serial port and a pipe or terminal. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

void channel_start(struct channel *c, int from, int to, uint64_t *input_taken)
{
	*c = (struct channel){ .from = from, .to = to, .end = UINT64_MAX,
			       .input_taken = input_taken, .buf = malloc(CHANNEL_SIZE) };
	if (!c->buf)
		die("out of memory");
}

bool channel_open(const struct channel *c)
{
	return c->buf && c->to >= 0;
}

void channel_close(struct channel *c)
{
	/* The ports stay open: closing one would throw away what the host has yet to take. */
	int ours = c->input_taken ? c->to : c->from;

	if (ours >= 0)
		close(ours);
	c->from = c->to = -1;
}

/* False when there is nothing more to come. */
static bool channel_fill(struct channel *c)
{
	ssize_t n = read(c->from, c->buf, CHANNEL_SIZE);

	if (n > 0) {
		c->start = 0;
		c->fill = n;
		c->total += n;
		if (c->input_taken)
			*c->input_taken += n;
	}
	/* The last writer is gone (EIO on a pty). */
	return n > 0 || c->input_taken || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

static bool channel_drain(struct channel *c)
{
	ssize_t n = write(c->to, c->buf + c->start, c->fill);

	if (n > 0) {
		c->start += n;
		c->fill -= n;
	} else if (n < 0 && errno != EAGAIN && errno != EINTR) {
		c->to_broken = true;
		if (c->input_taken)
			ctl_send("input-closed");
	}
	return n > 0;
}

bool channel_step(struct channel *c)
{
	bool moved = false;

	if (!channel_open(c))
		return false;
	if (c->fill == 0 && c->from >= 0) {
		if (!channel_fill(c)) {
			channel_close(c);
			return true;
		}
		moved = c->fill > 0;
	}
	if (c->fill > 0 && !c->to_broken)
		moved |= channel_drain(c);
	if (c->to_broken)
		c->fill = 0;
	if (c->input_taken && c->fill == 0 && c->total >= c->end) {
		channel_close(c);
		moved = true;
	}
	return moved;
}
