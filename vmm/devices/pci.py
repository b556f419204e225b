"""The base of every PCI function: header, BARs, capabilities. PCI-3.0.

Configuration space lives in C (native/pci.c), so that a guest's enumeration costs no Python. What
reaches Python is a change of memory decoding, of a base address while decoding is on, of MSI-X
control, or of whatever else a function watches. The bus they are on is in pci_host.py.
"""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.board import Board
    from vmm.irq import IrqLine

# Registers of the type 0 header. PCI-3.0 §6.1.
VENDOR_ID = 0x00
COMMAND = 0x04
STATUS = 0x06
REVISION = 0x08
HEADER_TYPE = 0x0E
BAR0 = 0x10
SUBSYSTEM = 0x2C
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
_CACHE_LINE = 0x0C
BARS = 6
_FIRST_CAPABILITY = 0x40
_STATUS_CAPABILITIES = 0x10

# COMMAND bits. PCI-3.0 §6.2.2.
COMMAND_IO = 0x0001
COMMAND_MEMORY = 0x0002
COMMAND_MASTER = 0x0004
COMMAND_INTX_DISABLE = 0x0400

# What a memory BAR says about itself. PCI-3.0 §6.2.5.1.
BAR_64 = 0x4


class Bar:
    """One memory region of a function. ``addr`` is where it is mapped now, -1 when it is not."""

    __slots__ = ("addr", "denied", "device", "index", "size", "wide")

    def __init__(self, index: int, size: int, device: Device, wide: bool) -> None:
        self.index = index
        self.size = size
        self.device = device
        self.wide = wide
        self.addr = -1
        self.denied = -1


class PciDevice(Device):
    """One function. Subclasses add their BARs and capabilities before the host takes them in.

    ``class_code`` is base class, sub-class and interface as one 24-bit number; ``subsystem`` is
    vendor and device. ``intx``: the function has an INTA# pin.
    """

    def __init__(
        self,
        name: str,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        intx: bool = False,
    ) -> None:
        self.name = name
        self.slot = -1
        self.bars: list[Bar] = []
        self.intx: IrqLine | None = None
        self.has_pin = intx
        #: Where 4 bytes of configuration space go to ``window_read``/``window_write``; 0: none.
        self.window = 0
        self._pci: Any = ffi.NULL
        self._image = bytearray(lib.VMM_PCI_CONFIG_SIZE)
        self._writable = bytearray(lib.VMM_PCI_CONFIG_SIZE)
        self._watched = bytearray(lib.VMM_PCI_CONFIG_SIZE)
        self._last_capability = 0
        self._next_capability = _FIRST_CAPABILITY
        self._put(VENDOR_ID, vendor, 2)
        self._put(VENDOR_ID + 2, device, 2)
        self._put(REVISION, class_code << 8 | revision, 4)
        self._put(SUBSYSTEM, subsystem[1] << 16 | subsystem[0], 4)
        self._put(INTERRUPT_PIN, int(intx), 1)
        # COMMAND_IO is stored, without effect: some drivers ask that it sticks.
        self._allow(COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE, 2)
        self._allow(_CACHE_LINE, 0xFFFF, 2)  # and the latency timer: stored, without effect
        self._allow(INTERRUPT_LINE, 0xFF, 1)
        self.watch(COMMAND, COMMAND_MEMORY | COMMAND_INTX_DISABLE, 2)

    # -- construction

    def plug(self, board: Board) -> None:
        board.pci.append(self)

    def _put(self, reg: int, value: int, size: int) -> None:
        self._image[reg : reg + size] = value.to_bytes(size, "little")

    def _allow(self, reg: int, bits: int, size: int) -> None:
        self._writable[reg : reg + size] = bits.to_bytes(size, "little")

    def watch(self, reg: int, bits: int, size: int) -> None:
        """Have ``config_written`` told when a guest's write changes one of these bits."""
        self._watched[reg : reg + size] = bits.to_bytes(size, "little")

    def add_bar(self, index: int, size: int, device: Device, *, wide: bool = False) -> Bar:
        """A memory BAR of ``size`` bytes (a power of two, at least 16) that ``device`` answers;
        ``wide``: 64 bits, which takes the next BAR as well."""
        if size & (size - 1) or size < 16 or not 0 <= index < BARS - int(wide):
            raise ValueError(f"{self.name}: BAR {index} of {size:#x} bytes")
        width = 8 if wide else 4
        self._put(BAR0 + 4 * index, BAR_64 if wide else 0, width)
        self._allow(BAR0 + 4 * index, (1 << (8 * width)) - size, width)
        bar = Bar(index, size, device, wide)
        self.bars.append(bar)
        return bar

    def add_capability(self, cap_id: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability; ``body`` and ``writable`` (its write mask) begin after the next
        pointer. Returns its offset in configuration space. PCI-3.0 §6.7."""
        at = self._next_capability
        end = at + 2 + len(body)
        if end > len(self._image):
            raise ValueError(f"{self.name}: no room for capability {cap_id:#x}")
        self._image[at] = cap_id
        self._image[at + 2 : end] = body
        self._writable[at + 2 : at + 2 + len(writable)] = writable
        if self._last_capability:
            self._image[self._last_capability + 1] = at
        else:
            self._image[CAPABILITIES] = at
            self._image[STATUS] |= _STATUS_CAPABILITIES
        self._last_capability = at
        self._next_capability = (end + 3) & ~3
        return at

    def attach(self, pci: Any, slot: int, line: IrqLine | None) -> None:
        """The host takes the function in: ``pci`` is its struct vmm_pci *, ``line`` what the
        slot's INTA# is wired to. Raises ValueError when the slot is taken."""
        if self.has_pin and line is not None:
            self._put(INTERRUPT_LINE, line.gsi & 0xFF, 1)
        rc = lib.vmm_pci_add(
            pci,
            slot,
            bytes(self._image),
            bytes(self._writable),
            bytes(self._watched),
            self.window,
        )
        if rc:
            raise ValueError(f"{self.name}: PCI slot {slot} is not free (error {rc})")
        self._pci, self.slot = pci, slot
        if self.has_pin and line is not None:
            self.wire(line.share())

    # -- at run time

    def config_get(self, reg: int, size: int) -> int:
        """Configuration space as it is now; ``size`` 1, 2 or 4. All ones before ``attach``."""
        if self._pci == ffi.NULL:
            return (1 << (8 * size)) - 1
        return int(lib.vmm_pci_get(self._pci, self.slot, reg, size))

    def wanted(self, bar: Bar) -> int:
        """Where the guest wants this BAR; -1 when nowhere."""
        if not self.config_get(COMMAND, 2) & COMMAND_MEMORY:
            return -1
        reg = BAR0 + 4 * bar.index
        addr = self.config_get(reg, 4) & ~0xF
        return addr | (self.config_get(reg + 4, 4) << 32 if bar.wide else 0)

    def place(self, bar: Bar, addr: int) -> None:
        """The address this BAR has after reset, and now."""
        reg, size = BAR0 + 4 * bar.index, 8 if bar.wide else 4
        self._put(reg, addr | (BAR_64 if bar.wide else 0), size)
        self.restore(reg, size)

    def restore(self, first: int = 0, size: int = lib.VMM_PCI_CONFIG_SIZE) -> None:
        """Configuration space, or a part of it in whole dwords, as it is after reset."""
        for reg in range(first, first + size, 4):
            value = int.from_bytes(self._image[reg : reg + 4], "little")
            lib.vmm_pci_set(self._pci, self.slot, reg, 4, value)

    def config_written(self, reg: int, size: int) -> None:
        """A guest changed a watched bit in [reg, reg+size)."""

    def window_read(self, offset: int, size: int) -> int:
        return (1 << (8 * size)) - 1

    def window_write(self, offset: int, size: int, value: int) -> None:
        """Dropped."""

    def on_bar_moved(self, bar: Bar) -> None:
        """``bar.addr`` changed; -1 means that it is not mapped now."""

    def wire(self, intx: IrqLine) -> None:
        """The interrupt pin is connected; the function owns its input from then on."""
        self.intx = intx

    def close(self) -> None:
        """Gives the interrupt pin back; subclasses close what they own, then this."""
        if self.intx is not None:
            self.intx.close()
            self.intx = None
