/* vCPU threads: KVM_RUN until something is Python's; pause, resume and stop from any thread. */
#define _GNU_SOURCE
#include "vcpu.h"

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_VCPUS 1024
#define HISTORY 32
#define MAX_COUNTS 512
/* A kick can be lost only if the signal lands while the thread is between user space and
 * KVM_RUN; immediate_exit closes that, and this retry closes what is left. */
#define RETRY_KICK_MS 20

enum request { REQ_RUN, REQ_PAUSE, REQ_STOP };

struct vmm_vcpu {
	struct vmm_vm *vm;
	int fd;
	uint32_t index;
	struct kvm_run *run;
	uint64_t run_size;

	/* under vm->lock */
	pid_t tid; /* of the thread between enter and leave, or 0 */
	bool parked;

	/* the vCPU thread's own */
	bool io_pending; /* the last exit was I/O: KVM finishes it at the next KVM_RUN */
	uint32_t pio_done;
	bool cold; /* an event is with Python */
	uint64_t nr_exits;
	struct vmm_exit history[HISTORY];
	struct vmm_exit_count counts[MAX_COUNTS];
	uint32_t nr_counts;
};

struct vmm_vm {
	int fd;
	struct vmm_mem *mem;
	struct vmm_bus *pio, *mmio;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	_Atomic int request;
	uint32_t pauses;
	_Atomic int counting;
	_Atomic uint64_t first_run_ns;
	struct vmm_vcpu *vcpus[MAX_VCPUS];
};

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

static uint64_t now_ns(void)
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

struct vmm_vcpu *vmm_vcpu_create(struct vmm_vm *vm, int fd, uint32_t index, uint64_t run_size)
{
	struct vmm_vcpu *vcpu;

	if (index >= MAX_VCPUS || vm->vcpus[index] || run_size < sizeof(struct kvm_run)) {
		errno = EINVAL;
		return NULL;
	}
	vcpu = calloc(1, sizeof(*vcpu));
	if (!vcpu)
		return NULL;
	vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (vcpu->run == MAP_FAILED) {
		free(vcpu);
		return NULL;
	}
	vcpu->vm = vm;
	vcpu->fd = fd;
	vcpu->index = index;
	vcpu->run_size = run_size;
	pthread_mutex_lock(&vm->lock);
	vm->vcpus[index] = vcpu;
	pthread_mutex_unlock(&vm->lock);
	return vcpu;
}

void vmm_vcpu_destroy(struct vmm_vcpu *vcpu)
{
	if (!vcpu)
		return;
	pthread_mutex_lock(&vcpu->vm->lock);
	vcpu->vm->vcpus[vcpu->index] = NULL;
	pthread_mutex_unlock(&vcpu->vm->lock);
	munmap(vcpu->run, vcpu->run_size);
	free(vcpu);
}

void *vmm_vcpu_run_area(struct vmm_vcpu *vcpu)
{
	return vcpu->run;
}

int vmm_vcpu_enter(struct vmm_vcpu *vcpu)
{
	int rc = 0;

	pthread_mutex_lock(&vcpu->vm->lock);
	if (vcpu->tid)
		rc = -EBUSY;
	else
		vcpu->tid = (pid_t)syscall(SYS_gettid);
	pthread_mutex_unlock(&vcpu->vm->lock);
	return rc;
}

void vmm_vcpu_leave(struct vmm_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->vm->lock);
	vcpu->tid = 0;
	pthread_cond_broadcast(&vcpu->vm->cond);
	pthread_mutex_unlock(&vcpu->vm->lock);
}

/* ---- requests ------------------------------------------------------------------------------ */

/* With vm->lock held. immediate_exit is set after the request and before the signal: the vCPU
 * clears it before it looks at the request, so one of the two is always seen. */
static void kick_all(struct vmm_vm *vm)
{
	const pid_t self = (pid_t)syscall(SYS_gettid), pid = getpid();

	for (uint32_t i = 0; i < MAX_VCPUS; i++) {
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

	for (uint32_t i = 0; i < MAX_VCPUS; i++) {
		const struct vmm_vcpu *v = vm->vcpus[i];

		if (v && v->tid && v->tid != self && !v->parked)
			return false;
	}
	return true;
}

static void wait_ms(struct vmm_vm *vm, int ms)
{
	const uint64_t until = now_ns() + (uint64_t)ms * 1000000ULL;
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
	const uint64_t until = now_ns() + (uint64_t)timeout_ms * 1000000ULL;
	int rc = 0;

	pthread_mutex_lock(&vm->lock);
	vm->pauses++;
	settle(vm);
	while (!all_parked(vm)) {
		if (now_ns() >= until) {
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

static void park(struct vmm_vcpu *v)
{
	struct vmm_vm *vm = v->vm;

	pthread_mutex_lock(&vm->lock);
	v->parked = true;
	pthread_cond_broadcast(&vm->cond);
	while (atomic_load(&vm->request) == REQ_PAUSE)
		pthread_cond_wait(&vm->cond, &vm->lock);
	v->parked = false;
	pthread_mutex_unlock(&vm->lock);
}

/* ---- exits --------------------------------------------------------------------------------- */

static void record(struct vmm_vcpu *v, uint64_t addr, uint32_t size, uint64_t data, int is_write,
		   int cold)
{
	const uint32_t reason = v->run->exit_reason;

	v->history[v->nr_exits % HISTORY] = (struct vmm_exit){
		.reason = reason, .size = size, .addr = addr,
		.data = data, .is_write = is_write, .cold = cold,
	};
	v->nr_exits++;
	if (!atomic_load_explicit(&v->vm->counting, memory_order_relaxed))
		return;
	for (uint32_t i = 0; i < v->nr_counts; i++) {
		struct vmm_exit_count *c = &v->counts[i];

		if (c->addr == addr && c->reason == reason && c->is_write == (uint32_t)is_write) {
			c->count++;
			c->cold += cold;
			return;
		}
	}
	if (v->nr_counts < MAX_COUNTS)
		v->counts[v->nr_counts++] = (struct vmm_exit_count){
			reason, is_write, addr, 1, cold,
		};
}

static uint32_t hand_over(struct vmm_vcpu *v, struct vmm_event *ev, uint32_t kind)
{
	memset(ev, 0, sizeof(*ev));
	ev->kind = kind;
	ev->vcpu = v->index;
	return kind;
}

static uint32_t hand_over_io(struct vmm_vcpu *v, struct vmm_event *ev, uint32_t kind,
			     uint64_t addr, uint32_t size, uint64_t data, int is_write)
{
	hand_over(v, ev, kind);
	ev->addr = addr;
	ev->size = size;
	ev->is_write = is_write;
	ev->data = data;
	v->cold = true;
	return kind;
}

static uint8_t *pio_data(struct vmm_vcpu *v)
{
	return (uint8_t *)v->run + v->run->io.data_offset +
	       (uint64_t)v->pio_done * v->run->io.size;
}

/* One KVM_EXIT_IO may carry many elements (REP INS/OUTS); goes on where it left off. */
static uint32_t do_pio(struct vmm_vcpu *v, struct vmm_event *ev)
{
	struct kvm_run *run = v->run;
	const int is_write = run->io.direction == KVM_EXIT_IO_OUT;

	for (; v->pio_done < run->io.count; v->pio_done++) {
		uint8_t *data = pio_data(v);
		const int cold = vmm_bus_access(v->vm->pio, run->io.port, run->io.size, data,
						is_write);

		record(v, run->io.port, run->io.size, vmm_get_le(data, run->io.size), is_write,
		       cold);
		if (cold)
			return hand_over_io(v, ev, VMM_EV_PIO, run->io.port, run->io.size,
					    is_write ? vmm_get_le(data, run->io.size) : 0,
					    is_write);
	}
	return VMM_EV_NONE;
}

static uint32_t do_mmio(struct vmm_vcpu *v, struct vmm_event *ev)
{
	struct kvm_run *run = v->run;
	const uint32_t size = run->mmio.len;
	const int cold = vmm_bus_access(v->vm->mmio, run->mmio.phys_addr, size, run->mmio.data,
					run->mmio.is_write);

	record(v, run->mmio.phys_addr, size, vmm_get_le(run->mmio.data, size), run->mmio.is_write,
	       cold);
	if (!cold)
		return VMM_EV_NONE;
	return hand_over_io(v, ev, VMM_EV_MMIO, run->mmio.phys_addr, size,
			    run->mmio.is_write ? vmm_get_le(run->mmio.data, size) : 0,
			    run->mmio.is_write);
}

static void finish_cold(struct vmm_vcpu *v, const struct vmm_event *ev)
{
	struct kvm_run *run = v->run;

	v->cold = false;
	if (run->exit_reason == KVM_EXIT_IO) {
		if (!ev->is_write)
			vmm_put_le(pio_data(v), ev->data, run->io.size);
		v->pio_done++;
	} else if (run->exit_reason == KVM_EXIT_MMIO && !ev->is_write) {
		vmm_put_le(run->mmio.data, ev->data, run->mmio.len);
	}
}

static uint32_t handle_exit(struct vmm_vcpu *v, struct vmm_event *ev)
{
	struct kvm_run *run = v->run;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		v->io_pending = true;
		v->pio_done = 0;
		return do_pio(v, ev);
	case KVM_EXIT_MMIO:
		v->io_pending = true;
		return do_mmio(v, ev);
	case KVM_EXIT_INTR:
		return VMM_EV_NONE;
	default:
		break;
	}
	record(v, 0, 0, 0, 0, 1);
	switch (run->exit_reason) {
	case KVM_EXIT_HLT:
		return hand_over(v, ev, VMM_EV_HLT);
	case KVM_EXIT_SHUTDOWN:
		return hand_over(v, ev, VMM_EV_SHUTDOWN);
	case KVM_EXIT_DEBUG:
		return hand_over(v, ev, VMM_EV_DEBUG);
	case KVM_EXIT_FAIL_ENTRY:
		hand_over(v, ev, VMM_EV_FAIL_ENTRY);
		ev->extra[0] = run->fail_entry.hardware_entry_failure_reason;
		return ev->kind;
	case KVM_EXIT_SYSTEM_EVENT:
		hand_over(v, ev, VMM_EV_SYSTEM);
		ev->extra[0] = run->system_event.type;
		return ev->kind;
	case KVM_EXIT_INTERNAL_ERROR:
		hand_over(v, ev, VMM_EV_INTERNAL);
		ev->extra[0] = run->internal.suberror;
		for (uint32_t i = 0; i < run->internal.ndata && i < 7; i++)
			ev->extra[1 + i] = run->internal.data[i];
		return ev->kind;
	default:
		hand_over(v, ev, VMM_EV_OTHER);
		ev->extra[0] = run->exit_reason;
		return ev->kind;
	}
}

/* Looks at what the VM was asked; returns true when this vCPU must not enter the guest now. */
static bool obey(struct vmm_vcpu *v, bool *complete_only)
{
	*complete_only = false;
	__atomic_store_n(&v->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	switch (atomic_load(&v->vm->request)) {
	case REQ_STOP:
		return true;
	case REQ_PAUSE:
		/* Registers are true only when KVM has finished the last I/O. */
		if (v->io_pending) {
			__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
			*complete_only = true;
			return false;
		}
		park(v);
		return atomic_load(&v->vm->request) == REQ_STOP;
	default:
		return false;
	}
}

uint32_t vmm_vcpu_run(struct vmm_vcpu *v, struct vmm_event *ev)
{
	uint32_t kind = VMM_EV_NONE;
	bool complete_only;

	if (v->cold) {
		const bool pio = v->run->exit_reason == KVM_EXIT_IO;

		finish_cold(v, ev);
		if (pio)
			kind = do_pio(v, ev);
	}
	while (kind == VMM_EV_NONE) {
		if (obey(v, &complete_only))
			return hand_over(v, ev, VMM_EV_STOPPED);
		if (!atomic_load_explicit(&v->vm->first_run_ns, memory_order_relaxed)) {
			uint64_t zero = 0;

			atomic_compare_exchange_strong(&v->vm->first_run_ns, &zero, now_ns());
		}
		if (ioctl(v->fd, KVM_RUN, 0) < 0) {
			if (errno != EINTR && errno != EAGAIN) {
				const int saved = errno;

				hand_over(v, ev, VMM_EV_ERROR);
				ev->extra[0] = saved;
				return ev->kind;
			}
			v->io_pending = false;
			if (complete_only && atomic_load(&v->vm->request) == REQ_PAUSE)
				park(v);
			continue;
		}
		v->io_pending = false;
		kind = handle_exit(v, ev);
	}
	return kind;
}

uint32_t vmm_vcpu_history(struct vmm_vcpu *v, struct vmm_exit *dst, uint32_t max)
{
	const uint64_t kept = v->nr_exits < HISTORY ? v->nr_exits : HISTORY;
	const uint32_t n = kept < max ? (uint32_t)kept : max;

	for (uint32_t i = 0; i < n; i++)
		dst[i] = v->history[(v->nr_exits - n + i) % HISTORY];
	return n;
}

uint32_t vmm_vcpu_counts(struct vmm_vcpu *v, struct vmm_exit_count *dst, uint32_t max)
{
	const uint32_t n = v->nr_counts < max ? v->nr_counts : max;

	memcpy(dst, v->counts, n * sizeof(*dst));
	return n;
}

uint64_t vmm_vcpu_exits(struct vmm_vcpu *v)
{
	return v->nr_exits;
}
