/* virtio-serial: what is said about ports. virtio-v1.3 §5.3.6.2. */
#include "ports_port.h"

#include <endian.h>
#include <linux/virtio_console.h>
#include <string.h>

void ports_tell(struct port *port, uint8_t owed)
{
	/* Before it is ready the guest knows nothing of the port, and is told all at once then. */
	if (!port->ready && owed != PORT_ADD)
		return;
	port->owed |= owed;
	vmm_service_run(&port->ports->control_rx);
}

/* The guest made its side: how things stand. */
static void introduce(struct port *port)
{
	uint8_t owed = PORT_NAME;

	port->ready = true;
	owed |= port->console ? PORT_CONSOLE : 0;
	owed |= port->console && port->columns ? PORT_RESIZE : 0;
	owed |= port->fd >= 0 ? PORT_OPEN : 0;
	ports_tell(port, owed);
}

static void handle(struct vmm_ports *p, uint32_t id, uint16_t event, uint16_t value)
{
	if (event == VIRTIO_CONSOLE_DEVICE_READY && value == 1) {
		for (uint32_t i = 0; i < p->nr; i++)
			ports_tell(&p->port[i], PORT_ADD);
		return;
	}
	if (id >= p->nr)
		return;
	if (event == VIRTIO_CONSOLE_PORT_READY && value == 1)
		introduce(&p->port[id]);
	if (event == VIRTIO_CONSOLE_PORT_OPEN) {
		p->port[id].state.guest_open = value != 0;
		vmm_service_run(&p->port[id].rx);
	}
}

int ports_serve_control_tx(struct vmm_service *s)
{
	struct vmm_ports *p =
		(struct vmm_ports *)((uint8_t *)s - offsetof(struct vmm_ports, control_tx));
	struct vmm_chain chain = { .iov = p->control_iov };
	struct virtio_console_control message;
	const int rc = vmm_vq_pop(s->vq, &chain);

	if (rc != VMM_VQ_CHAIN)
		return rc;
	if (vmm_iov_read(chain.iov, chain.nr_read, 0, &message, sizeof(message)) !=
	    sizeof(message)) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	handle(p, le32toh(message.id), le16toh(message.event), le16toh(message.value));
	vmm_vq_push(s->vq, &chain, 0);
	return VMM_VQ_CHAIN;
}

static struct port *first_owing(struct vmm_ports *p)
{
	for (uint32_t i = 0; i < p->nr; i++)
		if (p->port[i].owed)
			return &p->port[i];
	return NULL;
}

/* The next message of a port that owes one; its length. */
static size_t compose(const struct port *port, uint8_t what, uint8_t *out)
{
	struct virtio_console_control message = { .id = htole32(port->id), .value = htole16(1) };
	size_t len = sizeof(message);

	switch (what) {
	case PORT_ADD:
		message.event = htole16(VIRTIO_CONSOLE_PORT_ADD);
		break;
	case PORT_CONSOLE:
		message.event = htole16(VIRTIO_CONSOLE_CONSOLE_PORT);
		break;
	case PORT_NAME:
		message.event = htole16(VIRTIO_CONSOLE_PORT_NAME);
		memcpy(out + len, port->name, strlen(port->name));
		len += strlen(port->name);
		break;
	case PORT_RESIZE:
		message.event = htole16(VIRTIO_CONSOLE_RESIZE);
		vmm_put_le(out + len, port->columns, 2);
		vmm_put_le(out + len + 2, port->rows, 2);
		len += 4;
		break;
	default:
		message.event = htole16(VIRTIO_CONSOLE_PORT_OPEN);
		message.value = htole16(what == PORT_OPEN);
	}
	memcpy(out, &message, sizeof(message));
	return len;
}

int ports_serve_control_rx(struct vmm_service *s)
{
	struct vmm_ports *p =
		(struct vmm_ports *)((uint8_t *)s - offsetof(struct vmm_ports, control_rx));
	struct port *port = first_owing(p);
	struct vmm_chain chain = { .iov = p->control_iov };
	uint8_t message[sizeof(struct virtio_console_control) + VMM_PORTS_NAME];
	uint8_t what;
	size_t len;
	int rc;

	if (!port)
		return VMM_SERVICE_WAIT;
	rc = vmm_vq_pop(s->vq, &chain);
	if (rc != VMM_VQ_CHAIN)
		return rc;
	what = port->owed & (uint8_t)-port->owed;
	len = compose(port, what, message);
	if (chain.write_len < len) {
		vmm_vq_refuse(s->vq);
		return vmm_vq_broken(s->vq);
	}
	port->owed &= (uint8_t)~what;
	vmm_iov_write(chain.iov + chain.nr_read, chain.nr_write, 0, message, len);
	vmm_vq_push(s->vq, &chain, len);
	return VMM_VQ_CHAIN;
}
