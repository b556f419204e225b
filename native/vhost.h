/* The kernel's vhost: rings walked by the host's kernel, for /dev/vhost-net and /dev/vhost-vsock. */
#ifndef VMM_VHOST_H
#define VMM_VHOST_H

#include "service.h"

/* cdef: begin */

/* fd: an open vhost device. All return 0 or -errno. */

/* Makes the process its owner, once, before anything else. */
int vmm_vhost_own(int fd);
int vmm_vhost_features(int fd, uint64_t *features);
/* Before the first ring is started: what was negotiated, and where guest RAM is. */
int vmm_vhost_prepare(int fd, uint64_t features, const struct vmm_mem *mem);
/* Has a ring of the device, from its beginning, be the queue of `config`, which is signalled by
 * call_fd. Nothing of it is walked before the device has a backend, or runs. */
int vmm_vhost_start(int fd, uint32_t ring, int call_fd, const struct vmm_service_config *config);
/* net: what a ring sends to or receives from; -1 for nothing: then it is not touched any more. */
int vmm_vhost_net_backend(int fd, uint32_t ring, int tap_fd);
/* vsock: the guest's address; whether its rings are walked. -EADDRINUSE: another guest has it. */
int vmm_vhost_vsock_cid(int fd, uint64_t cid);
int vmm_vhost_vsock_run(int fd, int on);

/* cdef: end */

#endif
