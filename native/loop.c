/* The I/O thread: one epoll loop that serves eventfds, files and sockets. */
#define _GNU_SOURCE
#include "core.h"
#include "timer.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define MAX_SOURCES 1024
/* Rounds of a borrowed loop that always has something to do, before its borrower hears of it. */
#define STEPS 1000

struct call {
	void (*fn)(void *arg);
	void *arg;
	bool done;
	struct call *next;
};

struct vmm_loop {
	int epoll, wake;
	pthread_t thread;
	pthread_t runner; /* atomic: who dispatches, which is `thread` unless that is lent */
	pthread_mutex_t lock; /* calls, stop, lent, sources */
	pthread_cond_t cond;
	struct call *calls;
	bool stop, lent;
	struct call lend; /* runs as long as the loop is lent */
	uint64_t poll_ns; /* atomic */
	struct vmm_source *sources[MAX_SOURCES]; /* index = epoll cookie */
};

static void run_calls(struct vmm_loop *loop)
{
	struct call *c;

	pthread_mutex_lock(&loop->lock);
	while ((c = loop->calls)) {
		loop->calls = c->next;
		pthread_mutex_unlock(&loop->lock);
		c->fn(c->arg);
		pthread_mutex_lock(&loop->lock);
		c->done = true;
		pthread_cond_broadcast(&loop->cond);
	}
	pthread_mutex_unlock(&loop->lock);
}

/* epoll_wait(2) that spins first where the last wait was short; *busy is its memory. */
static int wait_events(struct vmm_loop *loop, struct epoll_event *events, int max, bool *busy)
{
	const uint64_t poll_ns = __atomic_load_n(&loop->poll_ns, __ATOMIC_RELAXED);
	uint64_t start;
	int n = 0;

	if (!poll_ns)
		return epoll_wait(loop->epoll, events, max, -1);
	start = vmm_now();
	while (*busy && !n && vmm_now() - start < poll_ns)
		n = epoll_wait(loop->epoll, events, max, 0);
	if (!n)
		n = epoll_wait(loop->epoll, events, max, -1);
	*busy = vmm_now() - start < poll_ns;
	return n;
}

static void dispatch(struct vmm_loop *loop, const struct epoll_event *events, int n)
{
	for (int i = 0; i < n; i++) {
		struct vmm_source *src;
		uint64_t junk;

		if (events[i].data.u64 == MAX_SOURCES) {
			if (read(loop->wake, &junk, sizeof(junk)) < 0)
				continue; /* only EAGAIN is possible */
			continue;
		}
		/* Looked up again each time: an earlier callback may have removed it. */
		pthread_mutex_lock(&loop->lock);
		src = loop->sources[events[i].data.u64];
		pthread_mutex_unlock(&loop->lock);
		if (src)
			src->ready(src, events[i].events);
	}
	run_calls(loop);
}

static void *loop_main(void *arg)
{
	struct vmm_loop *loop = arg;
	struct epoll_event events[32];
	bool busy = false;

	pthread_setname_np(pthread_self(), "vmm-io");
	__atomic_store_n(&loop->runner, pthread_self(), __ATOMIC_RELAXED);
	for (;;) {
		dispatch(loop, events, wait_events(loop, events, 32, &busy));
		pthread_mutex_lock(&loop->lock);
		if (loop->stop && !loop->calls) {
			pthread_mutex_unlock(&loop->lock);
			return NULL;
		}
		pthread_mutex_unlock(&loop->lock);
	}
}

int vmm_thread_start(pthread_t *thread, void *(*main)(void *arg), void *arg)
{
	sigset_t all, old;
	int rc;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rc = pthread_create(thread, NULL, main, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return rc;
}

struct vmm_loop *vmm_loop_create(void)
{
	struct vmm_loop *loop = calloc(1, sizeof(*loop));
	struct epoll_event ev = { .events = EPOLLIN, .data.u64 = MAX_SOURCES };
	int rc;

	if (!loop)
		return NULL;
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	loop->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (loop->epoll < 0 || loop->wake < 0 ||
	    epoll_ctl(loop->epoll, EPOLL_CTL_ADD, loop->wake, &ev))
		goto fail;
	pthread_mutex_init(&loop->lock, NULL);
	pthread_cond_init(&loop->cond, NULL);
	rc = vmm_thread_start(&loop->thread, loop_main, loop);
	if (!rc)
		return loop;
	errno = rc;
fail:
	rc = errno;
	if (loop->epoll >= 0)
		close(loop->epoll);
	if (loop->wake >= 0)
		close(loop->wake);
	free(loop);
	errno = rc;
	return NULL;
}

static void wake(struct vmm_loop *loop)
{
	const uint64_t one = 1;

	while (write(loop->wake, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

/* Under the lock. */
static void post(struct vmm_loop *loop, struct call *call)
{
	struct call **tail;

	for (tail = &loop->calls; *tail; tail = &(*tail)->next)
		;
	*tail = call;
	wake(loop);
}

void vmm_loop_destroy(struct vmm_loop *loop)
{
	if (!loop)
		return;
	pthread_mutex_lock(&loop->lock);
	loop->stop = true;
	pthread_mutex_unlock(&loop->lock);
	wake(loop);
	pthread_join(loop->thread, NULL);
	close(loop->epoll);
	close(loop->wake);
	pthread_mutex_destroy(&loop->lock);
	pthread_cond_destroy(&loop->cond);
	free(loop);
}

void vmm_loop_call(struct vmm_loop *loop, void (*fn)(void *arg), void *arg)
{
	struct call call = { .fn = fn, .arg = arg };

	if (pthread_equal(pthread_self(), __atomic_load_n(&loop->runner, __ATOMIC_RELAXED))) {
		fn(arg);
		return;
	}
	pthread_mutex_lock(&loop->lock);
	post(loop, &call);
	while (!call.done)
		pthread_cond_wait(&loop->cond, &loop->lock);
	pthread_mutex_unlock(&loop->lock);
}

static void lend(void *arg)
{
	struct vmm_loop *loop = arg;

	pthread_mutex_lock(&loop->lock);
	loop->lent = true;
	pthread_cond_broadcast(&loop->cond);
	while (loop->lent)
		pthread_cond_wait(&loop->cond, &loop->lock);
	__atomic_store_n(&loop->runner, pthread_self(), __ATOMIC_RELAXED);
	pthread_mutex_unlock(&loop->lock);
}

void vmm_loop_borrow(struct vmm_loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	loop->lend = (struct call){ .fn = lend, .arg = loop };
	post(loop, &loop->lend);
	while (!loop->lent)
		pthread_cond_wait(&loop->cond, &loop->lock);
	__atomic_store_n(&loop->runner, pthread_self(), __ATOMIC_RELAXED);
	pthread_mutex_unlock(&loop->lock);
}

void vmm_loop_return(struct vmm_loop *loop)
{
	pthread_mutex_lock(&loop->lock);
	loop->lent = false;
	pthread_cond_broadcast(&loop->cond);
	while (!loop->lend.done)
		pthread_cond_wait(&loop->cond, &loop->lock);
	pthread_mutex_unlock(&loop->lock);
}

void vmm_loop_step(struct vmm_loop *loop, int timeout_ms)
{
	struct epoll_event events[32];
	int n = epoll_wait(loop->epoll, events, 32, timeout_ms);

	for (int left = STEPS; n > 0 && left; left--) {
		dispatch(loop, events, n);
		n = epoll_wait(loop->epoll, events, 32, 0);
	}
	run_calls(loop);
}

int vmm_loop_pin(struct vmm_loop *loop, uint32_t cpu)
{
	cpu_set_t set;

	if (cpu >= CPU_SETSIZE)
		return -EINVAL;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return -pthread_setaffinity_np(loop->thread, sizeof(set), &set);
}

void vmm_loop_poll(struct vmm_loop *loop, uint32_t us)
{
	__atomic_store_n(&loop->poll_ns, us * 1000ULL, __ATOMIC_RELAXED);
}

static void nothing(void *arg)
{
	(void)arg;
}

void vmm_loop_barrier(struct vmm_loop *loop)
{
	vmm_loop_call(loop, nothing, NULL);
}

static int find(struct vmm_loop *loop, const struct vmm_source *src)
{
	for (int i = 0; i < MAX_SOURCES; i++)
		if (loop->sources[i] == src)
			return i;
	return -1;
}

int vmm_loop_add(struct vmm_loop *loop, struct vmm_source *src, uint32_t epoll_events)
{
	struct epoll_event ev = { .events = epoll_events };
	int i, rc = 0;

	pthread_mutex_lock(&loop->lock);
	i = find(loop, src) >= 0 ? -1 : find(loop, NULL);
	if (i < 0) {
		rc = -ENOSPC;
	} else {
		ev.data.u64 = i;
		loop->sources[i] = src;
		if (epoll_ctl(loop->epoll, EPOLL_CTL_ADD, src->fd, &ev)) {
			rc = -errno;
			loop->sources[i] = NULL;
		}
	}
	pthread_mutex_unlock(&loop->lock);
	return rc;
}

int vmm_loop_modify(struct vmm_loop *loop, struct vmm_source *src, uint32_t epoll_events)
{
	struct epoll_event ev = { .events = epoll_events };
	int i, rc = -ENOENT;

	pthread_mutex_lock(&loop->lock);
	i = find(loop, src);
	if (i >= 0) {
		ev.data.u64 = i;
		rc = epoll_ctl(loop->epoll, EPOLL_CTL_MOD, src->fd, &ev) ? -errno : 0;
	}
	pthread_mutex_unlock(&loop->lock);
	return rc;
}

void vmm_loop_remove(struct vmm_loop *loop, struct vmm_source *src)
{
	int i;

	pthread_mutex_lock(&loop->lock);
	i = find(loop, src);
	if (i >= 0) {
		epoll_ctl(loop->epoll, EPOLL_CTL_DEL, src->fd, NULL);
		loop->sources[i] = NULL;
	}
	pthread_mutex_unlock(&loop->lock);
	if (i >= 0)
		vmm_loop_barrier(loop);
}
