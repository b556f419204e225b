"""Registers of an x86-64 vCPU before its first instruction."""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.vcpus import Registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.arch.x86_64.state import BootState, Segment
    from vmm.kvm import Vcpu

# Local vector table: offsets in the local APIC and delivery modes. Intel SDM vol 3 §10.5.1.
LVT_LINT0 = 0x350
LVT_LINT1 = 0x360
DELIVERY_NMI = 4 << 8
DELIVERY_EXTINT = 7 << 8


def set_local_apic(vcpu: Vcpu) -> None:
    """LINT0 takes the PIC's interrupts, LINT1 is NMI, as firmware leaves them.
    Intel SDM vol 3 §10.4.7.1."""
    lapic = vcpu.get("KVM_GET_LAPIC", "kvm_lapic_state")
    regs = ffi.buffer(lapic)
    regs[LVT_LINT0 : LVT_LINT0 + 4] = DELIVERY_EXTINT.to_bytes(4, "little")
    regs[LVT_LINT1 : LVT_LINT1 + 4] = DELIVERY_NMI.to_bytes(4, "little")
    vcpu.set("KVM_SET_LAPIC", lapic)


def set_boot_registers(vcpu: Vcpu, state: BootState) -> None:
    """What the boot protocol asks for, on the boot vCPU. KVM api.rst §4.13, §4.3."""
    sregs = vcpu.get("KVM_GET_SREGS", "kvm_sregs")
    _set_segment(sregs.cs, state.cs)
    _set_segment(sregs.ds, state.ds)
    for name in ("es", "fs", "gs", "ss"):
        _set_segment(getattr(sregs, name), state.ds)
    if state.mode != "real":
        _set_segment(sregs.tr, state.tr)
        sregs.ldt.unusable = 1
        sregs.gdt.base = state.gdt_base
        sregs.gdt.limit = state.gdt_limit
        # No interrupt can be taken before the guest has a table: IF is clear.
        sregs.idt.base = 0
        sregs.idt.limit = 0
        sregs.cr0 = state.cr0
        sregs.cr3 = state.cr3
        sregs.cr4 = state.cr4
        sregs.efer = state.efer
    vcpu.set("KVM_SET_SREGS", sregs)
    regs = ffi.new("struct kvm_regs *")
    for name in ("rip", "rsp", "rax", "rbx", "rsi", "rflags"):
        setattr(regs, name, getattr(state, name))
    vcpu.set("KVM_SET_REGS", regs)


def _set_segment(dst: Any, src: Segment) -> None:
    dst.base = src.base
    dst.limit = src.limit
    dst.selector = src.selector
    dst.type = src.type
    dst.present = src.present
    dst.dpl = src.dpl
    dst.db = src.db
    dst.s = src.s
    dst.l = src.l
    dst.g = src.g
    dst.unusable = 0


def mp_state(vcpu: Vcpu) -> str:
    """What a vCPU is doing, in the words of KVM api.rst §4.38."""
    value = int(vcpu.get("KVM_GET_MP_STATE", "kvm_mp_state").mp_state)
    names = {
        int(lib.KVM_MP_STATE_RUNNABLE): "running",
        int(lib.KVM_MP_STATE_UNINITIALIZED): "waiting for INIT",
        int(lib.KVM_MP_STATE_INIT_RECEIVED): "waiting for SIPI",
        int(lib.KVM_MP_STATE_HALTED): "halted",
        int(lib.KVM_MP_STATE_SIPI_RECEIVED): "starting",
    }
    return names.get(value, f"state {value}")


def registers(vcpu: Vcpu) -> Registers:
    """rax … r15, rip, rflags. KVM api.rst §4.12."""
    raw = vcpu.get("KVM_GET_REGS", "kvm_regs")

    def write(name: str, value: int) -> None:
        setattr(raw, name, value)
        vcpu.set("KVM_SET_REGS", raw)

    names = [name for name, _ in ffi.typeof("struct kvm_regs").fields]
    return Registers({name: int(getattr(raw, name)) for name in names}, write)
