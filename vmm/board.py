"""What a machine is made of before it runs: memory, buses, interrupts, devices.

The machine makes a Board, the architecture puts its platform on it, the device tables put the
user's devices on it, and the boot code reads it to describe the hardware to the guest. A board
needs no KVM: without one (dry runs, tests) interrupts only count and nothing is accelerated.
"""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.bus import Bus
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory, RamRange
from vmm.values import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from vmm.chardev import CharDev
    from vmm.config import MachineConfig
    from vmm.device import Device
    from vmm.devices.pci import PciDevice
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.irq import IrqLine
    from vmm.kvm import Vm

    D = TypeVar("D", bound=Device)


PAGE = 4096


class Announced:
    """A device that the guest can only find by being told: its ACPI hardware id, (base, size) of
    its memory and of its ports, in bytes, and the GSIs it raises, level-triggered."""

    __slots__ = ("gsis", "hid", "memory", "ports")

    def __init__(
        self,
        hid: str,
        memory: list[tuple[int, int]],
        ports: list[tuple[int, int]],
        gsis: list[int],
    ) -> None:
        self.hid = hid
        self.memory = memory
        self.ports = ports
        self.gsis = gsis


class Board:
    """One machine's hardware. Owns its devices and the I/O thread; memory and chip are lent."""

    def __init__(
        self,
        config: MachineConfig,
        memory: GuestMemory,
        irqchip: IrqChip,
        *,
        vm: Vm | None = None,
        native_vm: Any = None,
    ) -> None:
        self.config = config
        self.memory = memory
        self.irqchip = irqchip
        self.vm = vm
        pio = None if native_vm is None else lib.vmm_vm_pio(native_vm)
        mmio = None if native_vm is None else lib.vmm_vm_mmio(native_vm)
        self.pio = Bus("pio", 1 << 16, pio)
        self.mmio = Bus("mmio", 1 << 64, mmio)
        self.loop = lib.vmm_loop_create()
        if self.loop == ffi.NULL:
            raise HostError("The I/O thread could not be started", errno=ffi.errno)
        self.devices: list[Device] = []
        #: Behind whatever transport; the transport owns them.
        self.virtio: list[VirtioDevice] = []
        #: PCI functions that are not virtio; the host bridge takes them.
        self.pci: list[PciDevice] = []
        #: The main console last.
        self.consoles: list[CharDev] = []
        #: For devices without a place of their own: (base, size) of memory and the GSIs of
        #: level-triggered lines. The architecture fills both in.
        self.spare_mmio: tuple[int, int] = (0, 0)
        self.spare_gsis: tuple[int, ...] = ()
        #: Where memory may lie that devices bring: (gpa, end, alignment) above RAM. The
        #: architecture fills it in; asked for only when a device wants some.
        self.spare_memory: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 1)
        #: (gpa, size) of what they brought.
        self.brought: list[tuple[int, int]] = []
        #: What the hardware description says of them.
        self.announced: list[Announced] = []
        #: GSI by device name, of ``irq_line``.
        self.wired: dict[str, int] = {}
        self._spare_used = 0
        self._lines: dict[int, IrqLine] = {}
        #: Undone in reverse order when the board closes.
        self._cleanups: list[Callable[[], None]] = []
        #: What the guest asked for, told to the machine: ("poweroff", 0), ("exit", status), …
        self.on_end: Callable[[str, int], None] = lambda reason, status: None
        #: Hold the vCPUs until somebody resumes the machine, and whether they are held. Any thread
        #: but a vCPU's.
        self.on_pause: Callable[[], None] = lambda: None
        self.paused: Callable[[], bool] = lambda: False
        #: Asks the guest to shut down; None without one.
        self.power_button: Callable[[], None] | None = None
        #: A device's own thread raised, which ends the machine. Any thread.
        self.on_error: Callable[[BaseException], None] = lambda error: None

    def add(self, device: D) -> D:
        """Take ownership of a device; it is closed with the board."""
        if any(d.name == device.name for d in self.devices):
            raise ConfigError(f"Two devices are called {device.name}; give one another name.")
        self.devices.append(device)
        return device

    def plug_users(self) -> None:
        """Put the devices on the board that the configuration names, in its order."""
        from vmm.catalog import DeviceSpec

        counts: dict[str, int] = {}
        for wanted in self.config.devices:
            if isinstance(wanted, DeviceSpec):
                stem = wanted.kind.rpartition(":")[2].lower()
                nr = counts[stem] = counts.get(stem, -1) + 1
                device = wanted.build(f"{stem}{nr}", self)
            else:
                device = wanted
                if device.name == type(device).name == "device":
                    stem = type(device).__name__.lower()
                    nr = counts[stem] = counts.get(stem, -1) + 1
                    device.name = f"{stem}{nr}"
            device.plug(self)

    def memory_window(self, size: int) -> int:
        """The guest-physical address of ``size`` bytes above RAM for memory that a device brings,
        in no memory map of the guest. Raises ConfigError when there is no room."""
        gpa, end, align = self.spare_memory()
        for base, length in self.brought:
            gpa = max(gpa, (base + length + align - 1) // align * align)
        if size > end - gpa:
            raise ConfigError(
                f"{format_size(size)} of memory for a device do not fit below the CPU's limit of "
                f"{end:#x}; ask for less."
            )
        self.brought.append((gpa, size))
        return gpa

    def add_memory(self, size: int) -> RamRange:
        """Memory for a device to manage, before the guest runs; see ``memory_window`` and
        ``GuestMemory.add``. Raises ConfigError when there is no room, HostError."""
        added = self.memory.add(self.memory_window(size), size)
        if self.vm is not None:
            self.vm.add_memory([added])
        return added

    def mmio_window(self, size: int) -> int:
        """The guest-physical address of ``size`` bytes that nothing else answers, aligned to the
        next power of two and to pages. Raises ConfigError when there are none."""
        base, room = self.spare_mmio
        align = max(PAGE, 1 << (size - 1).bit_length())
        at = (base + self._spare_used + align - 1) & -align
        if size <= 0 or at + align > base + room:
            raise ConfigError(
                f"There is no room for a device with {size:#x} bytes of memory-mapped registers; "
                f"{max(0, room - self._spare_used):#x} are left."
            )
        self._spare_used = at + align - base
        return at

    def irq_line(self, name: str) -> IrqLine:
        """A level-triggered interrupt for the device of that name, which closes it; more devices
        than lines share them. Raises ConfigError when the machine has none."""
        if not self.spare_gsis:
            raise ConfigError(f"This machine has no interrupt for {name}.")
        gsi = self.spare_gsis[len(self.wired) % len(self.spare_gsis)]
        self.wired[name] = gsi
        if gsi not in self._lines:
            self._lines[gsi] = self.irqchip.line(gsi)
            self.defer(self._lines[gsi].close)
        return self._lines[gsi].share()

    def announce(
        self,
        hid: str,
        *,
        memory: list[tuple[int, int]] | None = None,
        ports: list[tuple[int, int]] | None = None,
        gsis: list[int] | None = None,
    ) -> None:
        """Have the hardware description name a device; see Announced."""
        self.announced.append(Announced(hid, memory or [], ports or [], gsis or []))

    def defer(self, cleanup: Callable[[], None]) -> None:
        """Run ``cleanup`` when the board closes, last registered first."""
        self._cleanups.append(cleanup)

    def find(self, name: str) -> Device | None:
        return next((d for d in self.devices if d.name == name), None)

    def close(self) -> None:
        """No vCPU runs any more. Devices first (they stop their I/O), then the I/O thread."""
        for device in reversed(self.devices):
            device.close()
        self.devices = []
        for console in self.consoles:
            console.close()
        if self.loop != ffi.NULL:
            lib.vmm_loop_destroy(self.loop)
            self.loop = ffi.NULL
        while self._cleanups:
            self._cleanups.pop()()

    def free(self) -> None:
        """After ``close``, when nobody reads the consoles' text any more."""
        for console in self.consoles:
            console.free()
        self.consoles = []


class Notifier:
    """Binds eventfds to guest addresses so that a doorbell costs no exit.

    Without KVM nothing is bound: the transport's own write handler signals the eventfd.
    """

    def __init__(self, vm: Vm | None, *, any_length: bool = False) -> None:
        self._vm = vm
        #: KVM takes a zero-length match (any width, no data), which it decodes fastest.
        self.any_length = any_length

    def bind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None:
        if self._vm is not None:
            self._vm.ioeventfd(fd, addr, size, datamatch=datamatch)

    def unbind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None:
        if self._vm is not None:
            self._vm.ioeventfd(fd, addr, size, datamatch=datamatch, assign=False)
