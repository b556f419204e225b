/* What the files of virtio-serial share. All of it belongs to the I/O thread. */
#ifndef VMM_PORTS_PORT_H
#define VMM_PORTS_PORT_H

#include "ports.h"

/* Messages a port owes the guest, in the order they are sent. */
enum {
	PORT_ADD = 1 << 0,
	PORT_CONSOLE = 1 << 1,
	PORT_NAME = 1 << 2,
	PORT_RESIZE = 1 << 3,
	PORT_CLOSE = 1 << 4,
	PORT_OPEN = 1 << 5,
};

struct port {
	struct vmm_service rx, tx;
	struct vmm_ports *ports;
	uint32_t id;
	char name[VMM_PORTS_NAME + 1];
	bool console;
	int listen_fd;
	int fd; /* -1: nobody there */
	bool own;      /* fd is a client, closed when it is done */
	bool out_only; /* fd is not read */
	bool socket, watched, readable;
	uint64_t limit; /* of what the guest sends, or 0 */
	uint32_t serial; /* tells clients apart */
	bool ready;	 /* the guest has made its side of the port */
	uint8_t owed;
	uint16_t columns, rows;
	struct vmm_port_state state;
	/* The chain that is transmitted: what is left of it. The one that waits for bytes. */
	struct iovec *tx_iov, *rx_iov, *left;
	uint32_t nr_left;
	bool sending, holding;
	struct vmm_chain out, in;
};

struct vmm_ports {
	struct vmm_service control_rx, control_tx;
	struct vmm_source source; /* the epoll descriptor of its own, in the loop's */
	struct vmm_loop *loop;
	uint16_t queue_size;
	struct iovec *control_iov;
	uint32_t nr;
	struct port port[];
};

/* ---- one port and its descriptor: ports_io.c ---- */

int port_serve_rx(struct vmm_service *s);
int port_serve_tx(struct vmm_service *s);
/* Somebody is there from now on; fd is taken if own. 0 or -errno. */
int port_connect(struct port *port, int fd, bool own);
/* The next client, if one waits and there is room for it. */
void port_accept(struct port *port);
/* Nobody is there any more: the guest is told. */
void port_hangup(struct port *port, int error);
/* What epoll said about fd. */
void port_event(struct port *port, uint32_t events);
/* Listens to the listening socket. 0 or -errno. */
int port_watch(struct port *port);

#define PORT_LISTENER (1u << 16)

/* ---- control messages: ports_control.c ---- */

int ports_serve_control_rx(struct vmm_service *s);
int ports_serve_control_tx(struct vmm_service *s);
/* The guest shall hear of it. */
void ports_tell(struct port *port, uint8_t owed);

#endif
