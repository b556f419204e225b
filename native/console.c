/* virtio-console, one port. Nobody is ever waited for: without room in the stream the guest's
 * buffers stay in its ring, without input they stay empty. */
#include "console.h"

#include <errno.h>
#include <stdlib.h>

/* Bytes handed to the stream at a time, and before other sources get a turn: a chain may hold
 * 4 GiB. */
#define PIECE 16384
#define TURN (16 * PIECE)

enum { RX, TX, NR_QUEUES };

struct port {
	struct vmm_service service;
	struct vmm_listener listener; /* there is room, or input */
	struct vmm_chain chain;
	struct iovec *iov;
	_Atomic uint64_t bytes;
};

struct vmm_console {
	struct port ports[NR_QUEUES];
	struct vmm_stream *out;
	struct vmm_input *in;
	uint16_t queue_size;
	/* The chain being transmitted: what is left of it. */
	bool sending;
	struct iovec *left;
	uint32_t nr_left;
};

static struct vmm_console *console_of(struct vmm_service *s, int queue)
{
	return (struct vmm_console *)((uint8_t *)s - offsetof(struct vmm_console, ports) -
				      (size_t)queue * sizeof(struct port));
}

/* Hands over part of the chain in flight: VMM_VQ_CHAIN when it is finished. */
static int transmit(struct vmm_console *c)
{
	struct port *tx = &c->ports[TX];
	uint32_t turn = TURN;

	while (c->nr_left) {
		uint32_t n = PIECE, taken;

		if (n > c->left->iov_len)
			n = (uint32_t)c->left->iov_len;
		if (n > turn) {
			vmm_service_again(&tx->service);
			return VMM_SERVICE_WAIT;
		}
		/* SAFETY: the iov is RAM, and n is within it. */
		taken = c->out ? vmm_stream_offer(c->out, c->left->iov_base, n) : n;
		turn -= taken;
		tx->bytes += taken;
		vmm_iov_skip(&c->left, &c->nr_left, taken);
		if (taken < n)
			return VMM_SERVICE_WAIT; /* the listener hears of room */
	}
	c->sending = false;
	vmm_vq_push(tx->service.vq, &tx->chain, 0);
	return VMM_VQ_CHAIN;
}

static int serve_tx(struct vmm_service *s)
{
	struct vmm_console *c = console_of(s, TX);
	struct port *tx = &c->ports[TX];

	if (!c->sending) {
		const int rc = vmm_vq_pop(s->vq, &tx->chain);

		if (rc != VMM_VQ_CHAIN)
			return rc;
		c->sending = true;
		c->left = tx->chain.iov;
		c->nr_left = tx->chain.nr_read;
	}
	return transmit(c);
}

static int serve_rx(struct vmm_service *s)
{
	struct vmm_console *c = console_of(s, RX);
	struct port *rx = &c->ports[RX];
	uint64_t got = 0;
	int rc;

	if (!c->in || !vmm_input_level(c->in))
		return VMM_SERVICE_WAIT;
	rc = vmm_vq_pop(s->vq, &rx->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!rx->chain.write_len) {
		/* virtio-v1.3 §5.3.6: receive buffers are for the device to write. */
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	for (uint32_t i = 0; i < rx->chain.nr_write; i++) {
		const struct iovec *iov = &rx->chain.iov[rx->chain.nr_read + i];
		/* SAFETY: the iov is RAM; the input writes no more than its length. */
		const uint32_t n = vmm_input_pull(c->in, iov->iov_base, (uint32_t)iov->iov_len);

		got += n;
		if (n < iov->iov_len)
			break;
	}
	rx->bytes += got;
	vmm_vq_push(s->vq, &rx->chain, got);
	return VMM_VQ_CHAIN;
}

/* Any thread: room in the stream, or something in the input. */
static void woken(struct vmm_listener *l)
{
	struct port *port = (struct port *)((uint8_t *)l - offsetof(struct port, listener));

	vmm_service_again(&port->service);
}

struct vmm_console *vmm_console_create(struct vmm_loop *loop, struct vmm_stream *out,
				       struct vmm_input *in, uint16_t queue_size)
{
	struct vmm_console *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->out = out;
	c->in = in;
	c->queue_size = queue_size;
	/* Linux waits for each 16 bytes it writes with its CPU (hvc_console): a thread switch for
	 * each of them would take longer than anything else. */
	c->ports[TX].service.direct = true;
	for (int i = 0; i < NR_QUEUES; i++) {
		struct port *port = &c->ports[i];

		port->chain.iov = port->iov = calloc(queue_size, sizeof(*port->iov));
		if (!port->iov) {
			vmm_console_destroy(c);
			return NULL;
		}
		vmm_service_init(&port->service, loop, i == RX ? serve_rx : serve_tx);
		port->listener.notify = woken;
	}
	return c;
}

void vmm_console_destroy(struct vmm_console *c)
{
	if (!c)
		return;
	vmm_console_stop(c);
	for (int i = 0; i < NR_QUEUES; i++) {
		vmm_service_fini(&c->ports[i].service);
		free(c->ports[i].iov);
	}
	free(c);
}

int vmm_console_start(struct vmm_console *c, const struct vmm_service_config *config)
{
	struct port *port;
	int rc;

	if (config->index >= NR_QUEUES || config->vq.size > c->queue_size)
		return -EINVAL;
	port = &c->ports[config->index];
	rc = vmm_service_start(&port->service, config);
	if (rc)
		return rc;
	if (config->index == RX && c->in)
		vmm_input_listen(c->in, &port->listener);
	if (config->index == TX && c->out)
		vmm_stream_listen(c->out, &port->listener);
	return 0;
}

void vmm_console_stop(struct vmm_console *c)
{
	if (c->in)
		vmm_input_unlisten(c->in, &c->ports[RX].listener);
	if (c->out)
		vmm_stream_unlisten(c->out, &c->ports[TX].listener);
	for (int i = 0; i < NR_QUEUES; i++)
		vmm_service_stop(&c->ports[i].service);
	c->sending = false;
}

uint64_t vmm_console_sent(const struct vmm_console *c)
{
	return c->ports[TX].bytes;
}

uint64_t vmm_console_received(const struct vmm_console *c)
{
	return c->ports[RX].bytes;
}
