/* Between the parts of virtio-net: native/net.c (the device), net_rx.c, net_tx.c, net_ctrl.c (its
 * queues), net_link.c (what is on the other side). All of it runs on the device's I/O thread, but
 * for what says otherwise. */
#ifndef VMM_NET_IMPL_H
#define VMM_NET_IMPL_H

#include "net.h"
#include "timer.h"

#include <linux/virtio_net.h>

/* struct virtio_net_hdr_v1 comes before each frame. virtio-v1.3 §5.1.6. */
#define NET_HDR ((uint32_t)sizeof(struct virtio_net_hdr_v1))
#define NET_MIN_FRAME 14
/* A 64 KiB IP packet in a frame with two VLAN tags, and more than a tap ever gives. */
#define NET_MAX_FRAME (65536 + 64)
#define NET_PREFIX 4
#define NET_BATCH 64

/* A command of the control queue. */
struct net_command {
	uint8_t class, cmd;
	const struct vmm_chain *chain;
	uint64_t len; /* of its data */
};

/* `n` bytes of the data from `at` on; false if there are fewer. */
static inline bool net_get(const struct net_command *c, uint64_t at, void *dst, size_t n)
{
	return vmm_iov_read(c->chain->iov, c->chain->nr_read, 2 + at, dst, n) == n;
}

/* Addresses that are kept; of a longer list all are let through. */
#define NET_MACS 64

struct net_macs {
	uint32_t nr;
	bool more;
	uint8_t mac[NET_MACS][6];
};

/* What the driver wants to receive: virtio-v1.3 §5.1.6.5.1 to 5.1.6.5.3. */
struct net_filter {
	bool mode[6]; /* by VIRTIO_NET_CTRL_RX_* */
	struct net_macs unicast, multicast;
	bool by_vlan;
	uint8_t vlans[4096 / 8];
};

/* What a pair receives into: chains of the guest that wait for frames. */
struct net_rx {
	struct vmm_service service;
	struct vmm_timer timer; /* until the limit allows another frame */
	struct vmm_chain *held; /* [first, first + nr), of up to 2 * queue_size */
	uint32_t first, nr;
	struct iovec *iov; /* theirs, [iov_first, iov_first + nr_iov) */
	uint32_t iov_first, nr_iov;
	uint64_t room;	   /* bytes in them */
	struct iovec *scratch;
	uint8_t *spill;	   /* what did not fit into them, of the frame of `pending` bytes */
	uint32_t pending;
	uint32_t size;	   /* of the queue */
	uint32_t want;	   /* bytes of room to have before a frame is fetched */
	bool mergeable, starved;
};

struct net_frame {
	struct vmm_chain chain;
	uint32_t start, nr; /* in the pool, what precedes it included */
	uint32_t whole, left; /* bytes in all, and not yet sent; 0: to be dropped */
	uint8_t head[16];   /* prefix or header, not in guest memory */
};

/* What a pair transmits: frames taken from the guest and not yet sent, oldest first. */
struct net_tx {
	struct vmm_service service;
	struct vmm_timer timer;
	struct net_frame frames[NET_BATCH];
	uint32_t nr, done, pushed; /* taken, sent or dropped, given back */
	struct iovec *pool;
	uint32_t used, sent; /* in the pool */
	uint8_t *tail;	     /* the rest of a frame whose guest was reset */
	uint32_t tail_at, tail_len;
	uint64_t features;
	bool blocked; /* until the socket has room */
};

struct net_pair {
	struct net_rx rx;
	struct net_tx tx;
	struct vmm_source link;
	struct vmm_net *net;
	uint32_t index;
	bool active;	 /* the driver wants it to be used: MQ */
	bool attached;	 /* the tap's queue is in use */
	bool registered; /* with the loop, for `armed` */
	bool hung;	 /* the other end is gone; what it sent may still be there */
	uint32_t armed;
	/* STREAM: what was read and not yet delivered. */
	uint8_t *stream;
	uint32_t stream_at, stream_len;
};

struct vmm_net {
	struct vmm_loop *loop;
	struct vmm_net_config config;
	struct vmm_net_stats stats;
	struct vmm_service ctrl;
	struct iovec *ctrl_iov;
	uint64_t features; /* negotiated */
	pthread_mutex_t lock; /* config.space, virtio, and the order of what is published */
	struct vmm_virtio *virtio; /* NULL while stopped */
	bool begun;		   /* since the last reset a queue was started */
	struct net_filter filter;
	_Atomic uint32_t in_use;   /* pairs, by the driver's choice */
	bool stale;		   /* the space changed while stopped */
	uint8_t mac[6];		   /* the one it began with */
	_Atomic bool up;	   /* the cable is in */
	_Atomic int dead;	   /* errno */
	struct vmm_source door;	   /* the listener, in the loop while nobody is connected */
	struct vmm_timer door_timer;
	bool open;
	pthread_mutex_t dump_lock;
	uint8_t *dump_record;
	struct net_pair *pairs;
};

static inline bool net_linked(const struct vmm_net *net)
{
	return net->up && !net->dead && net->config.kind != VMM_NET_NONE;
}

/* ---- net.c ---- */

/* The backend is of no use any more: the link goes down, for good. */
void net_die(struct vmm_net *net, int error);
/* Changes bits of the status field. Any thread. */
void net_set_status(struct vmm_net *net, uint16_t set, uint16_t clear);
/* Makes the epoll set fit what the queues wait for. */
void net_arm(struct net_pair *pair);
/* Lets every queue look again. */
void net_again(struct vmm_net *net);

/* ---- net_meter.c ---- */

/* Nanoseconds until both allow another frame. */
uint64_t net_throttle(const struct vmm_bucket *bytes, const struct vmm_bucket *frames);
void net_charge(struct vmm_bucket *bytes, struct vmm_bucket *frames, uint64_t len);
/* A pcap record of a frame that begins `skip` bytes into the buffers. */
void net_dump(struct vmm_net *net, const struct iovec *iov, uint32_t nr, uint32_t skip,
	      uint32_t len);

/* ---- net_listen.c ---- */

/* Waits for somebody to connect, if there is a listener. 0 or -errno. */
int net_listen(struct vmm_net *net);
void net_unlisten(struct vmm_net *net);

/* ---- net_rx.c ---- */

int net_rx_init(struct net_pair *pair);
void net_rx_fini(struct net_pair *pair);
int net_rx_start(struct net_pair *pair, const struct vmm_service_config *config);
void net_rx_stop(struct net_pair *pair);

/* ---- net_tx.c ---- */

int net_tx_init(struct net_pair *pair);
void net_tx_fini(struct net_pair *pair);
int net_tx_start(struct net_pair *pair, const struct vmm_service_config *config);
void net_tx_stop(struct net_pair *pair);

/* ---- net_ctrl.c ---- */

int net_ctrl_serve(struct vmm_service *s);
void net_set_pairs(struct vmm_net *net, uint32_t pairs);

/* ---- net_filter.c ---- */

/* Commands; false: it makes no sense. */
bool net_filter_mode(struct vmm_net *net, const struct net_command *c);
bool net_filter_macs(struct vmm_net *net, const struct net_command *c);
bool net_filter_vlan(struct vmm_net *net, const struct net_command *c);
/* Everything is wanted, as it is before the first command; VLANs if the driver names those. */
void net_filter_reset(struct vmm_net *net, uint64_t features);
/* Whether the driver wants a frame that begins with these bytes, NET_FILTER of them if it is that
 * long. */
#define NET_FILTER 16
bool net_filter_wants(const struct vmm_net *net, const uint8_t *frame, uint32_t len);
/* Whether there can be a frame that it does not want. */
static inline bool net_filter_on(const struct vmm_net *net)
{
	return !net->filter.mode[VIRTIO_NET_CTRL_RX_PROMISC];
}

/* ---- net_link.c ---- */

/* Fetches one frame into the buffers, behind its header of NET_HDR bytes; iov[nr] is the spill.
 * Returns the length with the header, -ENOMSG for one that the driver does not want (the buffers
 * are as they were), -EAGAIN, or another -errno when the backend died. */
int net_fetch(struct net_pair *pair, struct iovec *iov, uint32_t nr);
/* Sends what there is; done frames are counted in tx.done. 0, -EAGAIN, or another -errno. */
int net_send(struct net_pair *pair);
/* Bytes that stand before the frame on this link, in net_frame.head. */
uint32_t net_lead(const struct vmm_net *net);
/* Tells a tap which offloads the guest takes (feature bits); 0 or -errno. */
int net_set_offloads(struct vmm_net *net, uint64_t features);

#endif
