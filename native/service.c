/* Serving a virtqueue: drain until empty, one interrupt, and never let a guest that keeps adding
 * hold the I/O thread. */
#include "service.h"

#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

/* Chains served before other sources get a turn. */
#define BUDGET 256

void vmm_service_again(struct vmm_service *s)
{
	const uint64_t one = 1;

	while (write(s->source.fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void vmm_service_notify(struct vmm_service *s)
{
	if (vmm_vq_should_notify(s->vq))
		vmm_virtio_notify(s->virtio, s->index);
	if (!vmm_vq_broken(s->vq) || s->failed)
		return;
	s->failed = true;
	if (s->report) {
		s->report->breaks++;
		s->report->verdict = (uint32_t)vmm_vq_broken(s->vq);
	}
	vmm_virtio_fail(s->virtio);
}

void vmm_service_run(struct vmm_service *s)
{
	int left = BUDGET, rc;

	if (!s->vq)
		return;
	/* No kicks while we look anyway. Also not while we wait: the device wakes us. */
	vmm_vq_disable_kicks(s->vq);
	for (;;) {
		if (!left--) {
			vmm_service_again(s);
			break;
		}
		rc = s->serve(s);
		if (rc == VMM_VQ_CHAIN)
			continue;
		if (rc != VMM_VQ_EMPTY || !vmm_vq_enable_kicks(s->vq))
			break;
		vmm_vq_disable_kicks(s->vq);
	}
	if (s->flush)
		s->flush(s);
	vmm_service_notify(s);
}

static void locked_run(struct vmm_service *s)
{
	pthread_mutex_lock(&s->lock);
	vmm_service_run(s);
	pthread_mutex_unlock(&s->lock);
}

static void ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_service *s = (struct vmm_service *)source; /* its first member */
	uint64_t kicks;

	(void)epoll_events;
	if (read(source->fd, &kicks, sizeof(kicks)) == sizeof(kicks))
		locked_run(s);
}

static void kicked(struct vmm_virtio_kick *kick)
{
	locked_run((struct vmm_service *)((uint8_t *)kick - offsetof(struct vmm_service, kick)));
}

void vmm_service_init(struct vmm_service *s, struct vmm_loop *loop,
		      int (*serve)(struct vmm_service *s))
{
	pthread_mutex_init(&s->lock, NULL);
	s->loop = loop;
	s->serve = serve;
	s->source.ready = ready;
	s->kick.kicked = kicked;
}

void vmm_service_fini(struct vmm_service *s)
{
	vmm_service_stop(s);
	pthread_mutex_destroy(&s->lock);
}

static void forget(void *arg)
{
	struct vmm_service *s = arg;

	pthread_mutex_lock(&s->lock);
	if (s->drain)
		s->drain(s);
	vmm_vq_destroy(s->vq);
	s->vq = NULL;
	pthread_mutex_unlock(&s->lock);
}

int vmm_service_start(struct vmm_service *s, const struct vmm_service_config *config)
{
	struct vmm_vq *vq;
	int rc;

	if (s->vq)
		return -EBUSY;
	vq = vmm_vq_create(config->mem, &config->vq);
	if (!vq)
		return -errno;
	pthread_mutex_lock(&s->lock);
	s->vq = vq;
	s->virtio = config->virtio;
	s->index = config->index;
	s->report = config->report;
	s->failed = false;
	s->source.fd = config->kick_fd;
	pthread_mutex_unlock(&s->lock);
	rc = vmm_loop_add(s->loop, &s->source, EPOLLIN);
	if (rc) {
		forget(s);
		return rc;
	}
	if (s->direct)
		vmm_virtio_kick_call(s->virtio, s->index, &s->kick);
	vmm_service_again(s);
	return 0;
}

void vmm_service_stop(struct vmm_service *s)
{
	if (!s->vq)
		return;
	vmm_loop_remove(s->loop, &s->source);
	/* On the I/O thread, as other sources of the device may be looking at the queue there. */
	vmm_loop_call(s->loop, forget, s);
}
