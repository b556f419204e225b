/* The state behind the registers of a virtio device: status, features, queues, interrupts.
 * How the two transports lay it out is in virtio_regs.c. */
#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "virtio_regs.h" /* after what it may have to complete */

struct vmm_virtio *vmm_virtio_create(const struct vmm_mem *mem, uint32_t device_id,
				     uint64_t features, const uint16_t *sizes, uint32_t queues)
{
	struct vmm_virtio *v;

	if (queues > VMM_VIRTIO_MAX_QUEUES)
		return NULL;
	v = calloc(1, sizeof(*v) + queues * sizeof(v->queues[0]));
	if (!v)
		return NULL;
	pthread_mutex_init(&v->lock, NULL);
	v->mem = mem;
	v->device_id = device_id;
	v->offered = features;
	v->line_on = true;
	v->nr = queues;
	for (uint32_t i = 0; i < queues; i++) {
		v->queues[i].max = sizes[i];
		v->queues[i].kick = -1;
	}
	vmm_virtio_faces(v);
	vmm_virtio_reset(v);
	return v;
}

void vmm_virtio_destroy(struct vmm_virtio *v)
{
	if (!v)
		return;
	pthread_mutex_destroy(&v->lock);
	free(v->config);
	free(v->vectors);
	free(v);
}

/* ---- queues ---- */

void vmm_virtio_kick_to(struct vmm_virtio *v, uint32_t queue, int eventfd)
{
	if (queue < v->nr)
		v->queues[queue].kick = eventfd;
}

void vmm_virtio_kick_call(struct vmm_virtio *v, uint32_t queue, struct vmm_virtio_kick *kick)
{
	if (queue < v->nr)
		v->queues[queue].call = kick;
}

void vmm_virtio_kick(struct vmm_virtio *v, uint32_t queue)
{
	const uint64_t one = 1;
	struct vmm_virtio_kick *call = queue < v->nr ? v->queues[queue].call : NULL;

	if (call) {
		call->kicked(call);
		return;
	}
	if (queue >= v->nr || v->queues[queue].kick < 0) {
		v->refused++;
		return;
	}
	while (write(v->queues[queue].kick, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static bool area_ok(struct vmm_virtio *v, uint64_t gpa, uint64_t len, uint64_t align)
{
	return !(gpa & (align - 1)) && vmm_mem_at(v->mem, gpa, len);
}

static bool accepted(const struct vmm_virtio *v, unsigned int bit)
{
	return v->accepted >> bit & 1;
}

/* Size, alignment and extent of the three areas of a queue: virtio-v1.3 §2.7, §2.8.10.1. */
static bool queue_ok(struct vmm_virtio *v, const struct vmm_reg_queue *q)
{
	const uint64_t n = q->set.size;

	if (!n || n > q->max || !area_ok(v, q->set.desc, 16 * n, 16))
		return false;
	if (accepted(v, VIRTIO_F_RING_PACKED))
		return area_ok(v, q->set.driver, 4, 4) && area_ok(v, q->set.device, 4, 4);
	return !(n & (n - 1)) && area_ok(v, q->set.driver, 6 + 2 * n, 2) &&
	       area_ok(v, q->set.device, 6 + 8 * n, 4);
}

int vmm_virtio_enable(struct vmm_virtio *v, struct vmm_reg_queue *q)
{
	if (!(v->status & VIRTIO_CONFIG_S_FEATURES_OK) || (v->running && !q->was_reset)) {
		v->refused++;
		return VMM_ACCESS_DONE;
	}
	if (!queue_ok(v, q)) {
		v->refused++;
		vmm_virtio_fail_locked(v);
		return VMM_ACCESS_DONE;
	}
	q->set.enabled = 1;
	q->was_reset = false;
	q->starting = v->running;
	return v->running ? VMM_ACCESS_COLD : VMM_ACCESS_DONE;
}

static void queue_defaults(struct vmm_reg_queue *q)
{
	q->set = (struct vmm_virtio_queue){ .size = q->max };
	q->vector = VMM_NO_VECTOR;
	q->was_reset = q->stopping = q->starting = false;
}

/* virtio-v1.3 §2.6.1. */
int vmm_virtio_queue_reset(struct vmm_virtio *v, struct vmm_reg_queue *q)
{
	if (!accepted(v, VIRTIO_F_RING_RESET) || !(v->status & VIRTIO_CONFIG_S_FEATURES_OK) ||
	    !q->set.enabled) {
		v->refused++;
		return VMM_ACCESS_DONE;
	}
	if (!v->running) {
		queue_defaults(q);
		return VMM_ACCESS_DONE;
	}
	q->stopping = true;
	return VMM_ACCESS_COLD;
}

int vmm_virtio_queue_due(struct vmm_virtio *v, int start)
{
	int due = -1;

	pthread_mutex_lock(&v->lock);
	for (uint32_t i = 0; i < v->nr && due < 0; i++) {
		struct vmm_reg_queue *q = &v->queues[i];

		if (!start && q->stopping)
			due = (int)i;
		if (start && q->starting && !q->stopping) {
			q->starting = false;
			due = (int)i;
		}
	}
	pthread_mutex_unlock(&v->lock);
	return due;
}

void vmm_virtio_queue_stopped(struct vmm_virtio *v, uint32_t queue)
{
	if (queue >= v->nr)
		return;
	pthread_mutex_lock(&v->lock);
	queue_defaults(&v->queues[queue]);
	v->queues[queue].was_reset = v->running;
	pthread_mutex_unlock(&v->lock);
}

int vmm_virtio_queue(struct vmm_virtio *v, uint32_t queue, struct vmm_virtio_queue *out)
{
	if (queue >= v->nr)
		return -EINVAL;
	pthread_mutex_lock(&v->lock);
	*out = v->queues[queue].set;
	pthread_mutex_unlock(&v->lock);
	return 0;
}

/* ---- status and features ---- */

static bool features_ok(const struct vmm_virtio *v)
{
	return (v->status & VIRTIO_CONFIG_S_DRIVER) && !v->accepted_beyond &&
	       !(v->accepted & ~v->offered) && (v->accepted & (1ULL << VIRTIO_F_VERSION_1));
}

/* virtio-v1.3 §2.1 and §3.1.1. */
int vmm_virtio_write_status(struct vmm_virtio *v, uint8_t value)
{
	uint8_t added;

	if (!value) {
		if (v->running)
			return VMM_ACCESS_COLD;
		vmm_virtio_clear(v);
		return VMM_ACCESS_DONE;
	}
	/* NEEDS_RESET is the device's; no other bit is ever cleared one by one. */
	value = (value & ~VIRTIO_CONFIG_S_NEEDS_RESET) | (v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
	if (v->status & ~value) {
		v->refused++;
		return VMM_ACCESS_DONE;
	}
	added = value & ~v->status;
	v->status |= added & ~(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
	if (added & VIRTIO_CONFIG_S_FEATURES_OK) {
		if (features_ok(v))
			v->status |= VIRTIO_CONFIG_S_FEATURES_OK;
		else
			v->refused++;
	}
	if (added & VIRTIO_CONFIG_S_DRIVER_OK) {
		if (v->status & VIRTIO_CONFIG_S_NEEDS_RESET)
			return VMM_ACCESS_DONE;
		if (v->status & VIRTIO_CONFIG_S_FEATURES_OK)
			return VMM_ACCESS_COLD;
		v->refused++;
		v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
	}
	return VMM_ACCESS_DONE;
}

int vmm_virtio_start(struct vmm_virtio *v)
{
	int go;

	pthread_mutex_lock(&v->lock);
	go = !v->running && (v->status & VIRTIO_CONFIG_S_FEATURES_OK) &&
	     !(v->status & VIRTIO_CONFIG_S_NEEDS_RESET);
	if (go) {
		v->running = true;
		v->status |= VIRTIO_CONFIG_S_DRIVER_OK;
	}
	pthread_mutex_unlock(&v->lock);
	return go;
}

void vmm_virtio_clear(struct vmm_virtio *v)
{
	v->running = false;
	v->status = 0;
	v->accepted = 0;
	v->accepted_beyond = false;
	v->offered_sel = v->accepted_sel = v->queue_sel = 0;
	v->config_vector = VMM_NO_VECTOR;
	for (uint32_t i = 0; i < v->nr; i++)
		queue_defaults(&v->queues[i]);
	v->isr = 0;
	vmm_virtio_line_update(v);
}

void vmm_virtio_reset(struct vmm_virtio *v)
{
	pthread_mutex_lock(&v->lock);
	vmm_virtio_clear(v);
	pthread_mutex_unlock(&v->lock);
}

uint32_t vmm_virtio_status(struct vmm_virtio *v)
{
	uint32_t status;

	pthread_mutex_lock(&v->lock);
	status = v->status;
	pthread_mutex_unlock(&v->lock);
	return status;
}

uint64_t vmm_virtio_driver_features(struct vmm_virtio *v)
{
	uint64_t accepted;

	pthread_mutex_lock(&v->lock);
	accepted = v->accepted;
	pthread_mutex_unlock(&v->lock);
	return accepted;
}

uint64_t vmm_virtio_refused(struct vmm_virtio *v)
{
	return v->refused;
}

/* ---- device configuration ---- */

int vmm_virtio_config(struct vmm_virtio *v, const uint8_t *bytes, uint32_t len, int notify)
{
	uint8_t *copy, *old;

	if (len > VMM_VIRTIO_MAX_CONFIG)
		return -E2BIG;
	copy = malloc(len ? len : 1);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, bytes, len);
	pthread_mutex_lock(&v->lock);
	old = v->config;
	v->config = copy;
	v->config_len = len;
	v->generation++;
	if (notify)
		vmm_virtio_tell_config(v);
	pthread_mutex_unlock(&v->lock);
	free(old);
	return 0;
}
