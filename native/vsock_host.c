/* virtio-vsock: the host's AF_UNIX side, where connections begin. */
#define _GNU_SOURCE
#include "vsock_conn.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Clients taken before others get a turn. */
#define ACCEPTS 32
/* The longest that is understood is "CONNECT 4294967295\r\n". */
#define LINE 32
/* Where ports of host-initiated connections begin: those below are for servers. */
#define FIRST_PORT (1U << 30)

int vsock_host_watch(struct vmm_vsock *v)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET, .data.u64 = VSOCK_LISTENER };

	v->waiting = false;
	if (v->listen_fd < 0)
		return 0;
	if (!epoll_ctl(v->source.fd, EPOLL_CTL_MOD, v->listen_fd, &ev) ||
	    (errno == ENOENT && !epoll_ctl(v->source.fd, EPOLL_CTL_ADD, v->listen_fd, &ev)))
		return 0;
	return -errno;
}

void vsock_host_accept(struct vmm_vsock *v)
{
	/* Who comes before the guest's driver does waits. */
	for (int i = 0; vsock_running(v) && i < ACCEPTS; i++) {
		const int fd = accept4(v->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd >= 0) {
			vsock_host_adopt(v, fd);
		} else if (errno == EAGAIN) {
			return;
		} else if (errno != EINTR && errno != ECONNABORTED) {
			v->waiting = true; /* for a descriptor to become free */
			return;
		}
	}
	if (vsock_running(v))
		vsock_host_watch(v);
}

void vsock_host_adopt(struct vmm_vsock *v, int fd)
{
	struct vsock_conn *c;

	/* Who takes longest to speak makes room. */
	if (v->counts.asking >= VMM_VSOCK_ASKING)
		vsock_conn_free(v, TAILQ_FIRST(&v->asking));
	c = vsock_conn_new(v, fd, VSOCK_ASKING);
	if (c)
		vsock_host_ask(v, c);
}

/* The port in a line of len bytes without its newline, or -1. */
static int64_t parse(const char *line, size_t len)
{
	int64_t port = 0;

	if (len && line[len - 1] == '\r')
		len--;
	if (len < 9 || len > 18 || strncasecmp(line, "CONNECT ", 8) != 0)
		return -1;
	for (size_t i = 8; i < len; i++) {
		if (line[i] < '0' || line[i] > '9')
			return -1;
		port = 10 * port + (line[i] - '0');
	}
	return port < UINT32_MAX ? port : -1; /* the last one is VMADDR_PORT_ANY */
}

static uint32_t choose_port(struct vmm_vsock *v, uint32_t guest_port)
{
	do
		v->next_port = (v->next_port + 1) % FIRST_PORT;
	while (vsock_conn_find(v, guest_port, FIRST_PORT + v->next_port));
	return FIRST_PORT + v->next_port;
}

void vsock_host_ask(struct vmm_vsock *v, struct vsock_conn *c)
{
	char line[LINE];
	const char *end;
	int64_t port = -1;
	ssize_t n;

	if (!vsock_running(v))
		return;
	/* What follows the line is the guest's: it stays in the socket. */
	n = recv(c->fd, line, sizeof(line), MSG_PEEK | MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	end = n > 0 ? memchr(line, '\n', (size_t)n) : NULL;
	if (n > 0 && !end && n < LINE)
		return;
	if (end && recv(c->fd, line, (size_t)(end - line) + 1, MSG_DONTWAIT) == end - line + 1)
		port = parse(line, (size_t)(end - line));
	if (port < 0 ||
	    !vsock_conn_claim(v, c, (uint32_t)port, choose_port(v, (uint32_t)port))) {
		vsock_conn_free(v, c);
		return;
	}
	vsock_conn_wake(v, c, VSOCK_REQUEST);
}

void vsock_host_answer(struct vmm_vsock *v, struct vsock_conn *c)
{
	char line[LINE];
	const int len = snprintf(line, sizeof(line), "OK %u\n", c->host_port);

	c->state = VSOCK_OPEN;
	if (send(c->fd, line, (size_t)len, MSG_DONTWAIT | MSG_NOSIGNAL) != len) {
		vsock_conn_reset(v, c);
		return;
	}
	c->readable = true;
	vsock_conn_wake(v, c, 0);
}

struct vsock_conn *vsock_host_connect(struct vmm_vsock *v, uint32_t guest_port, uint32_t host_port)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	struct vsock_conn *c;
	int fd;

	if (!v->path_len)
		return NULL;
	memcpy(addr.sun_path, v->path, v->path_len);
	if ((size_t)snprintf(addr.sun_path + v->path_len, sizeof(addr.sun_path) - v->path_len,
			     "_%u", host_port) >= sizeof(addr.sun_path) - v->path_len)
		return NULL;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return NULL;
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr))) {
		close(fd);
		return NULL;
	}
	c = vsock_conn_new(v, fd, VSOCK_OPEN);
	if (!c)
		return NULL;
	/* Not hashed before it is claimed. */
	c->state = VSOCK_FREE;
	if (!vsock_conn_claim(v, c, guest_port, host_port)) {
		vsock_conn_free(v, c);
		return NULL;
	}
	c->state = VSOCK_OPEN;
	c->readable = true;
	return c;
}
