/* Receiving: the guest's buffers wait here, frames are read straight into them. What does not fit
 * goes to a spill buffer, so that no frame is cut, however small the buffers are. */
#include "net_impl.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define GSO_FEATURES                                                                               \
	(1ULL << VIRTIO_NET_F_GUEST_TSO4 | 1ULL << VIRTIO_NET_F_GUEST_TSO6 |                       \
	 1ULL << VIRTIO_NET_F_GUEST_UFO | 1ULL << 54 | 1ULL << 55)

static struct net_pair *pair_of(struct vmm_service *s)
{
	return (struct net_pair *)((uint8_t *)s - offsetof(struct net_pair, rx.service));
}

/* Makes room behind the last buffer held for as many as a chain can have. */
static void compact(struct net_rx *rx, uint32_t queue_size)
{
	if (rx->iov_first + rx->nr_iov > queue_size) {
		memmove(rx->iov, rx->iov + rx->iov_first, rx->nr_iov * sizeof(*rx->iov));
		rx->iov_first = 0;
	}
	if (rx->first + rx->nr > queue_size) {
		memmove(rx->held, rx->held + rx->first, rx->nr * sizeof(*rx->held));
		rx->first = 0;
	}
}

static int hold_one(struct net_pair *pair)
{
	struct net_rx *rx = &pair->rx;
	struct vmm_chain *chain;
	int rc;

	compact(rx, pair->net->config.queue_size);
	chain = &rx->held[rx->first + rx->nr];
	chain->iov = rx->iov + rx->iov_first + rx->nr_iov;
	rc = vmm_vq_pop(rx->service.vq, chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (chain->nr_read || chain->write_len < NET_HDR) {
		/* virtio-v1.3 §5.1.6.3.1: to be written, and with room for the header. */
		vmm_vq_refuse(rx->service.vq);
		return vmm_vq_broken(rx->service.vq);
	}
	rx->nr++;
	rx->nr_iov += chain->nr_write;
	rx->room += chain->write_len;
	return rc;
}

/* More buffers than a queue has descriptors cannot come without some being given back. */
static bool may_hold_more(const struct net_pair *pair)
{
	return pair->rx.nr_iov < pair->rx.size;
}

static int drop(struct net_pair *pair)
{
	pair->net->stats.rx_dropped++;
	pair->rx.pending = 0;
	return VMM_VQ_CHAIN;
}

/* The pending frame is in the first buffers: they are the driver's again. */
static int deliver(struct net_pair *pair)
{
	struct net_rx *rx = &pair->rx;
	struct vmm_net *net = pair->net;
	const struct iovec *iov = rx->iov + rx->iov_first;
	const uint32_t len = rx->pending;
	uint32_t nr = 0;
	uint64_t covered = 0;
	uint16_t count;

	while (covered < len)
		covered += rx->held[rx->first + nr++].write_len;
	count = htole16((uint16_t)nr);
	vmm_iov_write(iov, rx->nr_iov, offsetof(struct virtio_net_hdr_v1, num_buffers), &count,
		      sizeof(count));
	net_dump(net, iov, rx->nr_iov, NET_HDR, len - NET_HDR);
	net->stats.rx_frames++;
	net->stats.rx_bytes += len - NET_HDR;
	net_charge(&net->config.rx_bytes, &net->config.rx_frames, len - NET_HDR);
	rx->room -= covered;
	rx->pending = 0;
	/* At once: who finds the first looks for as many as it says there are. */
	vmm_vq_push_span(rx->service.vq, &rx->held[rx->first], nr, len);
	for (; nr; nr--) {
		const uint32_t buffers = rx->held[rx->first].nr_write;

		rx->iov_first += buffers;
		rx->nr_iov -= buffers;
		rx->first++;
		rx->nr--;
	}
	return VMM_VQ_CHAIN;
}

/* The pending frame filled the buffers there were; the rest is in the spill, each byte where it is
 * in the frame. */
static int place(struct net_pair *pair)
{
	struct net_rx *rx = &pair->rx;

	if (!rx->mergeable && rx->room < rx->pending)
		return drop(pair);
	while (rx->room < rx->pending) {
		const uint64_t before = rx->room;
		const struct vmm_chain *chain;
		int rc;

		if (!may_hold_more(pair))
			return drop(pair);
		rc = hold_one(pair);
		if (rc == VMM_VQ_EMPTY)
			rx->starved = true;
		if (rc != VMM_VQ_CHAIN)
			return rc;
		chain = &rx->held[rx->first + rx->nr - 1];
		vmm_iov_write(chain->iov, chain->nr_write, 0, rx->spill + before,
			      rx->pending - before);
	}
	return deliver(pair);
}

static int serve(struct vmm_service *s)
{
	struct net_pair *pair = pair_of(s);
	struct net_rx *rx = &pair->rx;
	struct vmm_net *net = pair->net;
	uint64_t wait;
	int rc;

	if (!net_linked(net) || !pair->active || rx->timer.set)
		return VMM_SERVICE_WAIT;
	rx->starved = false;
	if (rx->pending)
		return place(pair);
	while (rx->room < rx->want && may_hold_more(pair)) {
		rc = hold_one(pair);
		if (rc == VMM_VQ_EMPTY)
			break;
		if (rc != VMM_VQ_CHAIN)
			return rc;
	}
	if (!rx->nr) {
		rx->starved = true;
		return VMM_VQ_EMPTY;
	}
	wait = net_throttle(&net->config.rx_bytes, &net->config.rx_frames);
	if (wait) {
		vmm_timer_set(&rx->timer, wait);
		return VMM_SERVICE_WAIT;
	}
	rc = net_fetch(pair, rx->iov + rx->iov_first, rx->nr_iov);
	if (rc == -ENOMSG) {
		net->stats.rx_filtered++;
		return VMM_VQ_CHAIN; /* on to the next one */
	}
	if (rc == -EAGAIN && !pair->hung)
		return VMM_SERVICE_WAIT;
	if (rc < 0) {
		net_die(net, rc == -EAGAIN ? EPIPE : -rc);
		return VMM_SERVICE_WAIT;
	}
	if (rc < (int)NET_HDR + NET_MIN_FRAME)
		return drop(pair);
	rx->pending = (uint32_t)rc;
	return place(pair);
}

static void flush(struct vmm_service *s)
{
	net_arm(pair_of(s));
}

static void expired(struct vmm_timer *timer)
{
	struct net_rx *rx = (struct net_rx *)((uint8_t *)timer - offsetof(struct net_rx, timer));

	pthread_mutex_lock(&rx->service.lock);
	vmm_service_run(&rx->service);
	pthread_mutex_unlock(&rx->service.lock);
}

static void drain(struct vmm_service *s)
{
	struct net_rx *rx = &pair_of(s)->rx;

	rx->first = rx->nr = rx->iov_first = rx->nr_iov = rx->pending = 0;
	rx->room = 0;
	rx->starved = false;
	vmm_timer_set(&rx->timer, 0);
}

int net_rx_init(struct net_pair *pair)
{
	const uint32_t size = pair->net->config.queue_size;
	struct net_rx *rx = &pair->rx;

	vmm_service_init(&rx->service, pair->net->loop, serve);
	rx->service.flush = flush;
	rx->service.drain = drain;
	rx->held = calloc(2 * size, sizeof(*rx->held));
	rx->iov = calloc(2 * size + 1, sizeof(*rx->iov)); /* one more for the spill */
	rx->scratch = calloc(2 * size + 1, sizeof(*rx->scratch));
	rx->spill = malloc(NET_HDR + NET_MAX_FRAME);
	if (!rx->held || !rx->iov || !rx->scratch || !rx->spill)
		return -ENOMEM;
	return vmm_timer_init(&rx->timer, pair->net->loop, expired);
}

void net_rx_fini(struct net_pair *pair)
{
	struct net_rx *rx = &pair->rx;

	if (!rx->service.serve)
		return; /* never begun */
	vmm_service_fini(&rx->service);
	vmm_timer_fini(&rx->timer);
	free(rx->held);
	free(rx->iov);
	free(rx->scratch);
	free(rx->spill);
}

int net_rx_start(struct net_pair *pair, const struct vmm_service_config *config)
{
	const uint64_t features = config->vq.features;
	const uint32_t mtu = (uint32_t)vmm_get_le(pair->net->config.space + 10, 2);
	struct net_rx *rx = &pair->rx;

	rx->size = config->vq.size;
	rx->mergeable = features >> VIRTIO_NET_F_MRG_RXBUF & 1;
	rx->want = 1;
	if (rx->mergeable)
		rx->want = NET_HDR + (features & GSO_FEATURES ? NET_MAX_FRAME :
				      18 + (mtu > 1500 ? mtu : 1500));
	return vmm_service_start(&rx->service, config);
}

void net_rx_stop(struct net_pair *pair)
{
	vmm_service_stop(&pair->rx.service);
}
