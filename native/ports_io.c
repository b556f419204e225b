/* virtio-serial: one port's bytes. */
#define _GNU_SOURCE
#include "ports_port.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes written at a time, and before other sources get a turn: a chain may hold 4 GiB. */
#define PIECE (256u << 10)
#define TURN (1u << 20)

static int watch(struct port *port, int op, uint32_t events)
{
	/* Edges only: bytes that the guest has no room for do not wake the thread again. */
	struct epoll_event ev = {
		.events = events | EPOLLET | (port->out_only ? 0 : EPOLLIN | EPOLLRDHUP),
		.data.u64 = (uint64_t)port->serial << 32 | port->id,
	};

	return epoll_ctl(port->ports->source.fd, op, port->fd, &ev) ? -errno : 0;
}

int port_watch(struct port *port)
{
	struct epoll_event ev = {
		.events = EPOLLIN | EPOLLET,
		.data.u64 = port->id | PORT_LISTENER,
	};

	if (port->listen_fd < 0 || port->fd >= 0)
		return 0;
	if (!epoll_ctl(port->ports->source.fd, EPOLL_CTL_MOD, port->listen_fd, &ev) ||
	    (errno == ENOENT &&
	     !epoll_ctl(port->ports->source.fd, EPOLL_CTL_ADD, port->listen_fd, &ev)))
		return 0;
	return -errno;
}

int port_connect(struct port *port, int fd, bool own)
{
	struct stat st;
	int rc;

	port->fd = fd;
	port->own = own;
	port->serial++;
	port->socket = !fstat(fd, &st) && S_ISSOCK(st.st_mode);
	port->watched = false;
	rc = watch(port, EPOLL_CTL_ADD, 0);
	if (rc && rc != -EPERM) { /* a regular file is always ready */
		if (own)
			close(fd);
		port->fd = -1;
		return rc;
	}
	port->readable = !port->out_only;
	port->state.host_open = 1;
	port->state.error = 0;
	ports_tell(port, PORT_OPEN);
	vmm_service_run(&port->rx);
	return 0;
}

void port_accept(struct port *port)
{
	int fd;

	if (port->listen_fd < 0 || port->fd >= 0)
		return;
	do
		fd = accept4(port->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	while (fd < 0 && (errno == EINTR || errno == ECONNABORTED));
	if (fd >= 0)
		port_connect(port, fd, true);
}

void port_hangup(struct port *port, int error)
{
	if (port->fd < 0)
		return;
	epoll_ctl(port->ports->source.fd, EPOLL_CTL_DEL, port->fd, NULL);
	if (port->own)
		close(port->fd);
	port->fd = -1;
	port->readable = false;
	port->state.host_open = 0;
	port->state.error = error;
	port->owed &= (uint8_t)~PORT_OPEN;
	ports_tell(port, PORT_CLOSE);
	if (port->tx.vq)
		vmm_service_again(&port->tx); /* what was for it goes to nobody */
	port_watch(port);
}

void port_event(struct port *port, uint32_t events)
{
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR) && !port->out_only)
		port->readable = true;
	if (events & (EPOLLHUP | EPOLLERR) && port->out_only) {
		port_hangup(port, -EPIPE);
		return;
	}
	if (events & EPOLLOUT) {
		port->watched = watch(port, EPOLL_CTL_MOD, 0) != 0;
		vmm_service_run(&port->tx);
	}
	/* Who is gone is found out by reading, after all that it wrote. */
	vmm_service_run(&port->rx);
}

/* Bytes written; 0 when there is no room or nobody there. */
static uint32_t put(struct port *port, const struct iovec *iov)
{
	size_t len = iov->iov_len < PIECE ? iov->iov_len : PIECE;
	ssize_t n;

	if (port->limit && len > port->limit - port->state.sent) {
		len = port->limit - port->state.sent;
		if (!len) {
			port_hangup(port, -EFBIG);
			return 0;
		}
	}
	/* SAFETY: the iov is RAM; the kernel reads no more than its length. */
	do
		n = port->socket ? send(port->fd, iov->iov_base, len, MSG_DONTWAIT | MSG_NOSIGNAL)
				 : write(port->fd, iov->iov_base, len);
	while (n < 0 && errno == EINTR);
	if (n > 0)
		return (uint32_t)n;
	if (n < 0 && errno == EAGAIN) {
		if (!port->watched && !watch(port, EPOLL_CTL_MOD, EPOLLOUT))
			port->watched = true;
	} else {
		port_hangup(port, n < 0 ? -errno : -EIO);
	}
	return 0;
}

/* Hands over part of the chain in flight: VMM_VQ_CHAIN when it is finished. */
static int transmit(struct port *port)
{
	uint32_t turn = TURN;

	while (port->nr_left && port->fd >= 0) {
		uint32_t n;

		if (!turn) {
			vmm_service_again(&port->tx);
			return VMM_SERVICE_WAIT;
		}
		n = put(port, port->left);
		if (!n && port->fd >= 0)
			return VMM_SERVICE_WAIT;
		vmm_iov_skip(&port->left, &port->nr_left, n);
		port->state.sent += n;
		turn -= n < turn ? n : turn;
	}
	for (uint32_t i = 0; i < port->nr_left; i++)
		port->state.dropped += port->left[i].iov_len;
	port->sending = false;
	vmm_vq_push(port->tx.vq, &port->out, 0);
	return VMM_VQ_CHAIN;
}

int port_serve_tx(struct vmm_service *s)
{
	struct port *port = (struct port *)((uint8_t *)s - offsetof(struct port, tx));

	if (!port->sending) {
		int rc;

		port->out.iov = port->tx_iov;
		rc = vmm_vq_pop(s->vq, &port->out);
		if (rc != VMM_VQ_CHAIN)
			return rc;
		port->sending = true;
		port->left = port->out.iov;
		port->nr_left = port->out.nr_read;
	}
	return transmit(port);
}

int port_serve_rx(struct vmm_service *s)
{
	struct port *port = (struct port *)((uint8_t *)s - offsetof(struct port, rx));
	ssize_t n;
	int rc;

	/* Linux drops what comes while nobody has the port open. */
	if (port->fd < 0 || !port->readable || !port->state.guest_open)
		return VMM_SERVICE_WAIT;
	if (!port->holding) {
		port->in.iov = port->rx_iov;
		rc = vmm_vq_pop(s->vq, &port->in);
		if (rc != VMM_VQ_CHAIN)
			return rc;
		if (!port->in.write_len) {
			/* virtio-v1.3 §5.3.6: receive buffers are for the device to write. */
			vmm_vq_refuse(s->vq);
			return vmm_vq_broken(s->vq);
		}
		port->holding = true;
	}
	/* SAFETY: the iov is RAM; the kernel writes no more than its parts' lengths. */
	do
		n = readv(port->fd, port->in.iov + port->in.nr_read, (int)port->in.nr_write);
	while (n < 0 && errno == EINTR);
	if (n <= 0) {
		port->readable = false;
		if (n == 0 || errno != EAGAIN)
			port_hangup(port, n < 0 ? -errno : 0);
		return VMM_SERVICE_WAIT;
	}
	port->holding = false;
	port->state.received += (uint64_t)n;
	vmm_vq_push(s->vq, &port->in, (uint64_t)n);
	return VMM_VQ_CHAIN;
}
