"""x86-64: a PC without firmware. See vmm.arch.base.Arch."""

from __future__ import annotations

import os

from vmm.arch.x86_64 import acpi, boot, host, ioctls, layout, platform
from vmm.arch.x86_64.cpu_features import parse_cpu
from vmm.arch.x86_64.cpuid import Model, Topology
from vmm.arch.x86_64.msrs import boot_msrs
from vmm.arch.x86_64.vcpu import mp_state, registers, set_boot_registers, set_local_apic
from vmm.irq import KvmIrqChip
from vmm.kvm import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.arch.base import Arch
    from vmm.arch.x86_64.state import BootState
    from vmm.board import Board
    from vmm.config import MachineConfig
    from vmm.irq import IrqChip
    from vmm.kvm import Kvm, Vcpu, Vm
    from vmm.memory import GuestMemory
    from vmm.vcpus import Registers


PIC_PINS = 8
IOAPIC_PINS = 24


def _pins() -> list[dict[str, int]]:
    """The routes of GSIs to the chips' pins as on a PC."""
    from vmm._native import lib

    master, slave = int(lib.KVM_IRQCHIP_PIC_MASTER), int(lib.KVM_IRQCHIP_PIC_SLAVE)
    ioapic = int(lib.KVM_IRQCHIP_IOAPIC)
    routes = [
        {"gsi": pin, "chip": master if pin < PIC_PINS else slave, "pin": pin % PIC_PINS}
        for pin in range(2 * PIC_PINS)
    ]
    # The PIT is wired to GSI 0 and arrives at IOAPIC pin 2.
    return routes + [
        {"gsi": 0 if pin == 2 else pin, "chip": ioapic, "pin": pin} for pin in range(1, IOAPIC_PINS)
    ]


class VcpuPlan:
    """What all vCPUs of a machine share."""

    __slots__ = ("model", "msrs")

    def __init__(self, model: Model, msrs: list[tuple[int, int]]) -> None:
        self.model = model
        self.msrs = msrs


class X86_64:
    """The PC that vmm makes: in-kernel PIC, IOAPIC, local APICs and PIT; ACPI; PCI or mmio."""

    name = "x86_64"
    console = platform.CONSOLE
    silence = (
        f"the guest printed nothing: a Linux kernel needs console={platform.CONSOLE} on its "
        "command line and CONFIG_SERIAL_8250_CONSOLE=y (or console=hvc0 and "
        f"CONFIG_VIRTIO_CONSOLE); earlyprintk={platform.CONSOLE} shows how far an early failure got"
    )
    shutdown = "triple-faulted"
    kvm_modules = host.MODULES
    required_caps: tuple[str, ...] = (
        "KVM_CAP_IRQCHIP",
        "KVM_CAP_USER_MEMORY",
        "KVM_CAP_SET_TSS_ADDR",
        "KVM_CAP_EXT_CPUID",
        "KVM_CAP_PIT2",
        "KVM_CAP_IRQ_ROUTING",
        "KVM_CAP_IRQFD",
        "KVM_CAP_IOEVENTFD",
        "KVM_CAP_IMMEDIATE_EXIT",
        "KVM_CAP_MP_STATE",
    )

    def ram_ranges(self, size: int) -> list[tuple[int, int]]:
        return layout.ram_ranges(size)

    def create_chips(self, vm: Vm) -> IrqChip:
        from vmm._native import ffi, lib

        # Three pages for the TSS and one for the identity map, out of the guest's sight; Intel's
        # virtualization needs them for real mode. KVM api.rst §4.36, §4.41.
        identity = ffi.new("uint64_t *", layout.KVM_IDENTITY_MAP)
        call(vm.fd, "KVM_SET_IDENTITY_MAP_ADDR", identity)
        call(vm.fd, "KVM_SET_TSS_ADDR", layout.KVM_TSS)
        call(vm.fd, "KVM_CREATE_IRQCHIP")
        pit = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        call(vm.fd, "KVM_CREATE_PIT2", pit)
        return KvmIrqChip(vm, _pins(), IOAPIC_PINS)

    def build(self, board: Board) -> None:
        platform.build(board)

    def load(self, board: Board) -> BootState:
        config = board.config
        rsdp = None
        if config.acpi:
            rsdp = acpi.build(
                platform.hardware(board, Topology(config.cpus).apic_ids()), board.memory
            )
        assert config.kernel is not None
        return boot.load_kernel(
            board.memory,
            config.kernel,
            initrds=config.initrds,
            cmdline=self.command_line(config),
            protocol=config.boot,
            rsdp=rsdp,
            seed=os.urandom(32),
        )

    def vcpu_plan(self, kvm: Kvm, config: MachineConfig) -> VcpuPlan:
        model = Model(
            ioctls.supported_cpuid(kvm),
            Topology(config.cpus),
            edits=parse_cpu(config.cpu),
            tsc_deadline=bool(kvm.check("KVM_CAP_TSC_DEADLINE_TIMER")),
        )
        return VcpuPlan(model, boot_msrs(ioctls.msr_indices(kvm), mtrr=model.mtrr))

    def setup_vcpu(self, vcpu: Vcpu, plan: VcpuPlan, image: BootState) -> None:
        ioctls.set_cpuid(vcpu, plan.model.entries(vcpu.index))
        ioctls.set_msrs(vcpu, plan.msrs)
        set_local_apic(vcpu)
        if vcpu.index == 0:
            set_boot_registers(vcpu, image)

    def registers(self, vcpu: Vcpu) -> Registers:
        return registers(vcpu)

    def command_line(self, config: MachineConfig) -> str:
        return platform.command_line(config)

    def describe(self, board: Board, image: BootState | None) -> dict[str, Any]:
        names = {layout.E820_RAM: "ram", layout.E820_RESERVED: "reserved"}
        table = image.e820 if image is not None else layout.e820_table(board.memory)
        return {
            "arch": self.name,
            "memory": [
                *({"base": b, "size": s, "type": names[t]} for b, s, t in table),
                *({"base": b, "size": s, "type": "device"} for b, s in board.brought),
            ],
            "command_line": self.command_line(board.config),
            "boot": image.summary() if image is not None else [],
            "pci": platform.pci_functions(board),
            "interrupts": platform.interrupts(board),
        }

    def snapshot(self, vcpu: Vcpu, memory: GuestMemory) -> Any:
        from vmm.arch.x86_64.inspect import snapshot

        return snapshot(vcpu, mp_state(vcpu))


ARCH: Arch = X86_64()
