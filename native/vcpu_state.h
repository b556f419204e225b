/* What vm.c and vcpu.c share. */
#ifndef VMM_VCPU_STATE_H
#define VMM_VCPU_STATE_H

#include "vcpu.h"

#include <sys/types.h>

#define VMM_MAX_VCPUS 1024
#define HISTORY 32
#define MAX_COUNTS 512

struct kvm_run;

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
	struct vmm_vcpu *vcpus[VMM_MAX_VCPUS];
};

uint64_t vmm_now_ns(void);

#endif
