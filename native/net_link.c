/* The other side of a virtio-net device. Nothing here waits, and nothing trusts what comes in. */
#define _GNU_SOURCE
#include "net_impl.h"

#include <errno.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Newer than Debian 12's headers. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

uint32_t net_lead(const struct vmm_net *net)
{
	return net->config.kind == VMM_NET_TAP ? NET_HDR :
	       net->config.kind == VMM_NET_STREAM ? NET_PREFIX : 0;
}

int net_set_offloads(struct vmm_net *net, uint64_t features)
{
	static const struct {
		uint8_t feature;
		uint8_t flag;
	} map[] = {
		{ VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM }, { VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4 },
		{ VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6 }, { VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN },
		{ VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO },	 { 54, TUN_F_USO4 },
		{ 55, TUN_F_USO6 },
	};
	unsigned long flags = 0;

	if (net->config.kind != VMM_NET_TAP)
		return 0;
	for (size_t i = 0; i < sizeof(map) / sizeof(map[0]); i++)
		if (features >> map[i].feature & 1)
			flags |= map[i].flag;
	/* A tap that is gone shows when it is read. */
	return ioctl(net->config.fds[0], TUNSETOFFLOAD, flags) && errno == EINVAL ? -EINVAL : 0;
}

/* Reading never touches more than the frame: what it does not cover of the guest's memory stays. */
static int fetch_tap(struct net_pair *pair, const struct iovec *iov, uint32_t nr)
{
	ssize_t n;

	do {
		/* SAFETY: iov is RAM that vmm_vq_pop() checked, then the spill. */
		n = readv(pair->link.fd, iov, (int)nr);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : (int)n;
}

static void clear_header(const struct iovec *iov, uint32_t nr)
{
	const struct virtio_net_hdr_v1 none = { 0 };

	vmm_iov_write(iov, nr, 0, &none, sizeof(none));
}

static int fetch_packet(struct net_pair *pair, const struct iovec *iov, uint32_t nr)
{
	struct iovec *rest = pair->rx.scratch;
	struct msghdr msg = { 0 };
	uint8_t head[NET_FILTER];
	int type = 0;
	socklen_t len = sizeof(type);
	ssize_t n;

	if (net_filter_on(pair->net)) {
		do {
			n = recv(pair->link.fd, head, sizeof(head), MSG_DONTWAIT | MSG_PEEK);
		} while (n < 0 && errno == EINTR);
		if (n < 0)
			return -errno; /* what comes from now on has not been looked at */
		if (n > 0 && !net_filter_wants(pair->net, head, (uint32_t)n)) {
			n = recv(pair->link.fd, head, sizeof(head), MSG_DONTWAIT);
			return -ENOMSG;
		}
	}
	memcpy(rest, iov, nr * sizeof(*rest));
	vmm_iov_skip(&rest, &nr, NET_HDR);
	msg.msg_iov = rest;
	msg.msg_iovlen = nr;
	do {
		/* SAFETY: as fetch_tap(). */
		n = recvmsg(pair->link.fd, &msg, MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	if (!n && !getsockopt(pair->link.fd, SOL_SOCKET, SO_TYPE, &type, &len) &&
	    type == SOCK_SEQPACKET)
		return -EPIPE;
	if (msg.msg_flags & MSG_TRUNC)
		return 0; /* no frame is that long */
	clear_header(iov, nr);
	return (int)(n + NET_HDR);
}

/* Bytes of the next frame, prefix included, or what of them must be read to know. */
static uint32_t stream_need(const struct net_pair *pair, bool *known)
{
	const uint8_t *p = pair->stream + pair->stream_at;

	*known = pair->stream_len >= NET_PREFIX;
	if (!*known)
		return NET_PREFIX;
	return NET_PREFIX + ((uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 |
			     p[3]);
}

static int stream_fill(struct net_pair *pair)
{
	ssize_t n;

	if (pair->stream_at) {
		memmove(pair->stream, pair->stream + pair->stream_at, pair->stream_len);
		pair->stream_at = 0;
	}
	do {
		n = recv(pair->link.fd, pair->stream + pair->stream_len,
			 2 * NET_MAX_FRAME - pair->stream_len, MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n ? -errno : -EPIPE;
	pair->stream_len += (uint32_t)n;
	return 0;
}

static int fetch_stream(struct net_pair *pair, const struct iovec *iov, uint32_t nr)
{
	for (;;) {
		bool known;
		const uint32_t need = stream_need(pair, &known);
		int rc;

		if (known && need - NET_PREFIX > NET_MAX_FRAME)
			return -EPROTO; /* nobody knows where the next one begins */
		if (known && pair->stream_len >= need) {
			const uint8_t *frame = pair->stream + pair->stream_at + NET_PREFIX;
			const uint32_t len = need - NET_PREFIX;

			pair->stream_at += need;
			pair->stream_len -= need;
			if (!net_filter_wants(pair->net, frame, len))
				return -ENOMSG;
			clear_header(iov, nr);
			vmm_iov_write(iov, nr, NET_HDR, frame, len);
			return (int)(len + NET_HDR);
		}
		rc = stream_fill(pair);
		if (rc)
			return rc;
	}
}

int net_fetch(struct net_pair *pair, struct iovec *iov, uint32_t nr)
{
	struct net_rx *rx = &pair->rx;
	const uint32_t all = NET_HDR + NET_MAX_FRAME;

	if (rx->room < all) {
		iov[nr].iov_base = rx->spill + rx->room;
		iov[nr].iov_len = all - rx->room;
		nr++;
	}
	switch (pair->net->config.kind) {
	case VMM_NET_TAP:
		return fetch_tap(pair, iov, nr);
	case VMM_NET_PACKET:
		return fetch_packet(pair, iov, nr);
	default:
		return fetch_stream(pair, iov, nr);
	}
}

/* Whether an error is about one frame, or about the link. */
static bool fatal(int error)
{
	return error == EPIPE || error == ECONNRESET || error == ECONNREFUSED ||
	       error == ENOTCONN || error == EBADF || error == EBADFD || error == ENODEV ||
	       error == ENOTSOCK || error == ESHUTDOWN;
}

/* One write a frame. */
static int send_frames(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;
	struct vmm_net *net = pair->net;

	for (; tx->done < tx->nr; tx->done++) {
		const struct net_frame *f = &tx->frames[tx->done];
		struct msghdr msg = { .msg_iov = tx->pool + f->start, .msg_iovlen = f->nr };
		ssize_t n;

		if (!f->left)
			continue;
		do {
			/* SAFETY: RAM that vmm_vq_pop() checked; the header is our copy. */
			n = net->config.kind == VMM_NET_TAP ?
				    writev(pair->link.fd, msg.msg_iov, (int)f->nr) :
				    sendmsg(pair->link.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		} while (n < 0 && errno == EINTR);
		if (n >= 0) {
			net->stats.tx_frames++;
			net->stats.tx_bytes += f->whole - net_lead(net);
		} else if (errno == EAGAIN || fatal(errno)) {
			return -errno;
		} else {
			net->stats.tx_errors++;
		}
	}
	return 0;
}

static int send_tail(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;

	while (tx->tail_len) {
		const ssize_t n = send(pair->link.fd, tx->tail + tx->tail_at, tx->tail_len,
				       MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		tx->tail_at += (uint32_t)n;
		tx->tail_len -= (uint32_t)n;
	}
	return 0;
}

/* Counts what of the batch is out after another n bytes. */
static void advance(struct net_pair *pair, uint64_t n)
{
	struct net_tx *tx = &pair->tx;
	struct vmm_net *net = pair->net;

	for (; tx->done < tx->nr; tx->done++) {
		struct net_frame *f = &tx->frames[tx->done];

		if (f->left > n) {
			f->left -= (uint32_t)n;
			return;
		}
		n -= f->left;
		if (f->left) {
			net->stats.tx_frames++;
			net->stats.tx_bytes += f->whole - NET_PREFIX;
		}
		f->left = 0;
	}
}

/* All of the batch in one write; it may end anywhere. */
static int send_stream(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;
	int rc = send_tail(pair);

	if (rc)
		return rc;
	advance(pair, 0);
	while (tx->done < tx->nr) {
		struct iovec *left = tx->pool + tx->sent;
		uint32_t nr = tx->used - tx->sent;
		struct msghdr msg = { .msg_iov = left, .msg_iovlen = nr };
		/* SAFETY: as send_frames(). */
		const ssize_t n = sendmsg(pair->link.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		vmm_iov_skip(&left, &nr, (uint64_t)n);
		tx->sent = tx->used - nr;
		advance(pair, (uint64_t)n);
	}
	return 0;
}

int net_send(struct net_pair *pair)
{
	return pair->net->config.kind == VMM_NET_STREAM ? send_stream(pair) : send_frames(pair);
}
