/* virtio-vsock: what the guest receives: packets it is owed, bytes of the host, events. */
#include "vsock_conn.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* Bytes of one connection before the next one's turn. */
#define TURN 65536
/* Parts of guest memory that one system call fills; one buffer never has more. */
#define PARTS VSOCK_QUEUE_MAX

static struct vmm_vsock *of(struct vmm_service *s)
{
	return (struct vmm_vsock *)((uint8_t *)s - offsetof(struct vmm_vsock, rx));
}

static struct vmm_chain *held(struct vmm_vsock *v, uint32_t nr)
{
	return &v->held[(v->held_at + nr) % VSOCK_HELD].chain;
}

/* One more buffer out of the ring: a verdict. */
static int hold(struct vmm_vsock *v)
{
	struct vsock_held *h = &v->held[(v->held_at + v->nr_held) % VSOCK_HELD];
	int rc;

	h->chain.iov = h->iov;
	rc = vmm_vq_pop(v->rx.vq, &h->chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (h->chain.write_len < VSOCK_HDR) {
		vmm_vq_refuse(v->rx.vq);
		return vmm_vq_broken(v->rx.vq);
	}
	v->nr_held++;
	return VMM_VQ_CHAIN;
}

/* The first buffer goes back with a header in it, and len bytes that are there already. */
static void give(struct vmm_vsock *v, const struct virtio_vsock_hdr *hdr)
{
	const struct vmm_chain *chain = held(v, 0);

	vmm_iov_write(chain->iov + chain->nr_read, chain->nr_write, 0, hdr, sizeof(*hdr));
	vmm_vq_push(v->rx.vq, chain, sizeof(*hdr) + le32toh(hdr->len));
	v->held_at = (v->held_at + 1) % VSOCK_HELD;
	v->nr_held--;
}

static void give_packet(struct vmm_vsock *v, struct vsock_conn *c, uint16_t op, uint32_t flags,
			uint32_t len)
{
	const struct virtio_vsock_hdr hdr = {
		.src_cid = htole64(VSOCK_HOST_CID),
		.dst_cid = htole64(v->cid),
		.src_port = htole32(c->host_port),
		.dst_port = htole32(c->guest_port),
		.len = htole32(len),
		.type = htole16(VIRTIO_VSOCK_TYPE_STREAM),
		.op = htole16(op),
		.flags = htole32(flags),
		.buf_alloc = htole32(c->buf_alloc),
		.fwd_cnt = htole32(c->fwd_cnt),
	};

	/* Every packet tells it. */
	c->told_fwd = c->fwd_cnt;
	c->owed &= (uint8_t)~VSOCK_CREDIT;
	give(v, &hdr);
}

void vsock_rst(struct vmm_vsock *v, const struct vsock_rst *rst)
{
	if (v->nr_rsts == VSOCK_RSTS)
		return;
	v->rsts[(v->rst_at + v->nr_rsts) % VSOCK_RSTS] = *rst;
	v->nr_rsts++;
	v->counts.resets++;
}

static void give_rst(struct vmm_vsock *v)
{
	const struct vsock_rst *rst = &v->rsts[v->rst_at];
	const struct virtio_vsock_hdr hdr = {
		.src_cid = htole64(rst->src_cid),
		.dst_cid = htole64(v->cid),
		.src_port = htole32(rst->src_port),
		.dst_port = htole32(rst->dst_port),
		.type = htole16(rst->type),
		.op = htole16(VIRTIO_VSOCK_OP_RST),
	};

	give(v, &hdr);
	v->rst_at = (v->rst_at + 1) % VSOCK_RSTS;
	if (--v->nr_rsts < VSOCK_RSTS_OF_GUEST && v->tx_held) {
		v->tx_held = false;
		vmm_service_again(&v->tx);
	}
}

/* The parts of held buffers behind their headers, for up to `want` bytes; how many bytes those
 * are. 0: the driver offered no room for any, and the queue is broken. */
static uint32_t gather(struct vmm_vsock *v, uint32_t want, struct iovec *parts, uint32_t *nr_parts)
{
	uint32_t nr = 0, total = 0;

	for (uint32_t i = 0; total < want && i < VSOCK_HELD; i++) {
		struct iovec *part = parts + nr;
		const struct vmm_chain *chain;
		uint64_t room;
		uint32_t n;

		if (i == v->nr_held && hold(v) != VMM_VQ_CHAIN)
			break;
		chain = held(v, i);
		if (chain->nr_write > PARTS - nr)
			break;
		room = chain->write_len - VSOCK_HDR;
		n = chain->nr_write;
		memcpy(part, chain->iov + chain->nr_read, n * sizeof(*part));
		vmm_iov_skip(&part, &n, VSOCK_HDR);
		memmove(parts + nr, part, n * sizeof(*part));
		if (room > want - total) {
			vmm_iov_cut(parts + nr, &n, room - (want - total));
			room = want - total;
		}
		nr += n;
		total += (uint32_t)room;
	}
	if (!total)
		vmm_vq_refuse(v->rx.vq);
	*nr_parts = nr;
	return total;
}

/* Moves bytes of the host into the guest's buffers; false when there were none. */
static bool give_data(struct vmm_vsock *v, struct vsock_conn *c)
{
	const uint32_t credit = vsock_conn_credit(c);
	struct iovec parts[PARTS];
	struct msghdr msg = { .msg_iov = parts };
	uint32_t nr, left;
	ssize_t n;

	if (!gather(v, credit < TURN ? credit : TURN, parts, &nr))
		return false;
	msg.msg_iovlen = nr;
	/* SAFETY: the parts are RAM; the kernel writes no more than their lengths. */
	do
		n = recvmsg(c->fd, &msg, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n <= 0) {
		c->readable = false;
		if (n == 0 || (errno != EAGAIN && errno != ENOMEM)) {
			c->eof = true;
			c->deaf |= n < 0;
			vsock_conn_settle(v, c);
		}
		return false;
	}
	v->counts.to_guest += (uint64_t)n;
	c->sent += (uint32_t)n;
	for (left = (uint32_t)n; left;) {
		const uint64_t room = held(v, 0)->write_len - VSOCK_HDR;
		const uint32_t len = left < room ? left : (uint32_t)room;

		give_packet(v, c, VIRTIO_VSOCK_OP_RW, 0, len);
		left -= len;
	}
	return true;
}

static bool owes(struct vsock_conn *c, uint8_t what)
{
	const bool does = c->owed & what;

	c->owed &= (uint8_t)~what;
	return does;
}

/* One packet, or some with data, of this connection; false when it has none. */
static bool give_next(struct vmm_vsock *v, struct vsock_conn *c)
{
	if (owes(c, VSOCK_REQUEST)) {
		give_packet(v, c, VIRTIO_VSOCK_OP_REQUEST, 0, 0);
		return true;
	}
	if (owes(c, VSOCK_RESPONSE)) {
		give_packet(v, c, VIRTIO_VSOCK_OP_RESPONSE, 0, 0);
		return true;
	}
	if (c->state == VSOCK_OPEN && c->readable && vsock_conn_credit(c) && give_data(v, c))
		return true;
	if (vmm_vq_broken(v->rx.vq))
		return false;
	if (owes(c, VSOCK_SHUTDOWN)) {
		c->told_shut |= c->eof ? VIRTIO_VSOCK_SHUTDOWN_SEND : 0;
		c->told_shut |= c->deaf ? VIRTIO_VSOCK_SHUTDOWN_RCV : 0;
		give_packet(v, c, VIRTIO_VSOCK_OP_SHUTDOWN, c->told_shut, 0);
		return true;
	}
	if (owes(c, VSOCK_CREDIT)) {
		give_packet(v, c, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 0, 0);
		return true;
	}
	if (c->state == VSOCK_OPEN && c->readable && !vsock_conn_credit(c) && !c->credit_asked) {
		c->credit_asked = true;
		give_packet(v, c, VIRTIO_VSOCK_OP_CREDIT_REQUEST, 0, 0);
		return true;
	}
	return false;
}

int vsock_rx_serve(struct vmm_service *s)
{
	struct vmm_vsock *v = of(s);
	struct vsock_conn *c;
	int rc;

	for (;;) {
		if (vmm_vq_broken(s->vq))
			return vmm_vq_broken(s->vq);
		c = TAILQ_FIRST(&v->ready);
		if (!c && !v->nr_rsts)
			return VMM_SERVICE_WAIT;
		if (!v->nr_held) {
			rc = hold(v);
			if (rc != VMM_VQ_CHAIN)
				return rc;
		}
		if (v->nr_rsts) {
			give_rst(v);
			return VMM_VQ_CHAIN;
		}
		TAILQ_REMOVE(&v->ready, c, link);
		c->queued = false;
		if (give_next(v, c)) {
			vsock_conn_wake(v, c, 0);
			return VMM_VQ_CHAIN;
		}
	}
}

void vsock_rx_pump(struct vmm_vsock *v)
{
	if (v->nr_rsts || !TAILQ_EMPTY(&v->ready))
		vmm_service_run(&v->rx);
}

int vsock_event_serve(struct vmm_service *s)
{
	struct vmm_vsock *v =
		(struct vmm_vsock *)((uint8_t *)s - offsetof(struct vmm_vsock, event));
	const struct virtio_vsock_event event = {
		.id = htole32(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET),
	};
	struct vmm_chain chain = { .iov = v->event_iov };
	int rc;

	if (!v->tell_reset)
		return VMM_SERVICE_WAIT;
	rc = vmm_vq_pop(s->vq, &chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (chain.write_len < sizeof(event)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	vmm_iov_write(chain.iov + chain.nr_read, chain.nr_write, 0, &event, sizeof(event));
	vmm_vq_push(s->vq, &chain, sizeof(event));
	v->tell_reset = false;
	return VMM_VQ_CHAIN;
}
