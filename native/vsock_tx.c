/* virtio-vsock: what the guest sends. virtio-v1.3 §5.10.6. */
#include "vsock_conn.h"

#include <endian.h>

/* A packet's header, copied out of guest memory once and in host byte order; its payload. */
struct packet {
	uint64_t src_cid, dst_cid;
	uint32_t guest_port, host_port, len, flags, buf_alloc, fwd_cnt;
	uint16_t type, op;
	struct iovec *iov;
	uint32_t nr_iov;
};

static bool parse(const struct vmm_chain *chain, struct packet *p)
{
	struct virtio_vsock_hdr hdr;

	if (vmm_iov_read(chain->iov, chain->nr_read, 0, &hdr, sizeof(hdr)) != sizeof(hdr))
		return false;
	*p = (struct packet){
		.src_cid = le64toh(hdr.src_cid),
		.dst_cid = le64toh(hdr.dst_cid),
		.guest_port = le32toh(hdr.src_port),
		.host_port = le32toh(hdr.dst_port),
		.len = le32toh(hdr.len),
		.flags = le32toh(hdr.flags),
		.buf_alloc = le32toh(hdr.buf_alloc),
		.fwd_cnt = le32toh(hdr.fwd_cnt),
		.type = le16toh(hdr.type),
		.op = le16toh(hdr.op),
		.iov = chain->iov,
		.nr_iov = chain->nr_read,
	};
	vmm_iov_skip(&p->iov, &p->nr_iov, sizeof(hdr));
	return p->len <= chain->read_len - sizeof(hdr);
}

/* Nobody there, or nothing that is understood. */
static void refuse(struct vmm_vsock *v, const struct packet *p)
{
	const struct vsock_rst rst = {
		.src_cid = p->dst_cid,
		.src_port = p->host_port,
		.dst_port = p->guest_port,
		.type = p->type,
	};

	if (p->op != VIRTIO_VSOCK_OP_RST)
		vsock_rst(v, &rst);
}

static void request(struct vmm_vsock *v, const struct packet *p)
{
	struct vsock_conn *c = vsock_host_connect(v, p->guest_port, p->host_port);

	if (!c) {
		refuse(v, p);
		return;
	}
	c->peer_alloc = p->buf_alloc;
	c->peer_fwd = p->fwd_cnt;
	vsock_conn_wake(v, c, VSOCK_RESPONSE);
}

static void data(struct vmm_vsock *v, struct vsock_conn *c, struct packet *p)
{
	/* More than it was told there is room for, or after it said that no more comes. */
	if (p->len > c->buf_alloc - c->used || c->guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND)
		vsock_conn_reset(v, c);
	else
		vsock_conn_write(v, c, p->iov, p->nr_iov, p->len);
}

static void shut(struct vmm_vsock *v, struct vsock_conn *c, uint32_t flags)
{
	const struct vsock_rst rst = {
		.src_cid = VSOCK_HOST_CID,
		.src_port = c->host_port,
		.dst_port = c->guest_port,
		.type = VIRTIO_VSOCK_TYPE_STREAM,
	};

	c->guest_shut |= flags & (VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND);
	if (c->guest_shut != (VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND)) {
		vsock_conn_settle(v, c);
		return;
	}
	/* virtio-v1.3 §5.10.6.6: RST ends a connection in order. The guest waits for it and is
	 * not kept waiting for a host that reads slowly. */
	vsock_rst(v, &rst);
	vsock_conn_drain(v, c);
}

static void open_packet(struct vmm_vsock *v, struct vsock_conn *c, struct packet *p)
{
	switch (p->op) {
	case VIRTIO_VSOCK_OP_RW:
		data(v, c, p);
		break;
	case VIRTIO_VSOCK_OP_SHUTDOWN:
		shut(v, c, p->flags);
		break;
	case VIRTIO_VSOCK_OP_CREDIT_UPDATE:
		break;
	case VIRTIO_VSOCK_OP_CREDIT_REQUEST:
		vsock_conn_wake(v, c, VSOCK_CREDIT);
		break;
	case VIRTIO_VSOCK_OP_RST:
		vsock_conn_free(v, c);
		break;
	default:
		vsock_conn_reset(v, c);
	}
}

static void handle(struct vmm_vsock *v, struct packet *p)
{
	struct vsock_conn *c;

	/* virtio-v1.3 §5.10.6.1: a packet that does not come from the guest's CID is none. */
	if (p->src_cid != v->cid) {
		v->counts.dropped++;
		return;
	}
	if (p->dst_cid != VSOCK_HOST_CID || p->type != VIRTIO_VSOCK_TYPE_STREAM) {
		v->counts.dropped++;
		refuse(v, p);
		return;
	}
	c = vsock_conn_find(v, p->guest_port, p->host_port);
	if (!c || c->owed & VSOCK_REQUEST) { /* it cannot know of that one yet */
		if (!c && p->op == VIRTIO_VSOCK_OP_REQUEST)
			request(v, p);
		else
			refuse(v, p);
		return;
	}
	if (p->fwd_cnt != c->peer_fwd || p->buf_alloc != c->peer_alloc)
		c->credit_asked = false;
	c->peer_alloc = p->buf_alloc;
	c->peer_fwd = p->fwd_cnt;
	if (c->state == VSOCK_OPEN)
		open_packet(v, c, p);
	else if (p->op == VIRTIO_VSOCK_OP_RESPONSE)
		vsock_host_answer(v, c);
	else if (p->op == VIRTIO_VSOCK_OP_RST)
		vsock_conn_free(v, c);
	else
		vsock_conn_reset(v, c);
	/* It may have room now. */
	if (c->state == VSOCK_OPEN)
		vsock_conn_wake(v, c, 0);
}

int vsock_tx_serve(struct vmm_service *s)
{
	struct vmm_vsock *v = (struct vmm_vsock *)((uint8_t *)s - offsetof(struct vmm_vsock, tx));
	struct vmm_chain chain = { .iov = v->tx_iov };
	struct packet p;
	int rc;

	if (v->nr_rsts >= VSOCK_RSTS_OF_GUEST) {
		v->tx_held = true;
		return VMM_SERVICE_WAIT;
	}
	rc = vmm_vq_pop(s->vq, &chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!parse(&chain, &p)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	handle(v, &p);
	vmm_vq_push(s->vq, &chain, 0);
	return VMM_VQ_CHAIN;
}

void vsock_tx_flush(struct vmm_service *s)
{
	vsock_rx_pump((struct vmm_vsock *)((uint8_t *)s - offsetof(struct vmm_vsock, tx)));
}
