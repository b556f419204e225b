"""What an architecture is to the rest of vmm. Shared code asks for nothing else.

One package per architecture implements ``Arch``; ``native_arch`` picks the host's, because KVM
runs guests of the host's own architecture.
"""

from __future__ import annotations

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from vmm.board import Board
    from vmm.config import MachineConfig
    from vmm.irq import IrqChip
    from vmm.kvm import Kvm, Vcpu, Vm
    from vmm.memory import GuestMemory

    class BootImage(Protocol):
        """A loaded guest: what a vCPU needs to begin, and what --dry-run says of it."""

        kind: str
        entry: int
        description: str

    class Arch(Protocol):
        """One architecture: memory map, chips, platform devices, boot, vCPU state."""

        name: str
        #: KVM_CAP_* a host must have.
        required_caps: tuple[str, ...]

        def ram_ranges(self, size: int) -> list[tuple[int, int]]:
            """Where ``size`` bytes of RAM lie: (gpa, size) each. Raises ConfigError."""
            ...

        def create_chips(self, vm: Vm) -> IrqChip:
            """The in-kernel interrupt chips and timers; before any vCPU."""
            ...

        def build(self, board: Board) -> None:
            """Put the platform's and the configured devices on the board."""

        def load(self, board: Board) -> BootImage:
            """Kernel, initrd, command line and hardware description into RAM. What it gives goes
            back into ``setup_vcpu`` and ``describe``."""
            ...

        def vcpu_plan(self, kvm: Kvm, config: MachineConfig) -> Any:
            """What all vCPUs share (CPU features, …), worked out once."""
            ...

        def setup_vcpu(self, vcpu: Vcpu, plan: Any, image: Any) -> None:
            """Registers of one vCPU before its first instruction."""

        def command_line(self, config: MachineConfig) -> str:
            """The guest's whole command line."""
            ...

        def describe(self, board: Board, image: Any) -> dict[str, Any]:
            """Memory map and platform facts for --dry-run, JSON-ready."""
            ...

        def snapshot(self, vcpu: Vcpu, memory: GuestMemory) -> Any:
            """One vCPU's state for diagnosis (vmm.diagnose.VcpuSnapshot)."""
            ...


def native_arch() -> Arch:
    """The architecture of this host. Raises HostError when vmm does not have it."""
    import os

    machine = os.uname().machine
    if machine == "x86_64":
        from vmm.arch.x86_64.pc import X86_64

        return X86_64()
    raise HostError(f"vmm runs on x86_64 hosts; this one is {machine}.")
