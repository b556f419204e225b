/* Holding on to KVM, so that its code is not rewritten while guests run. */
#define _GNU_SOURCE
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <string.h>
#include <sys/ioctl.h>

#define APIC_BASE_ENABLE (1ULL << 11)

static int make(int fd, unsigned long request, unsigned long arg, const char *what)
{
	int rc = ioctl(fd, request, arg);

	if (rc < 0)
		die("/dev/kvm cannot make %s: %s", what, strerror(errno));
	return rc;
}

/*
 * kvm: keep a guest in each state that KVM has a static key for.
 *
 * KVM patches its code when the first vCPU gets into such a state and when the last one leaves it:
 * no APIC in the kernel, one disabled by MSR, one disabled in software (as each is until its guest
 * enables it), any VM at all. An emulated CPU may go on running the breakpoint that the patch went
 * through, for ever; with these here, which never run, nothing is patched any more.
 */
void do_kvm(char **arg, size_t count)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), bare, vm, vcpu;
	struct kvm_sregs sregs;

	(void)arg;
	(void)count;
	if (kvm < 0)
		die("cannot open /dev/kvm: %s", strerror(errno));
	bare = make(kvm, KVM_CREATE_VM, 0, "a VM");
	make(bare, KVM_CREATE_VCPU, 0, "a vCPU without an APIC");
	vm = make(kvm, KVM_CREATE_VM, 0, "a VM");
	make(vm, KVM_CREATE_IRQCHIP, 0, "an interrupt controller");
	make(vm, KVM_CREATE_VCPU, 0, "a vCPU");
	vcpu = make(vm, KVM_CREATE_VCPU, 1, "a second vCPU");
	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		die("/dev/kvm cannot tell a vCPU's registers: %s", strerror(errno));
	sregs.apic_base &= ~APIC_BASE_ENABLE;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0)
		die("/dev/kvm cannot disable an APIC: %s", strerror(errno));
}
