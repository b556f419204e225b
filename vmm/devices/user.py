"""Bases for devices that a user writes in Python: one on I/O ports, one with memory-mapped
registers. A device with virtqueues is in vmm/devices/virtio/python.py; docs/devices.md is the
guide.

``read`` and ``write`` (see vmm/device.py) run on the thread of the vCPU that made the access, one
at a time per machine. Whatever they raise ends the machine, and Machine.wait() raises it.
"""

from __future__ import annotations

import threading

from vmm._native import lib
from vmm.device import Device
from vmm.errors import ConfigError
from vmm.irq import IrqLine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.board import Board
    from vmm.bus import Bus


class Interrupt:
    """A device's interrupt, level-triggered. Any thread may use it at any time; once the machine
    is closed it does nothing."""

    __slots__ = ("_line", "_lock")

    def __init__(self, line: IrqLine | None = None) -> None:
        """Takes over ``line``; without one it only counts."""
        self._line: IrqLine | None = line or IrqLine(lib.VMM_IRQ_NONE)
        self._lock = threading.Lock()

    def set(self, level: bool) -> None:
        """Raise (True) or lower it. It stays up, and the guest is interrupted again and again,
        until it is lowered, which a device does when the driver says that it has seen it."""
        with self._lock:
            if self._line is not None:
                self._line.set(level)

    @property
    def level(self) -> bool:
        with self._lock:
            return self._line is not None and self._line.level

    @property
    def count(self) -> int:
        """How often it was raised."""
        with self._lock:
            return self._line.count if self._line is not None else 0

    def close(self) -> None:
        with self._lock:
            if self._line is not None:
                self._line.close()
            self._line = None


class _Placed(Device):
    """What ports and memory have in common."""

    #: How many bytes of ports or memory the device answers.
    SIZE = 0
    #: Whether it has an interrupt: ``self.irq``.
    IRQ = False
    #: What the guest's ACPI calls it (7 or 8 capitals and digits, as VMMX0001), for a driver to
    #: bind to; empty: the guest is not told of it.
    HID = ""

    @property
    def irq(self) -> Interrupt:
        """The device's interrupt. Before ``plug``, and in tests, one that only counts."""
        found = self.__dict__.get("_irq")
        if found is None:
            found = self.__dict__["_irq"] = Interrupt()
        return found

    def _place(self, board: Board, bus: Bus, base: int) -> None:
        if self.SIZE <= 0 or not 0 <= base <= bus.size - self.SIZE:
            raise ConfigError(
                f"{self.name}: {self.SIZE} bytes at {base:#x} are not on the {bus.name} bus."
            )
        hid = self.HID
        if hid and not (len(hid) in (7, 8) and hid.isalnum() and hid.isascii() and hid.isupper()):
            raise ConfigError(f"{self.name}: HID {hid!r} is not 7 or 8 capitals and digits.")
        board.add(self)
        bus.insert(base, self.SIZE, self)
        gsis = []
        if self.IRQ:
            irq = self.__dict__["_irq"] = Interrupt(board.irq_line(self.name))
            # After the device is closed: a thread of its own may raise it until then.
            board.defer(irq.close)
            gsis.append(board.wired[self.name])
        if hid:
            where = [(base, self.SIZE)]
            ports, memory = (where, []) if bus is board.pio else ([], where)
            board.announce(hid, memory=memory, ports=ports, gsis=gsis)

    def reset(self) -> None:
        """Back to power-on; the interrupt goes down."""
        self.irq.set(False)


class PioDevice(_Placed):
    """A device on I/O ports. Set PORT (the first) and SIZE; define ``read`` and ``write``.

    An access that does not lie wholly within the ports never comes here; one of 2 or 4 bytes
    that does comes as it is.
    """

    #: The first port.
    PORT = -1
    SIZE = 1

    def plug(self, board: Board) -> None:
        """Raises ConfigError when another device has one of the ports."""
        self._place(board, board.pio, self.PORT)


class MmioDevice(_Placed):
    """A device with SIZE bytes of memory-mapped registers, and an interrupt unless IRQ is False.

    Define ``read`` and ``write``. The machine chooses where the registers are (``base``, once the
    machine is built): in the order they are given. ``BASE`` asks for a place.
    """

    SIZE = 0x1000
    IRQ = True
    #: A guest-physical address of one's own choice, or None.
    BASE: int | None = None
    #: Where the registers are.
    base = -1

    def plug(self, board: Board) -> None:
        """Raises ConfigError when there is no room, or another device is at BASE."""
        self.base = board.mmio_window(self.SIZE) if self.BASE is None else self.BASE
        if self.BASE is not None and any(
            self.base < r.gpa + r.size and r.gpa < self.base + self.SIZE
            for r in board.memory.ranges
        ):
            raise ConfigError(f"{self.name}: there is RAM at {self.base:#x}; choose another BASE.")
        self._place(board, board.mmio, self.base)
