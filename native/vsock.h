/* virtio-vsock (virtio-v1.3 §5.10): stream sockets of the guest, carried over the host's AF_UNIX.
 *
 * From the host: connect to the listening socket, write "CONNECT <port>\n", read "OK <host port>\n"
 * once the guest has accepted; the connection is closed if it does not. From the guest: a
 * connection to port P of CID 2 becomes one to <path>_P. */
#ifndef VMM_VSOCK_H
#define VMM_VSOCK_H

#include "service.h"

/* cdef: begin */

struct vmm_vsock;

/* Connections a device carries at once, and clients of the host that have not said which port. */
enum { VMM_VSOCK_CONNS = 512, VMM_VSOCK_ASKING = 64 };
/* What a connection keeps of the guest's bytes for a host that does not read: the first ones have
 * more room than those that come when there are many. */
enum { VMM_VSOCK_BUFFER = 262144, VMM_VSOCK_SMALL_BUFFER = 65536, VMM_VSOCK_BIG_BUFFERS = 64 };

struct vmm_vsock_counts {
	uint32_t conns, asking; /* now */
	uint64_t dropped;	/* packets that were addressed wrongly */
	uint64_t resets;	/* RST to the guest */
	uint64_t from_guest, to_guest; /* bytes */
};

/* listen_fd is borrowed, nonblocking, -1 for none; path is copied, "" for none (connections of the
 * guest are then refused). NULL with errno set. */
struct vmm_vsock *vmm_vsock_create(struct vmm_loop *loop, uint64_t cid, int listen_fd,
				   const char *path, uint16_t queue_size);
/* Hosts that read slowly have a second to take what is left for them. */
void vmm_vsock_destroy(struct vmm_vsock *v);
/* Queue 0 receives (for the guest), queue 1 transmits, queue 2 tells events. */
int vmm_vsock_start(struct vmm_vsock *v, const struct vmm_service_config *config);
/* Connections end; what the guest sent before it closed one still goes out. */
void vmm_vsock_stop(struct vmm_vsock *v);
/* Connections stay, and wait for the queue. */
void vmm_vsock_stop_queue(struct vmm_vsock *v, uint32_t index);
/* A connected socket is served as if it had come to the listening one; fd is taken. */
int vmm_vsock_adopt(struct vmm_vsock *v, int fd);
/* Ends every connection, and has the driver read its CID again: the machine is another one now. */
void vmm_vsock_transport_reset(struct vmm_vsock *v, uint64_t cid);
void vmm_vsock_count(struct vmm_vsock *v, struct vmm_vsock_counts *out);

/* cdef: end */

#endif
