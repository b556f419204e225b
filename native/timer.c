/* Timers are timerfds in the loop's epoll set. */
#include "timer.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define SECOND 1000000000ULL

uint64_t vmm_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static void ready(struct vmm_source *source, uint32_t epoll_events)
{
	struct vmm_timer *timer = (struct vmm_timer *)source; /* its first member */
	uint64_t times;

	(void)epoll_events;
	if (read(source->fd, &times, sizeof(times)) != sizeof(times))
		return; /* set anew meanwhile */
	timer->set = false;
	timer->expired(timer);
}

int vmm_timer_init(struct vmm_timer *timer, struct vmm_loop *loop,
		   void (*expired)(struct vmm_timer *timer))
{
	int rc;

	timer->source.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (timer->source.fd < 0)
		return -errno;
	timer->source.ready = ready;
	timer->expired = expired;
	timer->set = false;
	rc = vmm_loop_add(loop, &timer->source, EPOLLIN);
	if (rc) {
		close(timer->source.fd);
		return rc;
	}
	timer->loop = loop;
	return 0;
}

void vmm_timer_fini(struct vmm_timer *timer)
{
	if (!timer->loop)
		return;
	vmm_loop_remove(timer->loop, &timer->source);
	close(timer->source.fd);
	timer->loop = NULL;
}

void vmm_timer_set(struct vmm_timer *timer, uint64_t ns)
{
	const struct itimerspec when = {
		.it_value = { .tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND) },
	};

	if (!ns && !timer->set)
		return;
	timer->set = ns != 0;
	timerfd_settime(timer->source.fd, 0, &when, NULL);
}
