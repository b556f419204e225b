"""What an architecture is to the rest of vmm. Shared code asks for nothing else.

One package per architecture has an ``Arch``, which makes machines, and says what kernels for it
are (``Kernels``), what its hosts bring to KVM (``Host``), how such a host is emulated
(``Nesting``) and which machines QEMU's test clients know (``Qtest``). The ``native_`` functions
give the host's own, because KVM runs guests of the host's own architecture; each imports only
its part.
"""

from __future__ import annotations

import os

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from vmm.arch.source import Source
    from vmm.board import Board
    from vmm.config import MachineConfig
    from vmm.irq import IrqChip
    from vmm.kvm import Kvm, Vcpu, Vm
    from vmm.memory import GuestMemory
    from vmm.vcpus import Registers

    class BootImage(Protocol):
        """A loaded guest: what a vCPU needs to begin, and what --dry-run says of it."""

        kind: str
        entry: int
        description: str

    class Arch(Protocol):
        """One architecture: memory map, chips, platform devices, boot, vCPU state."""

        name: str
        #: KVM_CAP_* a host must have, and the modules that may be its KVM.
        required_caps: tuple[str, ...]
        kvm_modules: tuple[str, ...]
        #: Linux's name for the first serial port, and what may be wrong when it says nothing.
        console: str
        silence: str
        #: What a vCPU did that left with KVM_EXIT_SHUTDOWN, as in "vCPU 0 ...".
        shutdown: str

        def ram_ranges(self, size: int) -> list[tuple[int, int]]:
            """Where ``size`` bytes of RAM lie: (gpa, size) each. Raises ConfigError."""
            ...

        def create_chips(self, vm: Vm) -> IrqChip:
            """The in-kernel interrupt chips and timers; before any vCPU."""
            ...

        def build(self, board: Board) -> None:
            """Put the platform's and the configured devices on the board, and fill in what it
            leaves to the architecture: spare places and interrupts, the power button."""

        def load(self, board: Board) -> BootImage:
            """Kernel, initrd, command line and hardware description into RAM. What it gives goes
            back into ``setup_vcpu`` and ``describe``."""
            ...

        def vcpu_plan(self, kvm: Kvm, config: MachineConfig) -> Any:
            """What all vCPUs share (CPU features, …), worked out once."""
            ...

        def setup_vcpu(self, vcpu: Vcpu, plan: Any, image: Any) -> None:
            """Registers of one vCPU before its first instruction."""

        def registers(self, vcpu: Vcpu) -> Registers:
            """One vCPU's general registers, to be read and written by name."""
            ...

        def command_line(self, config: MachineConfig) -> str:
            """The guest's whole command line."""
            ...

        def describe(self, board: Board, image: Any) -> dict[str, Any]:
            """Memory map and platform facts for --dry-run, JSON-ready."""
            ...

        def snapshot(self, vcpu: Vcpu, memory: GuestMemory) -> Any:
            """One vCPU's state for diagnosis (vmm.diagnose.VcpuSnapshot)."""
            ...

    class Kernels(Protocol):
        """Kernel images as files, whatever is done with them. The functions raise BootError for a
        file that is damaged."""

        #: What Debian calls the architecture, and its generic kernel's flavour.
        DEBIAN: str
        #: Where a build tree has the bootable image.
        BUILD_IMAGE: str
        #: What comes before the version in an image's name.
        IMAGE_PREFIXES: tuple[str, ...]
        #: A regular expression: addresses of the kernel's text and of modules, in hexadecimal.
        TEXT_ADDRESS: str
        #: Kernel option -> (what is lost without it, whether most guests want it), beside those
        #: that are the same everywhere.
        OPTIONS: dict[str, tuple[str, bool]]

        def is_linux(self, source: Source) -> bool:
            """Whether the file is a Linux kernel, by what is cheap to see."""
            ...

        def release(self, source: Source) -> str:
            """What ``uname -r`` will say in the guest, or empty."""
            ...

        def recognise(self, source: Source) -> str:
            """What the file is, in words; empty when it is no kernel."""
            ...

        def payload(self, source: Source) -> tuple[int, int, str, int] | None:
            """Where the kernel proper is: offset, length, how it is packed (as vmm.arch.unpack
            has it, or empty) and the most it unpacks to. None when this host cannot unpack it."""
            ...

    class Host(Protocol):
        """What hosts of an architecture bring to their KVM."""

        #: What a host without ``extension`` has, as in "this CPU has no ...", and how to get it.
        NO_EXTENSION: str
        ENABLE: str
        #: The modules that may be KVM; each may have a parameter "nested".
        MODULES: tuple[str, ...]
        #: KVM_CAP_* used when they are there, beside those of every architecture, and for what.
        OPTIONAL_CAPS: dict[str, str]

        def extension(self) -> str:
            """How this CPU runs guests in hardware, or empty: a working /dev/kvm then emulates in
            software."""
            ...

    class Nesting(Protocol):
        """A host of an architecture, emulated by QEMU, with a true /dev/kvm in it."""

        #: The program, the Debian package that has it, its CPU and its machine.
        QEMU: str
        QEMU_PACKAGE: str
        CPU: str
        MACHINE: str
        #: Kernel parameters that save time in a machine whose every instruction is emulated, and
        #: its console.
        KERNEL_ARGS: str
        #: The modules that make /dev/kvm, and why it may be missing after them.
        KVM_MODULES: tuple[str, ...]
        NO_KVM: str

        def kernel_image(self, path: str) -> int | None:
            """A descriptor, the caller's, of the kernel at ``path`` in a form that QEMU starts
            faster; None: use ``path``."""
            ...

        def places(self, text: str) -> str:
            """Where each CPU is, on a line, from what QEMU's ``info registers -a`` printed."""
            ...

        def measured(self) -> list[str]:
            """What a started guest knows of this host, so that a snapshot is good only there."""
            ...

    class Qtest(Protocol):
        """Machine types as QEMU has them, for ``vmm qtest``."""

        #: vmm's own machine, and what is taken when no type is given.
        OWN: str
        DEFAULT: str
        #: Every type and what it is; which carry virtio on mmio; and beginnings of other names.
        MACHINES: dict[str, str]
        MMIO_MACHINES: tuple[str, ...]
        MACHINE_PREFIXES: tuple[tuple[str, str], ...]
        #: Where base addresses may lie on the types that are not vmm's own: (gpa, size).
        WINDOW: tuple[int, int]
        #: Where a type has configuration space, and its first free PCI slot when that is not 1.
        ECAM: dict[str, int]
        FIRST_SLOT: dict[str, int]
        #: The interrupt controller by the last part of its QOM path, and how many pins it has.
        CONTROLLERS: tuple[str, ...]
        PINS: int


#: What uname calls a machine, and the package here that knows it: ``machine`` (an ``ARCH``),
#: ``kernels``, ``host``, ``nesting`` and ``qtest`` are its modules.
PACKAGES = {"x86_64": "x86_64"}


def native_name() -> str:
    """What uname calls this host's architecture. Raises HostError when vmm does not have it."""
    machine = os.uname().machine
    if machine not in PACKAGES:
        raise HostError(f"vmm runs on {', '.join(PACKAGES)} hosts; this one is {machine}.")
    return machine


def _module(part: str) -> Any:
    from importlib import import_module

    return import_module(f"vmm.arch.{PACKAGES[native_name()]}.{part}")


def native_arch() -> Arch:
    """The architecture of this host. Raises HostError, as the others do."""
    found: Arch = _module("machine").ARCH
    return found


def native_kernels() -> Kernels:
    """What kernels for this host are. Imports no device."""
    found: Kernels = _module("kernels")
    return found


def native_host() -> Host:
    """What is to be known of this host's KVM. Imports nothing else."""
    found: Host = _module("host")
    return found


def native_nesting() -> Nesting:
    """How a host like this is emulated."""
    found: Nesting = _module("nesting")
    return found


def native_qtest() -> Qtest:
    """What qtest clients expect of machines like this host."""
    found: Qtest = _module("qtest")
    return found


if TYPE_CHECKING:
    # What is loaded by name is what it has to be.
    from vmm.arch.x86_64 import host as _host
    from vmm.arch.x86_64 import kernels as _kernels
    from vmm.arch.x86_64 import nesting as _nesting
    from vmm.arch.x86_64 import qtest as _qtest

    _KERNELS: Kernels = _kernels
    _HOST: Host = _host
    _NESTING: Nesting = _nesting
    _QTEST: Qtest = _qtest
