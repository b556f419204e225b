/* vCPU threads: KVM_RUN, exits, pause, stop. */
#ifndef VMM_VCPU_H
#define VMM_VCPU_H

#include "core.h"

/* cdef: begin */

enum {
	VMM_EV_NONE,	   /* nothing yet: the first call of a vCPU thread */
	VMM_EV_PIO,	   /* data: for a read, fill it before the next vmm_vcpu_run */
	VMM_EV_MMIO,
	VMM_EV_HLT,
	VMM_EV_SHUTDOWN,   /* an exception could not be delivered */
	VMM_EV_INTERNAL,   /* extra[0] = suberror, extra[1..] = its data */
	VMM_EV_FAIL_ENTRY, /* extra[0] = hardware_entry_failure_reason */
	VMM_EV_SYSTEM,	   /* extra[0] = KVM_SYSTEM_EVENT_* */
	VMM_EV_DEBUG,
	VMM_EV_OTHER,	   /* an exit reason nobody handles: extra[0] = exit_reason */
	VMM_EV_ERROR,	   /* KVM_RUN itself failed: extra[0] = errno */
	VMM_EV_STOPPED,	   /* the VM was asked to stop; the thread ends */
};

/* The one thing that crosses from C to Python for a cold exit. */
struct vmm_event {
	uint32_t kind;	   /* VMM_EV_* */
	uint32_t vcpu;	   /* index */
	uint64_t addr;	   /* port or guest-physical address */
	uint32_t size;	   /* bytes: 1, 2, 4 or 8 */
	uint32_t is_write;
	uint64_t data;	   /* little-endian value, zero-extended */
	uint64_t extra[8];
};

/* One line of a vCPU's exit history. */
struct vmm_exit {
	uint32_t reason;   /* KVM_EXIT_* */
	uint32_t size;
	uint64_t addr;
	uint64_t data;
	uint32_t is_write;
	uint32_t cold;	   /* Python was asked */
};

/* Where exits went, by address; filled when counting is on. */
struct vmm_exit_count {
	uint32_t reason;
	uint32_t is_write;
	uint64_t addr;
	uint64_t count;
	uint64_t cold;
};

struct vmm_vm;
struct vmm_vcpu;

/* fd and mem are borrowed. */
struct vmm_vm *vmm_vm_create(int fd, struct vmm_mem *mem);
void vmm_vm_destroy(struct vmm_vm *vm); /* no thread may be inside */
struct vmm_bus *vmm_vm_pio(struct vmm_vm *vm);
struct vmm_bus *vmm_vm_mmio(struct vmm_vm *vm);
void vmm_vm_count_exits(struct vmm_vm *vm, int on);

/* fd is borrowed; run_size is KVM_GET_VCPU_MMAP_SIZE. NULL with errno set on failure. */
struct vmm_vcpu *vmm_vcpu_create(struct vmm_vm *vm, int fd, uint32_t index, uint64_t run_size);
void vmm_vcpu_destroy(struct vmm_vcpu *vcpu);
void *vmm_vcpu_run_area(struct vmm_vcpu *vcpu); /* struct kvm_run */

/* A thread that runs this vCPU calls enter first and leave last. */
int vmm_vcpu_enter(struct vmm_vcpu *vcpu);
void vmm_vcpu_leave(struct vmm_vcpu *vcpu);
/* Runs the guest until something is Python's. Completes the previous event first: for a read,
 * ev->data is what the guest gets. Returns ev->kind. */
uint32_t vmm_vcpu_run(struct vmm_vcpu *vcpu, struct vmm_event *ev);

/* Nested pauses. Returns 0 when every vCPU thread other than the caller is parked outside
 * KVM_RUN with no half-done I/O; -ETIMEDOUT undoes the request. */
int vmm_vm_pause(struct vmm_vm *vm, int timeout_ms);
void vmm_vm_resume(struct vmm_vm *vm);
/* Ask every vCPU thread to end; from any thread, at any time, more than once. Does not wait. */
void vmm_vm_stop(struct vmm_vm *vm);
int vmm_vm_stopping(struct vmm_vm *vm);

/* CLOCK_MONOTONIC ns at which the first KVM_RUN of this VM began, or 0. */
uint64_t vmm_vm_first_run_ns(struct vmm_vm *vm);

/* Oldest first; returns how many were copied. Call while paused or ended. */
uint32_t vmm_vcpu_history(struct vmm_vcpu *vcpu, struct vmm_exit *dst, uint32_t max);
uint32_t vmm_vcpu_counts(struct vmm_vcpu *vcpu, struct vmm_exit_count *dst, uint32_t max);
uint64_t vmm_vcpu_exits(struct vmm_vcpu *vcpu);

/* cdef: end */

#endif
