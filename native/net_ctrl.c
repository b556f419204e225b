/* The control queue: virtio-v1.3 §5.1.6.5. Commands are copied once, checked, and answered with one
 * byte. */
#define _GNU_SOURCE
#include "net_impl.h"

#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define ETHER 6
#define GUEST_OFFLOADS                                                                             \
	(1ULL << VIRTIO_NET_F_GUEST_CSUM | 1ULL << VIRTIO_NET_F_GUEST_TSO4 |                       \
	 1ULL << VIRTIO_NET_F_GUEST_TSO6 | 1ULL << VIRTIO_NET_F_GUEST_ECN |                        \
	 1ULL << VIRTIO_NET_F_GUEST_UFO | 1ULL << 54 | 1ULL << 55)

static bool set_mac(struct vmm_net *net, const struct net_command *c, uint64_t features)
{
	uint8_t mac[ETHER];

	if (c->cmd == VIRTIO_NET_CTRL_MAC_ADDR_SET) {
		if (!(features >> VIRTIO_NET_F_CTRL_MAC_ADDR & 1) || c->len != ETHER ||
		    !net_get(c, 0, mac, ETHER))
			return false;
		pthread_mutex_lock(&net->lock);
		memcpy(net->config.space, mac, ETHER);
		if (net->virtio)
			vmm_virtio_config(net->virtio, net->config.space, VMM_NET_SPACE, 0);
		pthread_mutex_unlock(&net->lock);
		return true;
	}
	return c->cmd == VIRTIO_NET_CTRL_MAC_TABLE_SET && features >> VIRTIO_NET_F_CTRL_RX & 1 &&
	       net_filter_macs(net, c);
}

static bool set_queues(struct vmm_net *net, const struct net_command *c)
{
	uint8_t pairs[2];

	if (c->cmd != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || c->len != sizeof(pairs) ||
	    !net_get(c, 0, pairs, sizeof(pairs)) || !vmm_get_le(pairs, 2) ||
	    vmm_get_le(pairs, 2) > net->config.pairs)
		return false;
	net_set_pairs(net, (uint32_t)vmm_get_le(pairs, 2));
	return true;
}

static bool set_offloads(struct vmm_net *net, const struct net_command *c, uint64_t features)
{
	uint8_t wanted[8];

	if (c->cmd != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET || c->len != sizeof(wanted) ||
	    !net_get(c, 0, wanted, sizeof(wanted)) ||
	    vmm_get_le(wanted, 8) & ~(features & GUEST_OFFLOADS))
		return false;
	return !net_set_offloads(net, vmm_get_le(wanted, 8));
}

static bool obey(struct vmm_net *net, const struct net_command *c)
{
	const uint64_t f = net->features;

	switch (c->class) {
	case VIRTIO_NET_CTRL_RX:
		return f >> VIRTIO_NET_F_CTRL_RX & 1 && net_filter_mode(net, c);
	case VIRTIO_NET_CTRL_MAC:
		return set_mac(net, c, f);
	case VIRTIO_NET_CTRL_VLAN:
		return f >> VIRTIO_NET_F_CTRL_VLAN & 1 && net_filter_vlan(net, c);
	case VIRTIO_NET_CTRL_ANNOUNCE:
		if (c->cmd != VIRTIO_NET_CTRL_ANNOUNCE_ACK || c->len ||
		    !(f >> VIRTIO_NET_F_GUEST_ANNOUNCE & 1))
			return false;
		net_set_status(net, 0, VIRTIO_NET_S_ANNOUNCE);
		return true;
	case VIRTIO_NET_CTRL_MQ:
		return f >> VIRTIO_NET_F_MQ & 1 && set_queues(net, c);
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS:
		return f >> VIRTIO_NET_F_CTRL_GUEST_OFFLOADS & 1 && set_offloads(net, c, f);
	default:
		return false;
	}
}

int net_ctrl_serve(struct vmm_service *s)
{
	struct vmm_net *net = (struct vmm_net *)((uint8_t *)s - offsetof(struct vmm_net, ctrl));
	struct vmm_chain chain = { .iov = net->ctrl_iov };
	struct net_command command = { .chain = &chain };
	uint8_t head[2], ack = VIRTIO_NET_ERR;
	const int rc = vmm_vq_pop(s->vq, &chain);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (!chain.write_len || chain.read_len < sizeof(head)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	vmm_iov_read(chain.iov, chain.nr_read, 0, head, sizeof(head));
	command.class = head[0];
	command.cmd = head[1];
	command.len = chain.read_len - sizeof(head);
	if (obey(net, &command))
		ack = VIRTIO_NET_OK;
	else
		net->stats.command_errors++;
	net->stats.commands++;
	vmm_iov_write(chain.iov + chain.nr_read, chain.nr_write, 0, &ack, sizeof(ack));
	vmm_vq_push(s->vq, &chain, sizeof(ack));
	return VMM_VQ_CHAIN;
}

/* A tap's queue that nobody serves must not be given frames by the kernel. */
static void attach(struct net_pair *pair, bool on)
{
	struct ifreq request = { .ifr_flags = on ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE };

	/* What fails here would also fail to be read: the tap is gone. */
	if (pair->attached != on && !ioctl(pair->link.fd, TUNSETQUEUE, &request))
		pair->attached = on;
}

/* Frames come and go through the first `pairs` pairs only. */
void net_set_pairs(struct vmm_net *net, uint32_t pairs)
{
	const bool tap = net->config.kind == VMM_NET_TAP && net->config.pairs > 1;
	const uint64_t one = 1;

	for (uint32_t i = 0; i < net->config.pairs; i++) {
		struct net_pair *pair = &net->pairs[i];

		if (tap && i < pairs)
			attach(pair, true);
		pair->active = i < pairs;
		net_arm(pair); /* a detached one would look broken */
		if (tap && i >= pairs)
			attach(pair, false);
		if (pair->rx.service.vq)
			vmm_service_again(&pair->rx.service);
	}
	net->in_use = pairs;
	while (net->config.pairs_fd >= 0 &&
	       write(net->config.pairs_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}
