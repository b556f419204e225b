/* ioctls of <linux/vhost.h>. */
#include "vhost.h"

#include <errno.h>
#include <linux/vhost.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define MAX_REGIONS 64

static int call(int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg) < 0 ? -errno : 0;
}

int vmm_vhost_own(int fd)
{
	return call(fd, VHOST_SET_OWNER, NULL);
}

int vmm_vhost_features(int fd, uint64_t *features)
{
	return call(fd, VHOST_GET_FEATURES, features);
}

int vmm_vhost_prepare(int fd, uint64_t features, const struct vmm_mem *mem)
{
	struct vhost_memory *table;
	struct vmm_ram ram;
	int rc;

	table = calloc(1, sizeof(*table) + MAX_REGIONS * sizeof(table->regions[0]));
	if (!table)
		return -ENOMEM;
	while (table->nregions < MAX_REGIONS && !vmm_mem_range(mem, table->nregions, &ram))
		table->regions[table->nregions++] = (struct vhost_memory_region){
			.guest_phys_addr = ram.gpa,
			.memory_size = ram.size,
			.userspace_addr = (uintptr_t)ram.hva,
		};
	rc = call(fd, VHOST_SET_FEATURES, &features);
	if (!rc)
		rc = call(fd, VHOST_SET_MEM_TABLE, table);
	free(table);
	return rc;
}

int vmm_vhost_start(int fd, uint32_t ring, int call_fd, const struct vmm_service_config *config)
{
	const struct vmm_vq_config *vq = &config->vq;
	struct vhost_vring_state size = { .index = ring, .num = vq->size };
	struct vhost_vring_state base = { .index = ring };
	struct vhost_vring_file kick = { .index = ring, .fd = config->kick_fd };
	struct vhost_vring_file signal = { .index = ring, .fd = call_fd };
	/* The transport has found each area wholly in one range of RAM, which never moves. */
	struct vhost_vring_addr addr = {
		.index = ring,
		.desc_user_addr = (uintptr_t)vmm_mem_at(config->mem, vq->desc, 1),
		.avail_user_addr = (uintptr_t)vmm_mem_at(config->mem, vq->avail, 1),
		.used_user_addr = (uintptr_t)vmm_mem_at(config->mem, vq->used, 1),
	};
	int rc = call(fd, VHOST_SET_VRING_NUM, &size);

	if (!rc)
		rc = call(fd, VHOST_SET_VRING_BASE, &base);
	if (!rc)
		rc = call(fd, VHOST_SET_VRING_ADDR, &addr);
	if (!rc)
		rc = call(fd, VHOST_SET_VRING_CALL, &signal);
	return rc ? rc : call(fd, VHOST_SET_VRING_KICK, &kick);
}

int vmm_vhost_net_backend(int fd, uint32_t ring, int tap_fd)
{
	struct vhost_vring_file file = { .index = ring, .fd = tap_fd };

	return call(fd, VHOST_NET_SET_BACKEND, &file);
}

int vmm_vhost_vsock_cid(int fd, uint64_t cid)
{
	return call(fd, VHOST_VSOCK_SET_GUEST_CID, &cid);
}

int vmm_vhost_vsock_run(int fd, int on)
{
	return call(fd, VHOST_VSOCK_SET_RUNNING, &on);
}
