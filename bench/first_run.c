/*
 * LD_PRELOAD shim: writes the CLOCK_MONOTONIC time of a process's first KVM_RUN, in ns, to the
 * file named by FIRST_RUN_FILE. Works on any VMM that calls libc's ioctl.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static _Atomic int seen;

static void note(void)
{
	const char *path = getenv("FIRST_RUN_FILE");
	struct timespec t;
	char text[32];
	int fd, n;

	clock_gettime(CLOCK_MONOTONIC, &t);
	fd = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
	if (fd < 0)
		return;
	n = snprintf(text, sizeof(text), "%lld\n", t.tv_sec * 1000000000LL + t.tv_nsec);
	if (write(fd, text, (size_t)n) != n)
		unlink(path);
	close(fd);
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*next)(int, unsigned long, void *);
	va_list ap;
	void *arg;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	if (!next)
		next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
	if (request == KVM_RUN && !atomic_exchange(&seen, 1))
		note();
	return next(fd, request, arg);
}
