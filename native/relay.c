/* Eventfds of others, made interrupts. */
#include "relay.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct call {
	struct vmm_source source;
	struct vmm_relay *relay;
	struct vmm_virtio *virtio; /* NULL while stopped */
	uint32_t index;
};

struct vmm_relay {
	struct vmm_loop *loop;
	_Atomic uint64_t count;
	uint32_t nr;
	struct call calls[];
};

/* Edge-triggered, and never read: a read would block if the other side, which shares the open file,
 * made it blocking and emptied it first. */
static void ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct call *call = (struct call *)source; /* its first member */

	(void)epoll_events;
	call->relay->count++;
	vmm_virtio_notify(call->virtio, call->index);
}

struct vmm_relay *vmm_relay_create(struct vmm_loop *loop, uint32_t queues)
{
	struct vmm_relay *r = calloc(1, sizeof(*r) + queues * sizeof(r->calls[0]));
	int err;

	if (!r)
		return NULL;
	r->loop = loop;
	for (; r->nr < queues; r->nr++) {
		struct call *call = &r->calls[r->nr];

		call->relay = r;
		call->index = r->nr;
		call->source.ready = ready;
		call->source.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (call->source.fd < 0) {
			err = errno;
			vmm_relay_destroy(r);
			errno = err;
			return NULL;
		}
	}
	return r;
}

void vmm_relay_destroy(struct vmm_relay *r)
{
	if (!r)
		return;
	for (uint32_t i = 0; i < r->nr; i++) {
		vmm_relay_stop(r, i);
		close(r->calls[i].source.fd);
	}
	free(r);
}

int vmm_relay_fd(const struct vmm_relay *r, uint32_t queue)
{
	return queue < r->nr ? r->calls[queue].source.fd : -1;
}

int vmm_relay_start(struct vmm_relay *r, uint32_t queue, struct vmm_virtio *virtio)
{
	struct call *call;
	int rc;

	if (queue >= r->nr)
		return -EINVAL;
	call = &r->calls[queue];
	if (call->virtio)
		return call->virtio == virtio ? 0 : -EBUSY;
	call->virtio = virtio;
	rc = vmm_loop_add(r->loop, &call->source, EPOLLIN | EPOLLET);
	if (rc)
		call->virtio = NULL;
	return rc;
}

void vmm_relay_stop(struct vmm_relay *r, uint32_t queue)
{
	if (queue >= r->nr || !r->calls[queue].virtio)
		return;
	vmm_loop_remove(r->loop, &r->calls[queue].source);
	r->calls[queue].virtio = NULL;
}

uint64_t vmm_relay_count(const struct vmm_relay *r)
{
	return r->count;
}
