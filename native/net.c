/* virtio-net: the device as a whole. Its parts are named in net_impl.h. */
#include "net_impl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define AT_STATUS 6

/* With the lock held. */
static void publish(struct vmm_net *net, int notify)
{
	if (net->virtio)
		vmm_virtio_config(net->virtio, net->config.space, VMM_NET_SPACE, notify);
	net->stale = !net->virtio;
}

void net_set_status(struct vmm_net *net, uint16_t set, uint16_t clear)
{
	uint8_t *at = net->config.space + AT_STATUS;
	uint16_t old, now;

	pthread_mutex_lock(&net->lock);
	old = (uint16_t)vmm_get_le(at, 2);
	now = (uint16_t)((old & ~clear) | set);
	vmm_put_le(at, now, 2);
	if (now != old)
		publish(net, 1);
	pthread_mutex_unlock(&net->lock);
}

void net_arm(struct net_pair *pair)
{
	const struct vmm_net *net = pair->net;
	const struct net_rx *rx = &pair->rx;
	const struct net_tx *tx = &pair->tx;
	uint32_t want = 0;

	if (rx->service.vq && pair->active && net_linked(net) && !rx->starved && !rx->timer.set)
		want |= EPOLLIN;
	if (tx->blocked && (tx->service.vq || tx->tail_len))
		want |= EPOLLOUT;
	if (net->dead || pair->hung || !pair->active || (!want && !rx->service.vq && !tx->service.vq)) {
		if (pair->registered)
			vmm_loop_remove(net->loop, &pair->link);
		pair->registered = false;
	} else if (pair->registered && want != pair->armed) {
		vmm_loop_modify(net->loop, &pair->link, want);
	} else if (!pair->registered && pair->link.fd >= 0) {
		pair->registered = !vmm_loop_add(net->loop, &pair->link, want);
	}
	pair->armed = want;
}

static void locked_run(struct vmm_service *s)
{
	pthread_mutex_lock(&s->lock);
	vmm_service_run(s);
	pthread_mutex_unlock(&s->lock);
}

static void again(struct vmm_service *s)
{
	if (s->vq)
		vmm_service_again(s);
}

void net_die(struct vmm_net *net, int error)
{
	if (net->dead)
		return;
	net->dead = error;
	net_set_status(net, 0, VIRTIO_NET_S_LINK_UP);
	for (uint32_t i = 0; i < net->config.pairs; i++) {
		net_arm(&net->pairs[i]);
		again(&net->pairs[i].tx.service); /* drops what waits */
	}
	net_listen(net);
}

/* Whether the other end is gone: an error alone may be one message's. */
static bool hung(const struct net_pair *pair, uint32_t epoll_events)
{
	int error;
	socklen_t len = sizeof(error);

	if (epoll_events & EPOLLHUP)
		return true;
	return epoll_events & EPOLLERR &&
	       getsockopt(pair->link.fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0;
}

static void link_ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct net_pair *pair = (struct net_pair *)((uint8_t *)source -
						    offsetof(struct net_pair, link));

	if (hung(pair, epoll_events)) {
		pair->hung = true;
		net_arm(pair); /* it would be told again and again */
	}
	if (epoll_events & EPOLLIN || pair->hung)
		locked_run(&pair->rx.service);
	if (epoll_events & EPOLLOUT || pair->hung) {
		pair->tx.blocked = false;
		if (pair->tx.service.vq)
			locked_run(&pair->tx.service);
		else if (pair->tx.tail_len && net_send(pair) == -EAGAIN)
			pair->tx.blocked = true;
	}
	/* What it sent last is lost if there is no room for it now. */
	if (pair->hung && (pair->rx.starved || !pair->rx.service.vq))
		net_die(pair->net, EPIPE);
	net_arm(pair);
}

void net_again(struct vmm_net *net)
{
	for (uint32_t i = 0; i < net->config.pairs; i++) {
		struct net_pair *pair = &net->pairs[i];

		again(&pair->rx.service);
		again(&pair->tx.service);
		net_arm(pair);
	}
}

static void arm_all(void *arg)
{
	net_again(arg);
}

static int pair_init(struct vmm_net *net, uint32_t index)
{
	struct net_pair *pair = &net->pairs[index];
	int rc;

	pair->index = index;
	pair->active = !index;
	pair->attached = true;
	pair->link.fd = net->config.fds[index];
	pair->link.ready = link_ready;
	rc = net_rx_init(pair);
	if (!rc)
		rc = net_tx_init(pair);
	if (!rc && net->config.kind == VMM_NET_STREAM) {
		pair->stream = malloc(2 * NET_MAX_FRAME);
		rc = pair->stream ? 0 : -ENOMEM;
	}
	return rc;
}

struct vmm_net *vmm_net_create(struct vmm_loop *loop, const struct vmm_net_config *config)
{
	struct vmm_net *net;
	int rc = 0;

	if (!config->pairs || config->pairs > VMM_NET_MAX_PAIRS || !config->queue_size ||
	    config->queue_size > VMM_NET_MAX_QUEUE) {
		errno = EINVAL;
		return NULL;
	}
	net = calloc(1, sizeof(*net));
	if (!net)
		return NULL;
	net->loop = loop;
	net->config = *config;
	memcpy(net->mac, config->space, sizeof(net->mac));
	net->up = true;
	net->in_use = 1;
	pthread_mutex_init(&net->lock, NULL);
	pthread_mutex_init(&net->dump_lock, NULL);
	vmm_service_init(&net->ctrl, loop, net_ctrl_serve);
	net->pairs = calloc(config->pairs, sizeof(*net->pairs));
	net->ctrl_iov = calloc(config->queue_size, sizeof(*net->ctrl_iov));
	if (config->dump)
		net->dump_record = malloc(16 + NET_MAX_FRAME);
	if (!net->pairs || !net->ctrl_iov || (config->dump && !net->dump_record))
		rc = -ENOMEM;
	for (uint32_t i = 0; !rc && i < config->pairs; i++)
		net->pairs[i].net = net;
	for (uint32_t i = 0; !rc && i < config->pairs; i++)
		rc = pair_init(net, i);
	if (!rc && config->listener >= 0) {
		net->dead = ENOTCONN;
		rc = net_listen(net);
	}
	if (rc) {
		vmm_net_destroy(net);
		errno = -rc;
		return NULL;
	}
	return net;
}

static void forget_links(void *arg)
{
	struct vmm_net *net = arg;

	net_unlisten(net);
	for (uint32_t i = 0; i < net->config.pairs; i++) {
		net->pairs[i].tx.tail_len = 0;
		net_arm(&net->pairs[i]);
	}
}

void vmm_net_destroy(struct vmm_net *net)
{
	if (!net)
		return;
	if (net->pairs) {
		vmm_net_stop(net);
		vmm_loop_call(net->loop, forget_links, net);
	}
	for (uint32_t i = 0; net->pairs && i < net->config.pairs; i++) {
		net_rx_fini(&net->pairs[i]);
		net_tx_fini(&net->pairs[i]);
		free(net->pairs[i].stream);
	}
	vmm_service_fini(&net->ctrl);
	vmm_timer_fini(&net->door_timer);
	pthread_mutex_destroy(&net->lock);
	pthread_mutex_destroy(&net->dump_lock);
	free(net->pairs);
	free(net->ctrl_iov);
	free(net->dump_record);
	free(net);
}

static void begin(void *arg)
{
	struct vmm_net *net = arg;

	net_set_pairs(net, 1);
	net_filter_reset(net, net->features);
}

int vmm_net_begin(struct vmm_net *net, struct vmm_virtio *virtio, uint64_t features)
{
	pthread_mutex_lock(&net->lock);
	net->virtio = virtio;
	net->features = features;
	if (net->stale)
		publish(net, 1);
	pthread_mutex_unlock(&net->lock);
	if (net->begun)
		return 0;
	net->begun = true;
	vmm_loop_call(net->loop, begin, net);
	return net_set_offloads(net, features);
}

int vmm_net_start(struct vmm_net *net, const struct vmm_service_config *config)
{
	const uint64_t features = config->vq.features;
	/* virtio-v1.3 §5.1.2: without MQ the third queue controls. */
	const uint32_t pairs = features >> VIRTIO_NET_F_MQ & 1 ? net->config.pairs : 1;
	const uint32_t index = config->index;
	struct net_pair *pair;
	int rc;

	if (index > 2 * pairs || config->vq.size > net->config.queue_size)
		return -EINVAL;
	rc = vmm_net_begin(net, config->virtio, features);
	if (rc)
		return rc;
	if (index == 2 * pairs)
		return features >> VIRTIO_NET_F_CTRL_VQ & 1 ?
			       vmm_service_start(&net->ctrl, config) : -EINVAL;
	pair = &net->pairs[index / 2];
	return index % 2 ? net_tx_start(pair, config) : net_rx_start(pair, config);
}

void vmm_net_stop_queue(struct vmm_net *net, uint32_t index)
{
	const uint32_t pairs = net->features >> VIRTIO_NET_F_MQ & 1 ? net->config.pairs : 1;

	if (index == 2 * pairs)
		vmm_service_stop(&net->ctrl);
	else if (index < 2 * pairs && index % 2)
		net_tx_stop(&net->pairs[index / 2]);
	else if (index < 2 * pairs)
		net_rx_stop(&net->pairs[index / 2]);
	vmm_loop_call(net->loop, arm_all, net);
}

void vmm_net_stop(struct vmm_net *net)
{
	vmm_service_stop(&net->ctrl);
	for (uint32_t i = 0; i < net->config.pairs; i++) {
		net_rx_stop(&net->pairs[i]);
		net_tx_stop(&net->pairs[i]);
	}
	vmm_loop_call(net->loop, arm_all, net);
	pthread_mutex_lock(&net->lock);
	/* What the driver changed is as it was. */
	memcpy(net->config.space, net->mac, sizeof(net->mac));
	net->config.space[AT_STATUS] &= (uint8_t)~VIRTIO_NET_S_ANNOUNCE;
	publish(net, 0);
	net->virtio = NULL;
	net->begun = false;
	pthread_mutex_unlock(&net->lock);
}

void vmm_net_stats(const struct vmm_net *net, struct vmm_net_stats *out)
{
	*out = net->stats;
}

struct link_call {
	struct vmm_net *net;
	int up;
};

static void set_link(void *arg)
{
	struct vmm_net *net = ((const struct link_call *)arg)->net;

	net->up = ((const struct link_call *)arg)->up;
	if (net_linked(net))
		net_set_status(net, VIRTIO_NET_S_LINK_UP, 0);
	else
		net_set_status(net, 0, VIRTIO_NET_S_LINK_UP);
	net_again(net);
}

void vmm_net_set_link(struct vmm_net *net, int up)
{
	struct link_call call = { net, up };

	vmm_loop_call(net->loop, set_link, &call);
}

void vmm_net_announce(struct vmm_net *net)
{
	if (net->virtio && net->features >> VIRTIO_NET_F_GUEST_ANNOUNCE & 1)
		net_set_status(net, VIRTIO_NET_S_ANNOUNCE, 0);
}

uint32_t vmm_net_pairs(const struct vmm_net *net)
{
	return net->in_use;
}

int vmm_net_dead(const struct vmm_net *net)
{
	return net->dead;
}

void vmm_net_space(struct vmm_net *net, uint8_t *out)
{
	pthread_mutex_lock(&net->lock);
	memcpy(out, net->config.space, VMM_NET_SPACE);
	pthread_mutex_unlock(&net->lock);
}
