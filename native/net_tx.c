/* Transmitting: chains are gathered into a batch, sent without a copy, and given back in order. A
 * full socket holds the batch, and with it the guest. */
#include "net_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Buffers of a batch: as many as one sendmsg(2) takes. */
#define POOL 1024

static struct net_pair *pair_of(struct vmm_service *s)
{
	return (struct net_pair *)((uint8_t *)s - offsetof(struct net_pair, tx.service));
}

/* Whether the driver may ask for this, having negotiated what it has. virtio-v1.3 §5.1.6.2.1 */
static bool allowed(const struct virtio_net_hdr_v1 *hdr, uint64_t features)
{
	static const uint8_t feature_of[] = {
		[VIRTIO_NET_HDR_GSO_TCPV4] = VIRTIO_NET_F_HOST_TSO4,
		[VIRTIO_NET_HDR_GSO_UDP] = VIRTIO_NET_F_HOST_UFO,
		[VIRTIO_NET_HDR_GSO_TCPV6] = VIRTIO_NET_F_HOST_TSO6,
		[5] = 56, /* UDP_L4: HOST_USO */
	};
	const uint8_t kind = hdr->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;

	if (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM && !(features >> VIRTIO_NET_F_CSUM & 1))
		return false;
	if (hdr->gso_type & VIRTIO_NET_HDR_GSO_ECN && !(features >> VIRTIO_NET_F_HOST_ECN & 1))
		return false;
	if (kind == VIRTIO_NET_HDR_GSO_NONE)
		return true;
	return kind < sizeof(feature_of) && feature_of[kind] && features >> feature_of[kind] & 1;
}

/* Gives back what was sent or dropped, in the order it came. */
static void complete(struct net_tx *tx)
{
	for (; tx->pushed < tx->done; tx->pushed++)
		vmm_vq_push(tx->service.vq, &tx->frames[tx->pushed].chain, 0);
	if (tx->done == tx->nr)
		tx->nr = tx->done = tx->pushed = tx->used = tx->sent = 0;
}

/* Nobody will send what waits: but the rest of a frame that went out in part is kept. */
static void abandon(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;

	for (; tx->done < tx->nr; tx->done++) {
		const struct net_frame *f = &tx->frames[tx->done];

		if (!f->left)
			continue; /* it was to be dropped, and is counted */
		if (f->left < f->whole && !pair->net->dead) {
			tx->tail_at = 0;
			tx->tail_len = (uint32_t)vmm_iov_read(tx->pool + tx->sent,
							      tx->used - tx->sent, 0, tx->tail,
							      f->left);
		} else {
			pair->net->stats.tx_dropped++;
		}
	}
	if (pair->net->dead)
		tx->tail_len = 0;
}

static void transmit(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;
	int rc = 0;

	if (!net_linked(pair->net))
		abandon(pair);
	if (tx->tail_len || tx->done < tx->nr)
		rc = net_send(pair);
	if (rc < 0 && rc != -EAGAIN) {
		net_die(pair->net, -rc);
		abandon(pair);
	}
	tx->blocked = rc == -EAGAIN;
	complete(tx);
}

/* Puts what precedes the frame on this link before it, in place of the guest's header. */
static void lay_out(struct net_pair *pair, struct net_frame *f, uint32_t len)
{
	const uint32_t lead = net_lead(pair->net);
	struct net_tx *tx = &pair->tx;
	struct iovec *slot = tx->pool + tx->used, *rest = f->chain.iov;
	uint32_t nr = f->chain.nr_read;

	vmm_iov_skip(&rest, &nr, NET_HDR);
	memmove(slot + 1, rest, nr * sizeof(*slot));
	slot->iov_base = f->head;
	slot->iov_len = lead;
	if (pair->net->config.kind == VMM_NET_STREAM) {
		f->head[0] = (uint8_t)(len >> 24);
		f->head[1] = (uint8_t)(len >> 16);
		f->head[2] = (uint8_t)(len >> 8);
		f->head[3] = (uint8_t)len;
	}
	f->start = tx->used;
	f->nr = nr + 1;
	f->left = f->whole = lead + len;
	tx->used += nr + 1;
}

/* Decides about the chain that was taken: to be sent, to be dropped, or makes no sense. */
static int accept_chain(struct net_pair *pair, struct net_frame *f)
{
	struct net_tx *tx = &pair->tx;
	struct vmm_net *net = pair->net;
	struct virtio_net_hdr_v1 hdr;
	uint64_t len;

	if (f->chain.read_len < NET_HDR) {
		vmm_vq_refuse(tx->service.vq);
		return vmm_vq_broken(tx->service.vq);
	}
	vmm_iov_read(f->chain.iov, f->chain.nr_read, 0, &hdr, NET_HDR);
	len = f->chain.read_len - NET_HDR;
	f->left = f->whole = 0;
	tx->nr++;
	if (!net_linked(net) || !pair->active || len < NET_MIN_FRAME || len > NET_MAX_FRAME ||
	    !allowed(&hdr, tx->features)) {
		net->stats.tx_dropped++;
		return VMM_VQ_CHAIN;
	}
	hdr.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
	hdr.num_buffers = 0;
	memcpy(f->head, &hdr, NET_HDR);
	lay_out(pair, f, (uint32_t)len);
	net_charge(&net->config.tx_bytes, &net->config.tx_frames, len);
	net_dump(net, tx->pool + f->start + 1, f->nr - 1, 0, (uint32_t)len);
	return VMM_VQ_CHAIN;
}

static int serve(struct vmm_service *s)
{
	struct net_pair *pair = pair_of(s);
	struct net_tx *tx = &pair->tx;
	struct vmm_net *net = pair->net;
	struct net_frame *f;
	uint64_t wait;
	int rc;

	if (tx->blocked && net_linked(net))
		return VMM_SERVICE_WAIT;
	if (tx->nr == NET_BATCH || tx->used + net->config.queue_size + 1 > POOL) {
		transmit(pair);
		if (tx->blocked)
			return VMM_SERVICE_WAIT;
	}
	wait = net_linked(net) ? net_throttle(&net->config.tx_bytes, &net->config.tx_frames) : 0;
	if (wait) {
		vmm_timer_set(&tx->timer, wait);
		return VMM_SERVICE_WAIT;
	}
	f = &tx->frames[tx->nr];
	f->chain.iov = tx->pool + tx->used + 1;
	rc = vmm_vq_pop(s->vq, &f->chain);
	return rc == VMM_VQ_CHAIN ? accept_chain(pair, f) : rc;
}

static void flush(struct vmm_service *s)
{
	struct net_pair *pair = pair_of(s);

	if (!pair->tx.blocked || !net_linked(pair->net))
		transmit(pair);
	net_arm(pair);
}

static void expired(struct vmm_timer *timer)
{
	struct net_tx *tx = (struct net_tx *)((uint8_t *)timer - offsetof(struct net_tx, timer));

	pthread_mutex_lock(&tx->service.lock);
	vmm_service_run(&tx->service);
	pthread_mutex_unlock(&tx->service.lock);
}

/* The queue goes, and with it the frames; no chain is given back. */
static void drain(struct vmm_service *s)
{
	struct net_pair *pair = pair_of(s);
	struct net_tx *tx = &pair->tx;

	abandon(pair);
	tx->nr = tx->done = tx->pushed = tx->used = tx->sent = 0;
	tx->blocked = tx->tail_len != 0;
	vmm_timer_set(&tx->timer, 0);
}

int net_tx_init(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;

	vmm_service_init(&tx->service, pair->net->loop, serve);
	tx->service.flush = flush;
	tx->service.drain = drain;
	tx->pool = calloc(POOL, sizeof(*tx->pool));
	tx->tail = malloc(NET_PREFIX + NET_MAX_FRAME);
	if (!tx->pool || !tx->tail)
		return -ENOMEM;
	return vmm_timer_init(&tx->timer, pair->net->loop, expired);
}

void net_tx_fini(struct net_pair *pair)
{
	struct net_tx *tx = &pair->tx;

	if (!tx->service.serve)
		return; /* never begun */
	vmm_service_fini(&tx->service);
	vmm_timer_fini(&tx->timer);
	free(tx->pool);
	free(tx->tail);
}

int net_tx_start(struct net_pair *pair, const struct vmm_service_config *config)
{
	pair->tx.features = config->vq.features;
	return vmm_service_start(&pair->tx.service, config);
}

void net_tx_stop(struct net_pair *pair)
{
	vmm_service_stop(&pair->tx.service);
}
