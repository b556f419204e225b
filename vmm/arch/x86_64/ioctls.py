"""The ioctls that only KVM on x86 has."""

from __future__ import annotations

import errno

from vmm._native import ffi
from vmm.errors import KvmError
from vmm.kvm import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm import Kvm, Vcpu

_HINTS = {
    errno.EINVAL: "The host does not accept these CPU features; see --cpu.",
    errno.E2BIG: "Too many CPUID leaves for this kernel.",
}


def supported_cpuid(kvm: Kvm) -> list[tuple[int, ...]]:
    """KVM_GET_SUPPORTED_CPUID: (function, index, flags, eax, ebx, ecx, edx) each."""
    for room in (128, 256, 1024):
        table = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        try:
            call(kvm.fd, "KVM_GET_SUPPORTED_CPUID", table)
        except KvmError as e:
            if e.errno == errno.E2BIG and room < 1024:
                continue
            raise
        return [
            (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in ffi.unpack(table.entries, table.nent)
        ]
    raise AssertionError("unreachable")


def msr_indices(kvm: Kvm) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the MSRs this host lets us set."""
    for room in (512, 4096):
        table = ffi.new("struct kvm_msr_list *", {"nmsrs": room, "indices": room})
        try:
            call(kvm.fd, "KVM_GET_MSR_INDEX_LIST", table)
        except KvmError as e:
            if e.errno == errno.E2BIG and room < 4096:
                continue
            raise
        return list(ffi.unpack(table.indices, table.nmsrs))
    raise AssertionError("unreachable")


def set_cpuid(vcpu: Vcpu, entries: Sequence[tuple[int, ...]]) -> None:
    """(function, index, flags, eax, ebx, ecx, edx) each. KVM api.rst §4.66."""
    table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": len(entries)})
    for i, entry in enumerate(entries):
        table.entries[i] = entry
    try:
        vcpu.set("KVM_SET_CPUID2", table)
    except KvmError as e:
        code = e.errno or 0
        raise KvmError(
            "KVM_SET_CPUID2", code, f"on vCPU {vcpu.index}", _HINTS.get(code, "")
        ) from None


def set_msrs(vcpu: Vcpu, msrs: list[tuple[int, int]]) -> None:
    """(index, value) each. Raises KvmError naming the first MSR KVM refused."""
    table = ffi.new("struct kvm_msrs *", {"nmsrs": len(msrs), "entries": len(msrs)})
    for i, (index, value) in enumerate(msrs):
        table.entries[i].index = index
        table.entries[i].data = value
    done = call(vcpu.fd, "KVM_SET_MSRS", table, what=f"on vCPU {vcpu.index}")
    if done != len(msrs):
        raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"for MSR {msrs[done][0]:#x}")
