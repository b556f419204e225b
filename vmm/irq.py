"""Interrupts: lines, edges and messages, over KVM's in-kernel chips or over nothing (tests)."""

from __future__ import annotations

import os

from vmm._native import ffi, lib
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.kvm import Vm


class IrqLine:
    """One interrupt source. C code raises it through ``native`` (struct vmm_irq *)."""

    def __init__(
        self, kind: int, fd: int = -1, gsi: int = 0, *, owned_fd: int = -1, native: Any = None
    ) -> None:
        self.native = native or lib.vmm_irq_create(kind, fd, gsi)
        self.gsi = gsi
        self._owned = owned_fd

    def share(self) -> IrqLine:
        """One more input of this level-triggered line, which is up while any of its inputs is.
        From then on the line is driven through its inputs only, and outlives them."""
        return IrqLine(lib.VMM_IRQ_NONE, gsi=self.gsi, native=lib.vmm_irq_share(self.native))

    def set(self, level: bool) -> None:
        lib.vmm_irq_set(self.native, int(level))

    def pulse(self) -> None:
        lib.vmm_irq_pulse(self.native)

    @property
    def level(self) -> bool:
        return bool(lib.vmm_irq_level(self.native))

    @property
    def count(self) -> int:
        """Rising edges so far."""
        return int(lib.vmm_irq_count(self.native))

    def close(self) -> None:
        if self.native != ffi.NULL:
            lib.vmm_irq_destroy(self.native)
            self.native = ffi.NULL
        if self._owned >= 0:
            os.close(self._owned)
            self._owned = -1


class MsiVector:
    """One message-signalled interrupt: an eventfd that KVM turns into the message.

    While masked the eventfd only remembers: ``unmask`` delivers what came in between, and
    ``pending`` tells (PBA). virtio-v1.3 §4.1.5.1.2, PCI-3.0 §6.8.2.9.
    """

    def __init__(self, chip: IrqChip) -> None:
        self._chip = chip
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.irq = IrqLine(lib.VMM_IRQ_EVENTFD, self._fd)
        self.gsi = -1
        self.addr = 0
        self.data = 0
        self.masked = True
        self._stale = True  # the chip does not know addr and data yet

    def set(self, addr: int, data: int) -> None:
        """Where the message goes: 64-bit address, 32-bit data. Raises HostError when KVM refuses
        it; the vector is masked then."""
        if (addr, data) != (self.addr, self.data):
            self.addr, self.data, self._stale = addr, data, True
            if not self.masked:
                self._route()

    def unmask(self) -> None:
        """Raises HostError as ``set`` does."""
        if self.masked:
            self._route()
            self._chip._bind(self, True)
            self.masked = False
            if self._take():
                self.irq.pulse()

    def _route(self) -> None:
        if not self._stale:
            return
        try:
            self._chip._route(self)
        except HostError:
            # Left in the table it would fail every other vector's change as well.
            self.mask()
            self.addr = self.data = 0
            raise
        self._stale = False

    def mask(self) -> None:
        if not self.masked:
            self.masked = True
            self._chip._bind(self, False)

    @property
    def pending(self) -> bool:
        """An interrupt waits behind the mask."""
        if not self.masked or not self._take():
            return False
        os.eventfd_write(self._fd, 1)
        return True

    def discard(self) -> None:
        """Forget what waits behind the mask."""
        self._take()

    def _take(self) -> bool:
        try:
            return os.eventfd_read(self._fd) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.mask()
        self._chip._forget(self)
        self.irq.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        return self._fd


class IrqChip:
    """Interrupt sources of one machine. This base has no chip behind it: sources only count."""

    def line(self, gsi: int) -> IrqLine:
        """A level-triggered source on one GSI."""
        return IrqLine(lib.VMM_IRQ_NONE, gsi=gsi)

    def edge(self, gsi: int) -> IrqLine:
        """An edge-triggered source on one GSI, carried by an eventfd."""
        return IrqLine(lib.VMM_IRQ_NONE, gsi=gsi)

    def msi(self) -> MsiVector:
        return MsiVector(self)

    def _route(self, vector: MsiVector) -> None:
        pass

    def _bind(self, vector: MsiVector, on: bool) -> None:
        pass

    def _forget(self, vector: MsiVector) -> None:
        pass

    def close(self) -> None:
        pass


NullIrqChip = IrqChip


class KvmIrqChip(IrqChip):
    """KVM's own interrupt controllers. Owns the GSI routing table of the VM."""

    def __init__(self, vm: Vm, pins: list[dict[str, int]], first: int) -> None:
        """``pins`` are the routes to the controllers' pins, as ``Vm.set_gsi_routing`` takes them;
        GSIs from ``first`` on are for messages."""
        self._vm = vm
        self._pins = pins
        self._vectors: dict[int, MsiVector] = {}
        self._edges: list[tuple[int, int]] = []
        self._next = first
        self._free: list[int] = []
        vm.set_gsi_routing(self._table())

    def line(self, gsi: int) -> IrqLine:
        return IrqLine(lib.VMM_IRQ_LINE, self._vm.fd, gsi)

    def edge(self, gsi: int) -> IrqLine:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._vm.irqfd(fd, gsi)
        self._edges.append((fd, gsi))
        return IrqLine(lib.VMM_IRQ_EVENTFD, fd, gsi, owned_fd=fd)

    def _route(self, vector: MsiVector) -> None:
        if vector.gsi < 0:
            vector.gsi = self._free.pop() if self._free else self._next
            self._next = max(self._next, vector.gsi + 1)
            self._vectors[vector.gsi] = vector
        self._vm.set_gsi_routing(self._table())

    def _bind(self, vector: MsiVector, on: bool) -> None:
        self._vm.irqfd(vector.fd, vector.gsi, assign=on)

    def _forget(self, vector: MsiVector) -> None:
        if vector.gsi >= 0:
            del self._vectors[vector.gsi]
            self._free.append(vector.gsi)
            vector.gsi = -1

    def _table(self) -> list[dict[str, int]]:
        """The controllers' pins, then one entry per message."""
        return self._pins + [
            {"gsi": gsi, "msi": 1, "address": v.addr, "data": v.data}
            for gsi, v in sorted(self._vectors.items())
        ]
