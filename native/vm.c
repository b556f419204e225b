/* The VM that vCPU threads belong to: pause, resume and stop from any thread. */
#define _GNU_SOURCE
#include "vcpu_state.h"

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A kick can be lost only if the signal lands while the thread is between user space and
 * KVM_RUN; immediate_exit closes that, and this retry closes what is left. */
#define RETRY_KICK_MS 20

static int kick_signal(void)
{
	/* Not SIGRTMIN itself: debuggers and libraries like it. */
	return SIGRTMIN + 6;
}

static void on_kick(int sig)
{
	(void)sig; /* its only work is to make KVM_RUN return EINTR */
}

static void install_kick(void)
{
	struct sigaction act = { .sa_handler = on_kick };

	sigemptyset(&act.sa_mask);
	sigaction(kick_signal(), &act, NULL);
}

uint64_t vmm_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

struct vmm_vm *vmm_vm_create(int fd, struct vmm_mem *mem)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct vmm_vm *vm = calloc(1, sizeof(*vm));
	pthread_condattr_t attr;

	if (!vm)
		return NULL;
	pthread_once(&once, install_kick);
	vm->fd = fd;
	vm->mem = mem;
	vm->pio = vmm_bus_create();
	vm->mmio = vmm_bus_create();
	if (!vm->pio || !vm->mmio) {
		vmm_bus_destroy(vm->pio);
		vmm_bus_destroy(vm->mmio);
		free(vm);
		return NULL;
	}
	pthread_mutex_init(&vm->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&vm->cond, &attr);
	pthread_condattr_destroy(&attr);
	return vm;
}

void vmm_vm_destroy(struct vmm_vm *vm)
{
	if (!vm)
		return;
	vmm_bus_destroy(vm->pio);
	vmm_bus_destroy(vm->mmio);
	pthread_mutex_destroy(&vm->lock);
	pthread_cond_destroy(&vm->cond);
	free(vm);
}

struct vmm_bus *vmm_vm_pio(struct vmm_vm *vm)
{
	return vm->pio;
}

struct vmm_bus *vmm_vm_mmio(struct vmm_vm *vm)
{
	return vm->mmio;
}

void vmm_vm_count_exits(struct vmm_vm *vm, int on)
{
	atomic_store(&vm->counting, on);
}

uint64_t vmm_vm_first_run_ns(struct vmm_vm *vm)
{
	return atomic_load(&vm->first_run_ns);
}

/* With vm->lock held. immediate_exit is set after the request and before the signal: the vCPU
 * clears it before it looks at the request, so one of the two is always seen. */
static void kick_all(struct vmm_vm *vm)
{
	const pid_t self = (pid_t)syscall(SYS_gettid), pid = getpid();

	for (uint32_t i = 0; i < VMM_MAX_VCPUS; i++) {
		struct vmm_vcpu *v = vm->vcpus[i];

		if (!v || !v->tid || v->parked)
			continue;
		__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		if (v->tid != self)
			syscall(SYS_tgkill, pid, v->tid, kick_signal());
	}
}

static bool all_parked(struct vmm_vm *vm)
{
	const pid_t self = (pid_t)syscall(SYS_gettid);

	for (uint32_t i = 0; i < VMM_MAX_VCPUS; i++) {
		const struct vmm_vcpu *v = vm->vcpus[i];

		if (v && v->tid && v->tid != self && !v->parked)
			return false;
	}
	return true;
}

static void wait_ms(struct vmm_vm *vm, int ms)
{
	const uint64_t until = vmm_now_ns() + (uint64_t)ms * 1000000ULL;
	const struct timespec t = { .tv_sec = (time_t)(until / 1000000000ULL),
				    .tv_nsec = (long)(until % 1000000000ULL) };

	pthread_cond_timedwait(&vm->cond, &vm->lock, &t);
}

static void settle(struct vmm_vm *vm)
{
	/* Stopping wins over pausing, pausing over running. */
	if (atomic_load(&vm->request) != REQ_STOP)
		atomic_store(&vm->request, vm->pauses ? REQ_PAUSE : REQ_RUN);
	pthread_cond_broadcast(&vm->cond);
}

int vmm_vm_pause(struct vmm_vm *vm, int timeout_ms)
{
	const uint64_t until = vmm_now_ns() + (uint64_t)timeout_ms * 1000000ULL;
	int rc = 0;

	pthread_mutex_lock(&vm->lock);
	vm->pauses++;
	settle(vm);
	while (!all_parked(vm)) {
		if (vmm_now_ns() >= until) {
			vm->pauses--;
			settle(vm);
			rc = -ETIMEDOUT;
			break;
		}
		kick_all(vm);
		wait_ms(vm, RETRY_KICK_MS);
	}
	pthread_mutex_unlock(&vm->lock);
	return rc;
}

void vmm_vm_resume(struct vmm_vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	if (vm->pauses)
		vm->pauses--;
	settle(vm);
	pthread_mutex_unlock(&vm->lock);
}

void vmm_vm_stop(struct vmm_vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	atomic_store(&vm->request, REQ_STOP);
	pthread_cond_broadcast(&vm->cond);
	kick_all(vm);
	pthread_mutex_unlock(&vm->lock);
}

int vmm_vm_stopping(struct vmm_vm *vm)
{
	return atomic_load(&vm->request) == REQ_STOP;
}
