/* A cable that others plug into: one peer at a time, and the next when it has gone. */
#define _GNU_SOURCE
#include "net_impl.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Nanoseconds until a connection is taken that could not be for want of a descriptor. */
#define RETRY 1000000000

/* The connection is ours, and of no use any more. */
static void hang_up(struct net_pair *pair)
{
	if (pair->link.fd >= 0)
		close(pair->link.fd);
	pair->link.fd = -1;
	pair->hung = false;
	pair->stream_at = pair->stream_len = 0;
	pair->tx.tail_len = 0;
	pair->tx.blocked = false;
}

static void knocked(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_net *net = (struct vmm_net *)((uint8_t *)source -
						 offsetof(struct vmm_net, door));
	const int fd = accept4(source->fd, NULL, NULL, SOCK_CLOEXEC);

	(void)epoll_events;
	if (fd < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED))
		return; /* it went again */
	/* Who else knocks waits in the backlog; so does this one if there is no descriptor. */
	vmm_loop_remove(net->loop, &net->door);
	net->open = false;
	if (fd < 0) {
		vmm_timer_set(&net->door_timer, RETRY);
		return;
	}
	net->pairs[0].link.fd = fd;
	net->dead = 0;
	if (net_linked(net))
		net_set_status(net, VIRTIO_NET_S_LINK_UP, 0);
	net_again(net);
}

static void try_again(struct vmm_timer *timer)
{
	net_listen((struct vmm_net *)((uint8_t *)timer - offsetof(struct vmm_net, door_timer)));
}

int net_listen(struct vmm_net *net)
{
	int rc = 0;

	if (net->config.listener < 0 || net->open)
		return 0;
	if (!net->door_timer.loop)
		rc = vmm_timer_init(&net->door_timer, net->loop, try_again);
	if (rc)
		return rc;
	hang_up(&net->pairs[0]);
	net->door.fd = net->config.listener;
	net->door.ready = knocked;
	rc = vmm_loop_add(net->loop, &net->door, EPOLLIN);
	net->open = !rc;
	return rc;
}

void net_unlisten(struct vmm_net *net)
{
	if (net->config.listener < 0)
		return;
	if (net->open)
		vmm_loop_remove(net->loop, &net->door);
	net->open = false;
	net->dead = ENOTCONN;
	net_arm(&net->pairs[0]);
	hang_up(&net->pairs[0]);
}
