/* virtio-serial: the device, its queues and what its ports are connected to. */
#include "ports_port.h"

#include <errno.h>
#include <linux/virtio_console.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define BATCH 32

static void ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_ports *p =
		(struct vmm_ports *)((uint8_t *)source - offsetof(struct vmm_ports, source));
	struct epoll_event events[BATCH];
	const int n = epoll_wait(source->fd, events, BATCH, 0);

	(void)epoll_events;
	for (int i = 0; i < n; i++) {
		const uint32_t id = (uint32_t)events[i].data.u64;
		struct port *port = &p->port[id & (PORT_LISTENER - 1)];

		if (id & PORT_LISTENER)
			port_accept(port);
		/* An earlier event may have replaced the client. */
		else if (port->fd >= 0 && port->serial == events[i].data.u64 >> 32)
			port_event(port, events[i].events);
	}
}

static void destroy(struct vmm_ports *p)
{
	for (uint32_t i = 0; i < p->nr; i++) {
		free(p->port[i].tx_iov);
		free(p->port[i].rx_iov);
	}
	free(p->control_iov);
	if (p->source.fd >= 0)
		close(p->source.fd);
	free(p);
}

static bool allocate(struct vmm_ports *p)
{
	bool all;

	p->control_iov = calloc(p->queue_size, sizeof(*p->control_iov));
	all = p->control_iov != NULL;
	for (uint32_t i = 0; i < p->nr; i++) {
		struct port *port = &p->port[i];

		port->tx_iov = calloc(p->queue_size, sizeof(*port->tx_iov));
		port->rx_iov = calloc(p->queue_size, sizeof(*port->rx_iov));
		all = all && port->tx_iov && port->rx_iov;
	}
	return all;
}

struct vmm_ports *vmm_ports_create(struct vmm_loop *loop, uint32_t nr, uint16_t queue_size)
{
	struct vmm_ports *p;
	int rc;

	if (!nr || nr > VMM_PORTS_MAX) {
		errno = EINVAL;
		return NULL;
	}
	p = calloc(1, sizeof(*p) + nr * sizeof(p->port[0]));
	if (!p)
		return NULL;
	p->loop = loop;
	p->nr = nr;
	p->queue_size = queue_size;
	p->source.ready = ready;
	p->source.fd = epoll_create1(EPOLL_CLOEXEC);
	rc = p->source.fd < 0 ? -errno : 0;
	if (!rc && !allocate(p))
		rc = -ENOMEM;
	if (!rc)
		rc = vmm_loop_add(loop, &p->source, EPOLLIN);
	if (rc) {
		destroy(p);
		errno = -rc;
		return NULL;
	}
	vmm_service_init(&p->control_rx, loop, ports_serve_control_rx);
	vmm_service_init(&p->control_tx, loop, ports_serve_control_tx);
	for (uint32_t i = 0; i < nr; i++) {
		struct port *port = &p->port[i];

		port->ports = p;
		port->id = i;
		port->fd = port->listen_fd = -1;
		vmm_service_init(&port->rx, loop, port_serve_rx);
		vmm_service_init(&port->tx, loop, port_serve_tx);
	}
	return p;
}

/* Everything from here on runs on the I/O thread, where nobody else looks at the device. */

struct order {
	struct vmm_ports *p;
	uint32_t port, queue;
	const char *name;
	int console, fd, out_only, listen_fd;
	uint64_t limit;
	uint16_t columns, rows;
	const struct vmm_service_config *config;
	struct vmm_port_state *out;
	int rc;
};

static struct port *port_of(const struct order *o)
{
	return &o->p->port[o->port];
}

static int carry_out(struct order *o, void (*fn)(void *arg))
{
	if (o->port >= o->p->nr)
		return -EINVAL;
	vmm_loop_call(o->p->loop, fn, o);
	return o->rc;
}

static void set(void *arg)
{
	struct order *o = arg;
	struct port *port = port_of(o);

	strncpy(port->name, o->name, VMM_PORTS_NAME);
	port->console = o->console;
	port->out_only = o->out_only;
	port->listen_fd = o->listen_fd;
	port->limit = o->limit;
	o->rc = o->fd >= 0 ? port_connect(port, o->fd, false) : port_watch(port);
}

int vmm_ports_set(struct vmm_ports *p, uint32_t port, const char *name, int console, int fd,
		  int out_only, int listen_fd, uint64_t limit)
{
	struct order o = { .p = p, .port = port, .name = name, .console = console, .fd = fd,
			   .out_only = out_only, .listen_fd = listen_fd, .limit = limit };

	return carry_out(&o, set);
}

static void adopt(void *arg)
{
	struct order *o = arg;

	if (port_of(o)->fd >= 0) {
		close(o->fd);
		o->rc = -EBUSY;
		return;
	}
	o->rc = port_connect(port_of(o), o->fd, true);
}

int vmm_ports_adopt(struct vmm_ports *p, uint32_t port, int fd)
{
	struct order o = { .p = p, .port = port, .fd = fd };

	return carry_out(&o, adopt);
}

static void resize(void *arg)
{
	struct order *o = arg;
	struct port *port = port_of(o);

	port->columns = o->columns;
	port->rows = o->rows;
	if (port->console)
		ports_tell(port, PORT_RESIZE);
}

void vmm_ports_resize(struct vmm_ports *p, uint32_t port, uint16_t columns, uint16_t rows)
{
	struct order o = { .p = p, .port = port, .columns = columns, .rows = rows };

	carry_out(&o, resize);
}

static void state(void *arg)
{
	struct order *o = arg;

	*o->out = port_of(o)->state;
}

void vmm_ports_state(struct vmm_ports *p, uint32_t port, struct vmm_port_state *out)
{
	struct order o = { .p = p, .port = port, .out = out };

	carry_out(&o, state);
}

/* The service of a queue; *port, too, if it is a port's. */
static struct vmm_service *service_of(struct vmm_ports *p, uint32_t queue, struct port **port)
{
	const bool transmits = queue & 1;

	if (queue == 2 || queue == 3) {
		*port = NULL;
		return transmits ? &p->control_tx : &p->control_rx;
	}
	*port = &p->port[queue < 2 ? 0 : queue / 2 - 1];
	return transmits ? &(*port)->tx : &(*port)->rx;
}

static void stop_one(struct vmm_ports *p, uint32_t queue)
{
	struct port *port;

	vmm_service_stop(service_of(p, queue, &port));
	if (port && queue & 1)
		port->sending = false;
	else if (port)
		port->holding = false;
}

static void stop_queue(void *arg)
{
	struct order *o = arg;

	stop_one(o->p, o->queue);
}

void vmm_ports_stop_queue(struct vmm_ports *p, uint32_t queue)
{
	struct order o = { .p = p, .queue = queue };

	if (queue < 2 * p->nr + 2)
		carry_out(&o, stop_queue);
}

static void stop(void *arg)
{
	struct vmm_ports *p = arg;

	for (uint32_t queue = 0; queue < 2 * p->nr + 2; queue++)
		stop_one(p, queue);
	for (uint32_t i = 0; i < p->nr; i++) {
		p->port[i].ready = false;
		p->port[i].state.guest_open = 0;
		p->port[i].owed = 0;
	}
}

void vmm_ports_stop(struct vmm_ports *p)
{
	vmm_loop_call(p->loop, stop, p);
}

static void close_all(void *arg)
{
	struct vmm_ports *p = arg;

	stop(p);
	for (uint32_t i = 0; i < p->nr; i++)
		if (p->port[i].own && p->port[i].fd >= 0)
			close(p->port[i].fd);
}

void vmm_ports_destroy(struct vmm_ports *p)
{
	if (!p)
		return;
	vmm_loop_remove(p->loop, &p->source);
	vmm_loop_call(p->loop, close_all, p);
	vmm_service_fini(&p->control_rx);
	vmm_service_fini(&p->control_tx);
	for (uint32_t i = 0; i < p->nr; i++) {
		vmm_service_fini(&p->port[i].rx);
		vmm_service_fini(&p->port[i].tx);
	}
	destroy(p);
}

static void start(void *arg)
{
	struct order *o = arg;
	const bool multiport = o->config->vq.features >> VIRTIO_CONSOLE_F_MULTIPORT & 1;
	struct port *port;
	struct vmm_service *s = service_of(o->p, o->config->index, &port);

	/* A driver without control queues has the one port open all the time. */
	if (port && !multiport && !port->id)
		port->state.guest_open = 1;
	o->rc = vmm_service_start(s, o->config);
}

int vmm_ports_start(struct vmm_ports *p, const struct vmm_service_config *config)
{
	struct order o = { .p = p, .config = config };

	if (config->index >= 2 * p->nr + 2 || config->vq.size > p->queue_size)
		return -EINVAL;
	return carry_out(&o, start);
}
