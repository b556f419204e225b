"""The PCI host bridge: one bus, reached through ports and through ECAM. PCI-3.0."""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.device import Device, NativeDevice
from vmm.devices.pci import BAR0, BARS, PciDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.bus import Bus
    from vmm.devices.pci import Bar
    from vmm.irq import IrqLine

SLOTS = 32
CONFIG_PORTS = 0xCF8
CONFIG_PORTS_SIZE = 8


class _Ports(NativeDevice):
    """0xcf8-0xcff: configuration mechanism #1. PCI-3.0 §3.2.2.3.2."""

    name = "pci-config"

    def __init__(self, host: PciHost) -> None:
        self._host = host

    def native(self) -> Any:
        return lib.vmm_pci_ports(self._host.pci)

    def _register(self, offset: int) -> tuple[int, int]:
        address = int(lib.vmm_pci_address(self._host.pci))
        return address >> 11 & 31, (address & 0xFC) + offset - 4

    def cold_read(self, offset: int, size: int) -> int:
        if offset < 4:
            port = self._host.reset_port
            return port.read(0, size) if port is not None else 0xFF
        return self._host.config_read(*self._register(offset), size)

    def cold_write(self, offset: int, size: int, value: int) -> None:
        if offset >= 4:
            self._host.config_write(*self._register(offset), size, value)
        elif self._host.reset_port is not None:
            self._host.reset_port.write(0, size, value)


class _Ecam(NativeDevice):
    """Memory-mapped configuration space: 4 KiB per function."""

    name = "pci-ecam"

    def __init__(self, host: PciHost) -> None:
        self._host = host

    def native(self) -> Any:
        return lib.vmm_pci_ecam(self._host.pci)

    def cold_read(self, offset: int, size: int) -> int:
        return self._host.config_read(offset >> 15 & 31, offset & 0xFFF, size)

    def cold_write(self, offset: int, size: int, value: int) -> None:
        self._host.config_write(offset >> 15 & 31, offset & 0xFFF, size, value)


class PciHost(Device):
    """The host bridge: owns bus 0 and every function on it.

    ``windows``: (base, size) of the guest-physical memory BARs may be in, the 32-bit one first.
    ``lines``: level-triggered interrupts, taken over; INTA# of slot s is on
    lines[s % len(lines)].
    ``reset_port``: who answers port 0xcf9, which lies inside the address register.
    """

    name = "pci-host"

    def __init__(
        self,
        mmio: Bus,
        windows: list[tuple[int, int]],
        lines: list[IrqLine],
        reset_port: Device | None = None,
    ) -> None:
        self.pci = lib.vmm_pci_create()
        if self.pci == ffi.NULL:
            raise MemoryError("PCI host bridge")
        self.reset_port = reset_port
        self.ports = _Ports(self)
        self.ecam = _Ecam(self)
        self.devices: dict[int, PciDevice] = {}
        #: BAR addresses a guest wrote that could not be mapped: outside the windows, or taken.
        self.refused = 0
        self._mmio = mmio
        self._windows = windows
        self._lines = lines
        # Red Hat's generic PCIe host: no driver binds to it, no quirk knows it.
        self.add(PciDevice("pci-bridge", 0x1B36, 0x0008, 0x06_0000), 0)

    def add(self, device: PciDevice, slot: int = -1) -> int:
        """Take a function in, at ``slot`` or the first free one; returns the slot. The host owns
        the function. Raises ValueError when there is no room."""
        if slot < 0:
            slot = next((s for s in range(1, SLOTS) if s not in self.devices), SLOTS)
        if slot >= SLOTS or slot in self.devices:
            raise ValueError(f"{device.name}: PCI slot {slot} is not free (there are {SLOTS})")
        device.attach(self.pci, slot, self._lines[slot % len(self._lines)] if self._lines else None)
        self.devices[slot] = device
        return slot

    def remove(self, device: PciDevice) -> None:
        """Take a function out and close it; its slot is empty from here on."""
        for bar in device.bars:
            self._unmap(device, bar)
        lib.vmm_pci_remove(self.pci, device.slot)
        del self.devices[device.slot]
        device.close()

    def set_windows(self, windows: list[tuple[int, int]]) -> None:
        """Other windows than at first; before ``place``."""
        self._windows = windows

    def place(self) -> None:
        """Give every BAR an address, largest first. Nothing is mapped until the guest turns
        memory decoding on. Raises ValueError when a window is full."""
        free = [base for base, _ in self._windows]
        bars = [(bar, d) for d in self.devices.values() for bar in d.bars]
        for bar, device in sorted(bars, key=lambda entry: -entry[0].size):
            # A 32-bit BAR only fits the first window; a 64-bit one prefers the last.
            window = len(self._windows) - 1 if bar.wide else 0
            base, size = self._windows[window]
            addr = (free[window] + bar.size - 1) & -bar.size
            if addr + bar.size > base + size:
                raise ValueError(f"{device.name}: no room for {bar.size:#x} bytes of PCI memory")
            free[window] = addr + bar.size
            device.place(bar, addr)

    # -- what C left to Python

    def config_read(self, slot: int, reg: int, size: int) -> int:
        device = self.devices.get(slot)
        if device is None or not device.window <= reg <= device.window + 4 - size:
            # A window is read whole or within; nothing else comes here.
            return (1 << (8 * size)) - 1
        return device.window_read(reg - device.window, size)

    def config_write(self, slot: int, reg: int, size: int, value: int) -> None:
        device = self.devices.get(slot)
        if device is None:
            return
        window = device.window
        if window and window <= reg <= window + 4 - size:
            device.window_write(reg - window, size, value)
            return
        lib.vmm_pci_write(self.pci, slot, reg, size, value)
        if reg < BAR0 + 4 * BARS:
            self.remap(device)
        device.config_written(reg, size)

    def remap(self, device: PciDevice | None = None) -> None:
        """Make the memory bus agree with the base address registers, of one function or of all.
        An address outside the windows or already taken is not mapped until it becomes free;
        never RAM, therefore."""
        changed = list(self.devices.values()) if device is None else [device]
        if device is not None:
            others = [d for d in self.devices.values() if d is not device]
            # One that could not be mapped may have been waiting for this one to go.
            changed += [d for d in others if any(bar.denied >= 0 for bar in d.bars)]
        pending = []
        for owner in changed:
            for bar in owner.bars:
                wanted = owner.wanted(bar)
                if wanted == bar.addr:
                    continue
                self._unmap(owner, bar)
                if wanted >= 0:
                    pending.append((owner, bar, wanted))
                else:
                    bar.denied = -1
        for owner, bar, wanted in pending:
            if self._map(bar, wanted):
                bar.denied = -1
                owner.on_bar_moved(bar)
            elif bar.denied != wanted:
                bar.denied = wanted
                self.refused += 1

    def _unmap(self, device: PciDevice, bar: Bar) -> None:
        if bar.addr >= 0:
            self._mmio.remove(bar.addr)
            bar.addr = -1
            device.on_bar_moved(bar)

    def _map(self, bar: Bar, addr: int) -> bool:
        if not any(b <= addr and addr + bar.size <= b + size for b, size in self._windows):
            return False
        try:
            self._mmio.insert(addr, bar.size, bar.device)
        except ValueError:  # Overlap is one
            return False
        bar.addr = addr
        return True

    def reset(self) -> None:
        """Back to what ``place`` left; every function is reset."""
        for device in self.devices.values():
            device.restore()
        lib.vmm_pci_address_set(self.pci, 0)
        self.remap()
        for device in self.devices.values():
            device.reset()

    def close(self) -> None:
        for device in self.devices.values():
            for bar in device.bars:
                self._unmap(device, bar)
            device.close()
        self.devices = {}
        for line in self._lines:
            line.close()
        self._lines = []
        if self.pci != ffi.NULL:
            lib.vmm_pci_destroy(self.pci)
            self.pci = ffi.NULL
