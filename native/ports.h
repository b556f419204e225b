/* virtio-serial: the console device (virtio-v1.3 §5.3) with VIRTIO_CONSOLE_F_MULTIPORT: named
 * ports, each of which is a descriptor of the host. Bytes go straight between guest memory and the
 * descriptor; who does not read holds its port back and nobody else. */
#ifndef VMM_PORTS_H
#define VMM_PORTS_H

#include "service.h"

/* cdef: begin */

struct vmm_ports;

enum { VMM_PORTS_MAX = 31, VMM_PORTS_NAME = 64 };

struct vmm_port_state {
	int host_open, guest_open;
	uint64_t sent, received, dropped; /* bytes: of the guest, to it, of it for nobody */
	int error; /* 0, or the -errno that ended the host's side last */
};

/* NULL with errno set. */
struct vmm_ports *vmm_ports_create(struct vmm_loop *loop, uint32_t nr, uint16_t queue_size);
void vmm_ports_destroy(struct vmm_ports *p);
/* Before the guest starts. fd: written to, and read from unless `out_only`; -1 for none. Clients of
 * listen_fd (nonblocking, or -1) take turns. Both are borrowed. console: the guest shall make it a
 * terminal. After `limit` bytes of the guest (0: none) fd is left with -EFBIG. 0 or -errno. */
int vmm_ports_set(struct vmm_ports *p, uint32_t port, const char *name, int console, int fd,
		  int out_only, int listen_fd, uint64_t limit);
/* A connected, nonblocking socket becomes the client of a port that has none. fd is taken in any
 * case. 0, -EBUSY or another -errno. */
int vmm_ports_adopt(struct vmm_ports *p, uint32_t port, int fd);
/* The terminal has another size now. */
void vmm_ports_resize(struct vmm_ports *p, uint32_t port, uint16_t columns, uint16_t rows);
/* Queues 0 and 1 are port 0's to receive and to transmit, 2 and 3 control, 4 and 5 port 1's ... */
int vmm_ports_start(struct vmm_ports *p, const struct vmm_service_config *config);
void vmm_ports_stop(struct vmm_ports *p);
/* The others go on. */
void vmm_ports_stop_queue(struct vmm_ports *p, uint32_t queue);
void vmm_ports_state(struct vmm_ports *p, uint32_t port, struct vmm_port_state *out);

/* cdef: end */

#endif
