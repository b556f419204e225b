/* virtio-net (virtio-v1.3 §5.1): Ethernet frames between rings and a tap, a stream socket or a
 * packet socket. */
#ifndef VMM_NET_H
#define VMM_NET_H

#include "bucket.h"
#include "service.h"

/* cdef: begin */

/* What the frames go to. TAP: opened with IFF_VNET_HDR and a header of 12 bytes. STREAM: each frame
 * after its length in 4 bytes, big-endian, as passt and QEMU have it. PACKET: a frame a message,
 * on a datagram or sequenced-packet socket. NONE: nowhere; the link is down. */
enum { VMM_NET_NONE, VMM_NET_TAP, VMM_NET_STREAM, VMM_NET_PACKET };

/* Queue pairs; descriptors of a queue, so that all that may be held fit one readv(2); bytes of
 * configuration space, virtio-v1.3 §5.1.4. */
enum { VMM_NET_MAX_PAIRS = 16, VMM_NET_MAX_QUEUE = 512, VMM_NET_SPACE = 12 };

struct vmm_net;

struct vmm_net_config {
	uint32_t kind, pairs, queue_size;
	int fds[16];		/* one a pair; borrowed; a tap's must not block */
	int pairs_fd;		/* eventfd, signalled when vmm_net_pairs() changes; borrowed; or -1 */
	int listener;		/* STREAM without fds: where the other end connects; borrowed; or -1 */
	uint8_t space[12];	/* mac, status, max_virtqueue_pairs, mtu */
	struct vmm_stream *dump; /* gets a pcap record of each frame, or NULL; borrowed */
	/* What the guest is given and what it may send; for the device as a whole. */
	struct vmm_bucket rx_bytes, rx_frames, tx_bytes, tx_frames;
};

struct vmm_net_stats {
	uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes;
	uint64_t rx_dropped; /* too long for the guest's buffers, or too short for a frame */
	uint64_t rx_filtered; /* not for the guest, by the filters that its driver has set */
	uint64_t tx_dropped; /* no link, or not a frame that the driver may send */
	uint64_t tx_errors;  /* refused by the tap or the socket; EIO while a tap is down */
	uint64_t dump_dropped; /* frames missing in the dump, whose file was too slow */
	uint64_t commands, command_errors; /* of the control queue */
};

/* Works on the loop's thread. NULL with errno. */
struct vmm_net *vmm_net_create(struct vmm_loop *loop, const struct vmm_net_config *config);
void vmm_net_destroy(struct vmm_net *net);
/* The driver is there, with these features, before its first queue; for a card whose frames pass
 * elsewhere (vhost), as vmm_net_start() does it too. 0 or -errno. */
int vmm_net_begin(struct vmm_net *net, struct vmm_virtio *virtio, uint64_t features);
/* Any of the queues: 2i receives, 2i+1 transmits, the one after the last pair controls. */
int vmm_net_start(struct vmm_net *net, const struct vmm_service_config *config);
/* Afterwards nothing touches guest memory. A frame that was sent in part is kept, to be sent to
 * its end: the peer could not find the next one otherwise. */
void vmm_net_stop(struct vmm_net *net);
/* The same for one queue. */
void vmm_net_stop_queue(struct vmm_net *net, uint32_t index);
void vmm_net_stats(const struct vmm_net *net, struct vmm_net_stats *out);
/* Pulls the cable, or puts it back; the driver is told. A dead backend stays without link. */
void vmm_net_set_link(struct vmm_net *net, int up);
/* Asks the driver to announce itself to the network. virtio-v1.3 §5.1.6.5.4. */
void vmm_net_announce(struct vmm_net *net);
/* 0 while the backend lives, else the errno it died of; EPIPE: its other end closed; ENOTCONN:
 * nobody has connected yet. */
int vmm_net_dead(const struct vmm_net *net);
/* The configuration space as it is now. */
void vmm_net_space(struct vmm_net *net, uint8_t *out);
/* How many pairs the driver uses: virtio-v1.3 §5.1.6.5.5. */
uint32_t vmm_net_pairs(const struct vmm_net *net);
/* Replaces the limits, now. */
void vmm_net_limit(struct vmm_net *net, const struct vmm_net_config *config);

/* cdef: end */

#endif
