/* virtio-vsock: one connection, its host socket and the bytes between. */
#include "vsock_conn.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static struct vsock_bucket *bucket(struct vmm_vsock *v, uint32_t guest_port, uint32_t host_port)
{
	return &v->buckets[(guest_port ^ host_port) & 255];
}

static int watch(struct vmm_vsock *v, struct vsock_conn *c, int op, uint32_t events)
{
	/* Edges only: what nobody can take now does not wake the thread over and over. */
	struct epoll_event ev = {
		.events = events | EPOLLIN | EPOLLRDHUP | EPOLLET,
		.data.u64 = (uint64_t)c->serial << 32 | (uint64_t)(c - v->slots),
	};

	return epoll_ctl(v->source.fd, op, c->fd, &ev);
}

static void close_socket(struct vsock_conn *c)
{
	if (c->fd >= 0)
		close(c->fd); /* which also takes it out of the epoll set */
	c->fd = -1;
}

/* One whose host side is over and whose guest never said so. */
static bool evict(struct vmm_vsock *v)
{
	for (uint32_t i = 0; i < VSOCK_SLOTS; i++) {
		struct vsock_conn *c = &v->slots[i];

		if (c->state == VSOCK_OPEN && c->fd < 0) {
			vsock_conn_reset(v, c);
			return true;
		}
	}
	return false;
}

struct vsock_conn *vsock_conn_new(struct vmm_vsock *v, int fd, enum vsock_state state)
{
	struct vsock_conn *c = TAILQ_FIRST(&v->unused);
	const uint32_t serial = ++v->next_serial;

	if (!c) {
		close(fd);
		return NULL;
	}
	*c = (struct vsock_conn){ .fd = fd, .serial = serial, .link = c->link };
	if (watch(v, c, EPOLL_CTL_ADD, 0)) {
		close_socket(c);
		return NULL;
	}
	TAILQ_REMOVE(&v->unused, c, link);
	c->state = state;
	if (state == VSOCK_ASKING) {
		TAILQ_INSERT_TAIL(&v->asking, c, link);
		v->counts.asking++;
	}
	return c;
}

bool vsock_conn_claim(struct vmm_vsock *v, struct vsock_conn *c, uint32_t guest_port,
		      uint32_t host_port)
{
	if (v->counts.conns >= VMM_VSOCK_CONNS && !evict(v))
		return false;
	if (c->state == VSOCK_ASKING) {
		TAILQ_REMOVE(&v->asking, c, link);
		v->counts.asking--;
		c->state = VSOCK_REQUESTED;
	}
	c->guest_port = guest_port;
	c->host_port = host_port;
	c->big = v->nr_big < VMM_VSOCK_BIG_BUFFERS;
	v->nr_big += c->big;
	c->buf_alloc = c->big ? VMM_VSOCK_BUFFER : VMM_VSOCK_SMALL_BUFFER;
	LIST_INSERT_HEAD(bucket(v, guest_port, host_port), c, hashed);
	v->counts.conns++;
	return true;
}

struct vsock_conn *vsock_conn_find(struct vmm_vsock *v, uint32_t guest_port, uint32_t host_port)
{
	struct vsock_conn *c;

	LIST_FOREACH(c, bucket(v, guest_port, host_port), hashed)
		if (c->guest_port == guest_port && c->host_port == host_port)
			return c;
	return NULL;
}

/* The guest knows it no more. */
static void forget(struct vmm_vsock *v, struct vsock_conn *c)
{
	if (c->queued)
		TAILQ_REMOVE(&v->ready, c, link);
	c->queued = false;
	if (c->state == VSOCK_REQUESTED || c->state == VSOCK_OPEN)
		LIST_REMOVE(c, hashed);
}

void vsock_conn_free(struct vmm_vsock *v, struct vsock_conn *c)
{
	forget(v, c);
	if (c->state == VSOCK_ASKING) {
		TAILQ_REMOVE(&v->asking, c, link);
		v->counts.asking--;
	} else if (c->buf_alloc) {
		v->counts.conns--;
		v->nr_big -= c->big;
	}
	close_socket(c);
	free(c->buf);
	c->buf = NULL;
	c->state = VSOCK_FREE;
	TAILQ_INSERT_TAIL(&v->unused, c, link);
	if (v->waiting) /* for a descriptor, perhaps */
		vsock_host_watch(v);
}

void vsock_conn_reset(struct vmm_vsock *v, struct vsock_conn *c)
{
	const struct vsock_rst rst = {
		.src_cid = VSOCK_HOST_CID,
		.src_port = c->host_port,
		.dst_port = c->guest_port,
		.type = VIRTIO_VSOCK_TYPE_STREAM,
	};

	if (!(c->owed & VSOCK_REQUEST)) /* else the guest never heard of it */
		vsock_rst(v, &rst);
	vsock_conn_free(v, c);
}

void vsock_conn_drain(struct vmm_vsock *v, struct vsock_conn *c)
{
	forget(v, c);
	c->state = VSOCK_DRAINING;
	if (!c->used || c->deaf)
		vsock_conn_free(v, c);
}

uint32_t vsock_conn_credit(const struct vsock_conn *c)
{
	const uint32_t under_way = c->sent - c->peer_fwd;

	/* A guest that says nonsense gets nothing. */
	return under_way < c->peer_alloc ? c->peer_alloc - under_way : 0;
}

void vsock_conn_wake(struct vmm_vsock *v, struct vsock_conn *c, uint8_t owed)
{
	c->owed |= owed;
	if (c->queued || (c->state != VSOCK_REQUESTED && c->state != VSOCK_OPEN))
		return;
	if (!c->owed && (c->state != VSOCK_OPEN || !c->readable))
		return;
	c->queued = true;
	TAILQ_INSERT_TAIL(&v->ready, c, link);
}

/* The host took, or never will take, some of the guest's bytes. */
static void forwarded(struct vmm_vsock *v, struct vsock_conn *c, uint32_t n)
{
	c->fwd_cnt += n;
	if (c->fwd_cnt - c->told_fwd >= c->buf_alloc / 2)
		vsock_conn_wake(v, c, VSOCK_CREDIT);
}

static void drop_buffer(struct vmm_vsock *v, struct vsock_conn *c)
{
	const uint32_t used = c->used;

	c->used = 0;
	forwarded(v, c, used);
}

/* Bytes sent: 0 when there is no room, or nobody to send to. */
static uint32_t send_some(struct vmm_vsock *v, struct vsock_conn *c, struct iovec *iov, uint32_t nr)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = nr < 1024 ? nr : 1024 };
	ssize_t n;

	do
		n = sendmsg(c->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n >= 0)
		return (uint32_t)n;
	if (errno != EAGAIN && errno != ENOBUFS && errno != ENOMEM) {
		c->deaf = true;
	} else if (!c->watched) {
		c->watched = true;
		if (watch(v, c, EPOLL_CTL_MOD, EPOLLOUT))
			c->deaf = true;
	}
	return 0;
}

static void keep(struct vsock_conn *c, const struct iovec *iov, uint32_t nr, uint32_t len)
{
	uint32_t at = (c->start + c->used) % c->buf_alloc, n = c->buf_alloc - at;

	n = n < len ? n : len;
	vmm_iov_read(iov, nr, 0, c->buf + at, n);
	vmm_iov_read(iov, nr, n, c->buf, len - n);
	c->used += len;
}

void vsock_conn_write(struct vmm_vsock *v, struct vsock_conn *c, struct iovec *iov, uint32_t nr,
		      uint32_t len)
{
	v->counts.from_guest += len;
	while (len && !c->used && c->fd >= 0 && !c->deaf) {
		const uint32_t n = send_some(v, c, iov, nr);

		if (!n)
			break;
		vmm_iov_skip(&iov, &nr, n);
		len -= n;
		forwarded(v, c, n);
	}
	if (c->fd < 0 || c->deaf) {
		drop_buffer(v, c);
		forwarded(v, c, len);
		vsock_conn_settle(v, c);
		return;
	}
	if (!len)
		return;
	if (!c->buf)
		c->buf = malloc(c->buf_alloc);
	if (c->buf)
		keep(c, iov, nr, len);
	else
		vsock_conn_reset(v, c);
}

void vsock_conn_flush(struct vmm_vsock *v, struct vsock_conn *c)
{
	if (c->watched && !watch(v, c, EPOLL_CTL_MOD, 0))
		c->watched = false;
	while (c->used && !c->deaf) {
		const uint32_t first = c->buf_alloc - c->start;
		struct iovec iov[2] = {
			{ c->buf + c->start, c->used < first ? c->used : first },
			{ c->buf, c->used < first ? 0 : c->used - first },
		};
		const uint32_t n = send_some(v, c, iov, 2);

		if (!n)
			break;
		c->start = (c->start + n) % c->buf_alloc;
		c->used -= n;
		forwarded(v, c, n);
	}
	vsock_conn_settle(v, c);
}

void vsock_conn_settle(struct vmm_vsock *v, struct vsock_conn *c)
{
	uint8_t told = 0;

	if (c->deaf)
		drop_buffer(v, c);
	if (c->state == VSOCK_DRAINING && !c->used)
		vsock_conn_free(v, c);
	if (c->state != VSOCK_OPEN)
		return;
	if (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND && !c->used && !c->shut && c->fd >= 0) {
		c->shut = true;
		shutdown(c->fd, SHUT_WR);
	}
	if (c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV && !c->eof) {
		c->eof = true; /* for the guest, and the host's writes fail */
		c->readable = false;
		if (c->fd >= 0)
			shutdown(c->fd, SHUT_RD);
	}
	if (c->eof && (c->shut || c->deaf)) {
		close_socket(c);
		c->deaf = true;
		c->readable = false;
	}
	told |= c->eof ? VIRTIO_VSOCK_SHUTDOWN_SEND : 0;
	told |= c->deaf ? VIRTIO_VSOCK_SHUTDOWN_RCV : 0;
	if (told & ~c->told_shut)
		vsock_conn_wake(v, c, VSOCK_SHUTDOWN);
}

void vsock_conn_hangup(struct vmm_vsock *v, struct vsock_conn *c)
{
	c->deaf = true;
	if (c->state == VSOCK_REQUESTED)
		vsock_conn_reset(v, c);
	else
		vsock_conn_settle(v, c);
}
