/* virtio-vsock: the device, its queues and the sockets it watches. */
#include "timer.h"
#include "vsock_conn.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { RX, TX, EVENT, NR_QUEUES };

/* Sockets looked at before other sources of the I/O thread get a turn. */
#define BATCH 64
/* How long the last bytes of a guest that is gone may take. */
#define LAST_WORDS_NS 1000000000ULL

static void socket_event(struct vmm_vsock *v, struct vsock_conn *c, uint32_t events)
{
	if (c->state == VSOCK_ASKING) {
		if (events & (EPOLLHUP | EPOLLERR))
			vsock_conn_free(v, c);
		else
			vsock_host_ask(v, c);
		return;
	}
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR) && !c->eof)
		c->readable = true;
	if (events & (EPOLLHUP | EPOLLERR))
		vsock_conn_hangup(v, c);
	else if (events & EPOLLOUT)
		vsock_conn_flush(v, c);
	vsock_conn_wake(v, c, 0);
}

static void ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_vsock *v =
		(struct vmm_vsock *)((uint8_t *)source - offsetof(struct vmm_vsock, source));
	struct epoll_event events[BATCH];
	const int n = epoll_wait(source->fd, events, BATCH, 0);

	(void)epoll_events;
	for (int i = 0; i < n; i++) {
		const uint32_t slot = (uint32_t)events[i].data.u64;

		if (slot == VSOCK_LISTENER)
			vsock_host_accept(v);
		/* An earlier event may have ended it, or given the slot to another one. */
		else if (v->slots[slot].state != VSOCK_FREE &&
			 v->slots[slot].serial == events[i].data.u64 >> 32)
			socket_event(v, &v->slots[slot], events[i].events);
	}
	vsock_rx_pump(v);
}

static void destroy(struct vmm_vsock *v)
{
	for (int i = 0; i < VSOCK_HELD; i++)
		free(v->held[i].iov);
	free(v->tx_iov);
	free(v->event_iov);
	if (v->source.fd >= 0)
		close(v->source.fd);
	free(v);
}

static bool allocate(struct vmm_vsock *v)
{
	bool all;

	v->tx_iov = calloc(v->queue_size, sizeof(*v->tx_iov));
	v->event_iov = calloc(v->queue_size, sizeof(*v->event_iov));
	all = v->tx_iov && v->event_iov;
	for (int i = 0; i < VSOCK_HELD; i++) {
		v->held[i].iov = calloc(v->queue_size, sizeof(*v->held[i].iov));
		all = all && v->held[i].iov;
	}
	return all;
}

struct vmm_vsock *vmm_vsock_create(struct vmm_loop *loop, uint64_t cid, int listen_fd,
				   const char *path, uint16_t queue_size)
{
	struct vmm_vsock *v = queue_size <= VSOCK_QUEUE_MAX ? calloc(1, sizeof(*v)) : NULL;
	int rc;

	if (!v)
		return NULL;
	v->loop = loop;
	v->cid = cid;
	v->listen_fd = listen_fd;
	v->queue_size = queue_size;
	v->path_len = strnlen(path, sizeof(v->path) - 1);
	memcpy(v->path, path, v->path_len);
	TAILQ_INIT(&v->ready);
	TAILQ_INIT(&v->asking);
	TAILQ_INIT(&v->unused);
	for (int i = 0; i < VSOCK_SLOTS; i++)
		TAILQ_INSERT_TAIL(&v->unused, &v->slots[i], link);
	v->source.ready = ready;
	v->source.fd = epoll_create1(EPOLL_CLOEXEC);
	rc = v->source.fd < 0 ? -errno : vsock_host_watch(v);
	if (!rc && !allocate(v))
		rc = -ENOMEM;
	if (!rc)
		rc = vmm_loop_add(loop, &v->source, EPOLLIN);
	if (rc) {
		destroy(v);
		errno = -rc;
		return NULL;
	}
	vmm_service_init(&v->rx, loop, vsock_rx_serve);
	vmm_service_init(&v->tx, loop, vsock_tx_serve);
	vmm_service_init(&v->event, loop, vsock_event_serve);
	v->tx.flush = vsock_tx_flush;
	return v;
}

/* Everything from here on runs on the I/O thread, where nobody else looks at the device. */

static void end_connections(struct vmm_vsock *v)
{
	for (int i = 0; i < VSOCK_SLOTS; i++) {
		struct vsock_conn *c = &v->slots[i];

		/* What a guest sent before it went is not lost. */
		if (c->state == VSOCK_OPEN || c->state == VSOCK_REQUESTED)
			vsock_conn_drain(v, c);
	}
	v->nr_rsts = v->rst_at = 0;
	if (v->tx_held) {
		v->tx_held = false;
		if (v->tx.vq)
			vmm_service_again(&v->tx);
	}
}

static void stop(void *arg)
{
	struct vmm_vsock *v = arg;

	vmm_service_stop(&v->rx);
	vmm_service_stop(&v->tx);
	vmm_service_stop(&v->event);
	end_connections(v);
	v->nr_held = v->held_at = 0;
	v->tell_reset = false;
}

/* Sends what is buffered; whether something is left. */
static bool flush_all(struct vmm_vsock *v)
{
	bool left = false;

	for (int i = 0; i < VSOCK_SLOTS; i++) {
		struct vsock_conn *c = &v->slots[i];

		if (c->state == VSOCK_DRAINING)
			vsock_conn_flush(v, c);
		left |= c->state == VSOCK_DRAINING;
	}
	return left;
}

static void close_all(void *arg)
{
	struct vmm_vsock *v = arg;
	const uint64_t deadline = vmm_now() + LAST_WORDS_NS;
	struct epoll_event events[BATCH];
	uint64_t now;

	stop(v);
	v->waiting = false;
	while (flush_all(v) && (now = vmm_now()) < deadline)
		epoll_wait(v->source.fd, events, BATCH, (int)((deadline - now) / 1000000) + 1);
	for (int i = 0; i < VSOCK_SLOTS; i++)
		if (v->slots[i].state != VSOCK_FREE)
			vsock_conn_free(v, &v->slots[i]);
}

void vmm_vsock_destroy(struct vmm_vsock *v)
{
	if (!v)
		return;
	vmm_loop_remove(v->loop, &v->source);
	vmm_loop_call(v->loop, close_all, v);
	vmm_service_fini(&v->rx);
	vmm_service_fini(&v->tx);
	vmm_service_fini(&v->event);
	destroy(v);
}

struct start {
	struct vmm_vsock *v;
	const struct vmm_service_config *config;
	int rc;
};

static void start(void *arg)
{
	struct start *s = arg;
	struct vmm_vsock *v = s->v;
	struct vmm_service *const services[NR_QUEUES] = { &v->rx, &v->tx, &v->event };
	const bool running = vsock_running(v);
	struct vsock_conn *c, *next;

	s->rc = vmm_service_start(services[s->config->index], s->config);
	if (running || !vsock_running(v))
		return;
	for (c = TAILQ_FIRST(&v->asking); c; c = next) {
		next = TAILQ_NEXT(c, link);
		vsock_host_ask(v, c);
	}
	if (v->listen_fd >= 0)
		vsock_host_accept(v);
	vsock_rx_pump(v);
}

int vmm_vsock_start(struct vmm_vsock *v, const struct vmm_service_config *config)
{
	struct start s = { .v = v, .config = config };

	if (config->index >= NR_QUEUES || config->vq.size > v->queue_size)
		return -EINVAL;
	vmm_loop_call(v->loop, start, &s);
	return s.rc;
}

void vmm_vsock_stop(struct vmm_vsock *v)
{
	vmm_loop_call(v->loop, stop, v);
}

struct stop_queue {
	struct vmm_vsock *v;
	uint32_t index;
};

static void stop_queue(void *arg)
{
	const struct stop_queue *s = arg;
	struct vmm_vsock *v = s->v;

	if (s->index == RX) {
		vmm_service_stop(&v->rx);
		v->nr_held = v->held_at = 0;
	} else if (s->index == TX) {
		vmm_service_stop(&v->tx);
		v->tx_held = false;
	} else {
		vmm_service_stop(&v->event);
	}
}

void vmm_vsock_stop_queue(struct vmm_vsock *v, uint32_t index)
{
	struct stop_queue s = { v, index };

	vmm_loop_call(v->loop, stop_queue, &s);
}

struct adopt {
	struct vmm_vsock *v;
	int fd;
};

static void adopt(void *arg)
{
	struct adopt *a = arg;

	vsock_host_adopt(a->v, a->fd);
	vsock_rx_pump(a->v);
}

int vmm_vsock_adopt(struct vmm_vsock *v, int fd)
{
	struct adopt a = { v, fd };

	vmm_loop_call(v->loop, adopt, &a);
	return 0;
}

struct transport_reset {
	struct vmm_vsock *v;
	uint64_t cid;
};

static void transport_reset(void *arg)
{
	struct transport_reset *r = arg;
	struct vmm_vsock *v = r->v;

	end_connections(v);
	v->cid = r->cid;
	v->tell_reset = v->event.vq;
	if (v->tell_reset)
		vmm_service_run(&v->event);
}

void vmm_vsock_transport_reset(struct vmm_vsock *v, uint64_t cid)
{
	struct transport_reset r = { v, cid };

	vmm_loop_call(v->loop, transport_reset, &r);
}

struct count {
	struct vmm_vsock *v;
	struct vmm_vsock_counts *out;
};

static void count(void *arg)
{
	struct count *c = arg;

	*c->out = c->v->counts;
}

void vmm_vsock_count(struct vmm_vsock *v, struct vmm_vsock_counts *out)
{
	struct count c = { v, out };

	vmm_loop_call(v->loop, count, &c);
}
