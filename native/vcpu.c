/* One vCPU's thread: KVM_RUN until something is Python's. */
#define _GNU_SOURCE
#include "vcpu_state.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct vmm_vcpu *vmm_vcpu_create(struct vmm_vm *vm, int fd, uint32_t index, uint64_t run_size)
{
	struct vmm_vcpu *vcpu;

	if (index >= VMM_MAX_VCPUS || vm->vcpus[index] || run_size < sizeof(struct kvm_run)) {
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

			atomic_compare_exchange_strong(&v->vm->first_run_ns, &zero, vmm_now_ns());
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
