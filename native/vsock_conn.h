/* What the files of virtio-vsock share. All of it belongs to the I/O thread. */
#ifndef VMM_VSOCK_CONN_H
#define VMM_VSOCK_CONN_H

#include "vsock.h"

#include <linux/virtio_vsock.h>
#include <sys/queue.h>
#include <sys/un.h>

#define VSOCK_HOST_CID 2
#define VSOCK_HDR sizeof(struct virtio_vsock_hdr)
/* One more, for a connection that there may be no room for. */
#define VSOCK_SLOTS (VMM_VSOCK_CONNS + VMM_VSOCK_ASKING + 1)
/* RSTs that wait for a receive buffer: the guest's packets are taken up to the first half, the
 * second is for connections that the host ends. Each of those was made known to the guest when
 * none waited, so there are never more. */
#define VSOCK_RSTS (2 * VMM_VSOCK_CONNS)
#define VSOCK_RSTS_OF_GUEST VMM_VSOCK_CONNS
#define VSOCK_QUEUE_MAX 256
/* Receive buffers filled by one system call: Linux offers 4 KiB each. */
#define VSOCK_HELD 16

enum vsock_state {
	VSOCK_FREE,
	VSOCK_ASKING,	 /* a client of the host that has not said "CONNECT" yet */
	VSOCK_REQUESTED, /* the guest was asked, or will be */
	VSOCK_OPEN,
	VSOCK_DRAINING, /* over for the guest; the host has not read all of it */
};

/* Packets a connection owes the guest. */
enum {
	VSOCK_REQUEST = 1 << 0,
	VSOCK_RESPONSE = 1 << 1,
	VSOCK_SHUTDOWN = 1 << 2,
	VSOCK_CREDIT = 1 << 3,
	VSOCK_CREDIT_REQUEST = 1 << 4,
};

struct vsock_conn {
	TAILQ_ENTRY(vsock_conn) link; /* in `ready`, `asking` or `unused` of the device */
	LIST_ENTRY(vsock_conn) hashed;
	enum vsock_state state;
	uint32_t serial; /* tells the slot's users apart */
	int fd;		 /* -1: the host's side is over */
	uint32_t guest_port, host_port;
	uint8_t owed;	  /* packets, see above */
	bool queued;	  /* in `ready` */
	bool big;	  /* has one of the big buffers */
	bool readable;	  /* the host's socket may have more */
	bool eof;	  /* the host sends no more */
	bool deaf;	  /* the host takes no more */
	bool watched;	  /* waiting for room in the host's socket */
	bool shut;	  /* the host was told that no more comes */
	bool credit_asked;
	uint8_t guest_shut; /* VIRTIO_VSOCK_SHUTDOWN_* of the guest */
	uint8_t told_shut;  /* ... and what the guest was told */
	/* From the guest: what the socket did not take yet is in buf[start..start+used), around. */
	uint8_t *buf;
	uint32_t buf_alloc, start, used;
	uint32_t fwd_cnt, told_fwd;
	/* To the guest. */
	uint32_t peer_alloc, peer_fwd, sent;
};

struct vsock_rst {
	uint64_t src_cid;
	uint32_t src_port, dst_port;
	uint16_t type;
};

struct vsock_held {
	struct vmm_chain chain;
	struct iovec *iov;
};

TAILQ_HEAD(vsock_queue, vsock_conn);
LIST_HEAD(vsock_bucket, vsock_conn);

struct vmm_vsock {
	struct vmm_service rx, tx, event;
	struct vmm_source source; /* the epoll descriptor of its own, in the loop's */
	struct vmm_loop *loop;
	uint64_t cid;
	int listen_fd;
	uint16_t queue_size;
	bool waiting; /* the listening socket may have clients that were not accepted */
	bool tx_held; /* the guest's packets are not taken before some RST is sent */
	bool tell_reset;
	uint32_t nr_big, next_port, next_serial;
	/* Receive buffers taken from the ring and not used yet, first come first used. */
	struct vsock_held held[VSOCK_HELD];
	uint32_t held_at, nr_held;
	struct iovec *tx_iov, *event_iov;
	struct vsock_rst rsts[VSOCK_RSTS];
	uint32_t rst_at, nr_rsts;
	struct vsock_queue ready, asking, unused;
	struct vsock_bucket buckets[256];
	struct vsock_conn slots[VSOCK_SLOTS];
	struct vmm_vsock_counts counts;
	size_t path_len;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
};

/* ---- connections: vsock_conn.c ---- */

/* A connection on fd, which is taken in any case. NULL when there is no room. */
struct vsock_conn *vsock_conn_new(struct vmm_vsock *v, int fd, enum vsock_state state);
/* The client said which port: the connection counts now. False when there is no room. */
bool vsock_conn_claim(struct vmm_vsock *v, struct vsock_conn *c, uint32_t guest_port,
		      uint32_t host_port);
struct vsock_conn *vsock_conn_find(struct vmm_vsock *v, uint32_t guest_port, uint32_t host_port);
/* Closes and forgets it; the guest hears nothing. */
void vsock_conn_free(struct vmm_vsock *v, struct vsock_conn *c);
/* The same after an RST to the guest. */
void vsock_conn_reset(struct vmm_vsock *v, struct vsock_conn *c);
/* Over for the guest: frees it once the host has all that is buffered. */
void vsock_conn_drain(struct vmm_vsock *v, struct vsock_conn *c);
/* Queues it if there is something to send to the guest. */
void vsock_conn_wake(struct vmm_vsock *v, struct vsock_conn *c, uint8_t owed);
/* Bytes the guest has room for. */
uint32_t vsock_conn_credit(const struct vsock_conn *c);
/* len bytes of the guest, in iov, which is used up; they fit. */
void vsock_conn_write(struct vmm_vsock *v, struct vsock_conn *c, struct iovec *iov, uint32_t nr,
		      uint32_t len);
/* What the socket can take now of what is buffered. May free a draining one. */
void vsock_conn_flush(struct vmm_vsock *v, struct vsock_conn *c);
/* After `eof`, `deaf` or `guest_shut` changed. */
void vsock_conn_settle(struct vmm_vsock *v, struct vsock_conn *c);
/* The host's peer is gone altogether. */
void vsock_conn_hangup(struct vmm_vsock *v, struct vsock_conn *c);

/* ---- packets: vsock_rx.c, vsock_tx.c ---- */

int vsock_rx_serve(struct vmm_service *s);
int vsock_tx_serve(struct vmm_service *s);
void vsock_tx_flush(struct vmm_service *s);
int vsock_event_serve(struct vmm_service *s);
/* Sends what is ready. */
void vsock_rx_pump(struct vmm_vsock *v);
void vsock_rst(struct vmm_vsock *v, const struct vsock_rst *rst);

/* ---- clients of the host: vsock_host.c ---- */

/* Takes some of those that wait at the listening socket. */
void vsock_host_accept(struct vmm_vsock *v);
void vsock_host_adopt(struct vmm_vsock *v, int fd);
/* Reads "CONNECT <port>\n" if it is there. */
void vsock_host_ask(struct vmm_vsock *v, struct vsock_conn *c);
/* Says "OK". */
void vsock_host_answer(struct vmm_vsock *v, struct vsock_conn *c);
/* The guest's connection to a port of the host: a new connection, or NULL. */
struct vsock_conn *vsock_host_connect(struct vmm_vsock *v, uint32_t guest_port,
				      uint32_t host_port);
/* Listens to the listening socket; also when it was not listened to, or not until EAGAIN. */
int vsock_host_watch(struct vmm_vsock *v);

#define VSOCK_LISTENER UINT32_MAX

static inline bool vsock_running(const struct vmm_vsock *v)
{
	return v->rx.vq && v->tx.vq;
}

#endif
