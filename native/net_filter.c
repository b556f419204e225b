/* Which frames the driver wants. Those of sockets are looked at before they are in guest memory. A
 * tap's cannot be, and are not filtered: it could do that by itself (TUNSETTXFILTER), but would go on
 * with it for whoever has it after a vmm that was killed. */
#include "net_impl.h"

#include <linux/if_ether.h>
#include <string.h>

#define MODES (sizeof(((struct net_filter *)0)->mode))
/* Bytes of a table command: nobody has more groups than this. */
#define MAX_DATA 65536

static const uint8_t broadcast[ETH_ALEN] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

bool net_filter_mode(struct vmm_net *net, const struct net_command *c)
{
	const bool extra = net->features >> VIRTIO_NET_F_CTRL_RX_EXTRA & 1;
	uint8_t on;

	if (c->cmd >= MODES || (c->cmd > VIRTIO_NET_CTRL_RX_ALLMULTI && !extra) ||
	    c->len != sizeof(on) || !net_get(c, 0, &on, sizeof(on)))
		return false;
	net->filter.mode[c->cmd] = on;
	return true;
}

/* One table of a command: its length, then addresses. Returns where it ends, 0 if it does not. */
static uint64_t table(const struct net_command *c, uint64_t at, struct net_macs *macs)
{
	uint8_t raw[4];
	uint64_t nr, end;

	if (!net_get(c, at, raw, sizeof(raw)))
		return 0;
	nr = vmm_get_le(raw, sizeof(raw));
	end = at + sizeof(raw) + nr * ETH_ALEN;
	if (end > c->len)
		return 0;
	macs->more = nr > NET_MACS;
	macs->nr = (uint32_t)(macs->more ? NET_MACS : nr);
	if (!net_get(c, at + sizeof(raw), macs->mac, macs->nr * ETH_ALEN))
		return 0;
	return end;
}

bool net_filter_macs(struct vmm_net *net, const struct net_command *c)
{
	struct net_macs unicast = { 0 }, multicast = { 0 };
	uint64_t at;

	if (c->len > MAX_DATA)
		return false;
	at = table(c, 0, &unicast);
	if (!at || table(c, at, &multicast) != c->len)
		return false;
	net->filter.unicast = unicast;
	net->filter.multicast = multicast;
	return true;
}

bool net_filter_vlan(struct vmm_net *net, const struct net_command *c)
{
	uint8_t raw[2];
	uint32_t id;

	if (c->cmd > VIRTIO_NET_CTRL_VLAN_DEL || c->len != sizeof(raw) ||
	    !net_get(c, 0, raw, sizeof(raw)))
		return false;
	id = (uint32_t)vmm_get_le(raw, sizeof(raw));
	if (id >= 4096)
		return false;
	if (c->cmd == VIRTIO_NET_CTRL_VLAN_ADD)
		net->filter.vlans[id / 8] |= (uint8_t)(1 << id % 8);
	else
		net->filter.vlans[id / 8] &= (uint8_t)~(1 << id % 8);
	return true;
}

void net_filter_reset(struct vmm_net *net, uint64_t features)
{
	memset(&net->filter, 0, sizeof(net->filter));
	net->filter.mode[VIRTIO_NET_CTRL_RX_PROMISC] = true;
	net->filter.by_vlan = features >> VIRTIO_NET_F_CTRL_VLAN & 1;
}

static bool listed(const struct net_macs *macs, const uint8_t *mac)
{
	for (uint32_t i = 0; i < macs->nr; i++)
		if (!memcmp(macs->mac[i], mac, ETH_ALEN))
			return true;
	return macs->more;
}

bool net_filter_wants(const struct vmm_net *net, const uint8_t *frame, uint32_t len)
{
	const struct net_filter *f = &net->filter;

	if (!net_filter_on(net) || len < ETH_HLEN)
		return true;
	if (f->by_vlan && len >= NET_FILTER && frame[12] == 0x81 && !frame[13]) {
		const uint32_t id = (uint32_t)(frame[14] & 0xf) << 8 | frame[15];

		if (!(f->vlans[id / 8] >> id % 8 & 1))
			return false;
	}
	if (!memcmp(frame, broadcast, ETH_ALEN))
		return !f->mode[VIRTIO_NET_CTRL_RX_NOBCAST];
	if (frame[0] & 1)
		return !f->mode[VIRTIO_NET_CTRL_RX_NOMULTI] &&
		       (f->mode[VIRTIO_NET_CTRL_RX_ALLMULTI] || listed(&f->multicast, frame));
	return !f->mode[VIRTIO_NET_CTRL_RX_NOUNI] &&
	       (f->mode[VIRTIO_NET_CTRL_RX_ALLUNI] ||
		!memcmp(frame, net->config.space, ETH_ALEN) || listed(&f->unicast, frame));
}
