/* A thread that empties a stream into a file descriptor. */
#define _GNU_SOURCE
#include "chario.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK 16384
/* A guest prints byte by byte: what comes within this time is written at once. */
#define GATHER_MS 1
#define GATHER_ENOUGH 4096

static const char limit_line[] = "\n[vmm: console limit reached]\n";

struct vmm_sink {
	struct vmm_stream *stream;
	struct vmm_reader reader;
	enum vmm_chan chan;
	int fd, wake;
	uint64_t limit;
	bool limited;
	_Atomic uint64_t written, dropped;
	_Atomic int error;
	_Atomic bool stop, hurry;
	pthread_t thread;
	uint8_t buf[CHUNK];
};

int vmm_chan_open(int fd, int access, enum vmm_chan *chan)
{
	const int flags = fcntl(fd, F_GETFL);
	unsigned int pty;
	struct stat st;
	char path[40];
	int own;

	if (flags < 0 || fstat(fd, &st))
		return -errno;
	if ((flags & O_PATH) || ((flags & O_ACCMODE) != access && (flags & O_ACCMODE) != O_RDWR))
		return -EBADF;
	*chan = VMM_CHAN_BLOCK;
	if (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode))
		*chan = VMM_CHAN_FILE;
	else if (S_ISSOCK(st.st_mode))
		*chan = VMM_CHAN_SOCKET;
	else if (flags & O_NONBLOCK)
		*chan = VMM_CHAN_NONBLOCK;
	/* Opened anew, the non-blocking flag is ours alone. Opening a pty's master would make
	 * another pty, so that one, which nobody inherits, is changed where it is. */
	if (*chan == VMM_CHAN_BLOCK && !ioctl(fd, TIOCGPTN, &pty)) {
		if (!fcntl(fd, F_SETFL, flags | O_NONBLOCK))
			*chan = VMM_CHAN_NONBLOCK;
	} else if (*chan == VMM_CHAN_BLOCK) {
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		own = open(path, access | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
		if (own >= 0) {
			*chan = VMM_CHAN_NONBLOCK;
			return own;
		}
	}
	own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return own < 0 ? -errno : own;
}

/* Until fd can be written (true), or somebody wants something else (false: look at the flags). */
static bool wait_fd(struct vmm_sink *k, short events, int timeout_ms)
{
	struct pollfd fds[2] = {
		{ .fd = k->wake, .events = POLLIN },
		{ .fd = events ? k->fd : -1, .events = events },
	};
	uint64_t junk;

	if (poll(fds, 2, timeout_ms) <= 0)
		return false;
	if (fds[0].revents && read(k->wake, &junk, sizeof(junk)) < 0)
		return false;
	return fds[1].revents;
}

static ssize_t put_some(struct vmm_sink *k, const uint8_t *data, uint32_t len)
{
	if (k->chan == VMM_CHAN_SOCKET)
		return send(k->fd, data, len, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (k->chan != VMM_CHAN_BLOCK)
		return write(k->fd, data, len);
	if (!wait_fd(k, POLLOUT, -1)) {
		errno = EINTR;
		return -1;
	}
	return write(k->fd, data, 1);
}

/* Writes data; 0, or why not all of it. *at, if any, is data's offset in the stream: it moves
 * on, and the stream's room with it. */
static int put(struct vmm_sink *k, const uint8_t *data, uint32_t len, uint64_t *at)
{
	while (len) {
		const ssize_t n = put_some(k, data, len);

		if (n > 0) {
			data += n;
			len -= (uint32_t)n;
			if (at) {
				*at += (uint64_t)n;
				atomic_fetch_add(&k->written, (uint64_t)n);
				vmm_stream_take(k->stream, &k->reader, *at);
			}
			continue;
		}
		if (n == 0)
			return -EIO;
		if (errno == EAGAIN)
			wait_fd(k, POLLOUT, -1);
		else if (errno != EINTR)
			return -errno;
		if (atomic_load(&k->stop))
			return -ECANCELED;
	}
	return 0;
}

static void put_limited(struct vmm_sink *k, const uint8_t *data, uint32_t len, uint64_t at)
{
	const uint64_t before = atomic_load(&k->written);
	const uint64_t upto = at + len;
	uint32_t n = len;
	int rc = 0;

	if (k->limit && before + len > k->limit)
		n = before < k->limit ? (uint32_t)(k->limit - before) : 0;
	if (!atomic_load(&k->error) && !k->limited)
		rc = put(k, data, n, &at);
	if (!rc && n < len && !k->limited && !atomic_load(&k->error)) {
		k->limited = true;
		rc = put(k, (const uint8_t *)limit_line, sizeof(limit_line) - 1, NULL);
	}
	if (rc && rc != -ECANCELED)
		atomic_store(&k->error, rc);
	atomic_fetch_add(&k->dropped, len - (atomic_load(&k->written) - before));
	vmm_stream_take(k->stream, &k->reader, upto);
}

static void *sink_main(void *arg)
{
	struct vmm_sink *k = arg;
	uint64_t at;
	uint32_t n;

	pthread_setname_np(pthread_self(), "vmm-sink");
	for (;;) {
		n = vmm_stream_peek(k->stream, &k->reader, k->buf, CHUNK, &at);
		if (!n || atomic_load(&k->stop))
			break;
		if (n < GATHER_ENOUGH && !atomic_load(&k->hurry)) {
			wait_fd(k, 0, GATHER_MS);
			n = vmm_stream_peek(k->stream, &k->reader, k->buf, CHUNK, &at);
		}
		put_limited(k, k->buf, n, at);
	}
	return NULL;
}

static void wake(struct vmm_sink *k)
{
	const uint64_t one = 1;

	while (write(k->wake, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

struct vmm_sink *vmm_sink_create(struct vmm_stream *stream, int fd, uint64_t limit)
{
	struct vmm_sink *k = calloc(1, sizeof(*k));
	int rc;

	if (!k)
		return NULL;
	k->stream = stream;
	k->limit = limit;
	k->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	k->fd = k->wake < 0 ? -errno : vmm_chan_open(fd, O_WRONLY, &k->chan);
	rc = k->fd < 0 ? -k->fd : 0;
	if (!rc) {
		vmm_stream_attach(stream, &k->reader, true);
		rc = vmm_thread_start(&k->thread, sink_main, k);
		if (!rc)
			return k;
		vmm_stream_detach(stream, &k->reader);
		close(k->fd);
	}
	if (k->wake >= 0)
		close(k->wake);
	free(k);
	errno = rc;
	return NULL;
}

void vmm_sink_destroy(struct vmm_sink *k)
{
	if (!k)
		return;
	atomic_store(&k->stop, true);
	vmm_stream_stop(k->stream, &k->reader);
	wake(k);
	pthread_join(k->thread, NULL);
	vmm_stream_detach(k->stream, &k->reader);
	close(k->fd);
	close(k->wake);
	free(k);
}

int vmm_sink_flush(struct vmm_sink *k, int timeout_ms)
{
	int rc;

	atomic_store(&k->hurry, true);
	wake(k);
	rc = vmm_stream_drain(k->stream, &k->reader, timeout_ms);
	atomic_store(&k->hurry, false);
	return rc;
}

int vmm_sink_error(const struct vmm_sink *k)
{
	return atomic_load(&k->error);
}

uint64_t vmm_sink_written(const struct vmm_sink *k)
{
	return atomic_load(&k->written);
}

uint64_t vmm_sink_dropped(const struct vmm_sink *k)
{
	return atomic_load(&k->dropped) + vmm_stream_lost(k->stream, &k->reader) +
	       (atomic_load(&k->stop) ? vmm_stream_backlog(k->stream, &k->reader) : 0);
}
