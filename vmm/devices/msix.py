"""MSI-X: a function's own interrupt messages. PCI-3.0 §6.8.2.

The table is kept in C (native/msix.c); Python binds vectors when one goes live or stops.
"""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.device import NativeDevice
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.irq import IrqChip

#: Where the pending bits are, from the start of the table.
PBA_OFFSET = 0x1000
#: What table and pending bits take up in a BAR.
SIZE = 0x2000

CAP_ID = 0x11
# Message control, at offset 2 of the capability. PCI-3.0 §6.8.2.3.
CONTROL = 2
ENABLE = 0x8000
FUNCTION_MASK = 0x4000

_ENTRY = 16


class MsixTable(NativeDevice):
    """Table and pending bits of one function, to be put into a BAR. Owns its vectors."""

    SIZE = SIZE

    def __init__(self, name: str, chip: IrqChip, vectors: int) -> None:
        self.name = name
        self.vectors = [chip.msi() for _ in range(vectors)]
        #: Messages KVM would not take; such a vector stays masked.
        self.refused = 0
        self._table = lib.vmm_msix_create(vectors)
        if self._table == ffi.NULL:
            raise ValueError(f"{name}: {vectors} MSI-X vectors")

    def native(self) -> Any:
        return lib.vmm_msix_dev(self._table)

    def capability(self, bar: int, offset: int) -> tuple[bytes, bytes]:
        """The capability's body after id and next pointer, and its writable bits, for a table at
        ``offset`` of BAR ``bar``. PCI-3.0 §6.8.2.3."""
        body = (
            (len(self.vectors) - 1).to_bytes(2, "little")
            + (offset | bar).to_bytes(4, "little")
            + (offset + PBA_OFFSET | bar).to_bytes(4, "little")
        )
        return body, (ENABLE | FUNCTION_MASK).to_bytes(2, "little") + bytes(8)

    def set_control(self, control: int) -> None:
        """The message control word is now this."""
        lib.vmm_msix_control(
            self._table, int(bool(control & ENABLE)), int(bool(control & FUNCTION_MASK))
        )
        for index in range(len(self.vectors)):
            self._sync(index)

    def cold_read(self, offset: int, size: int) -> int:
        """Pending bits. PCI-3.0 §6.8.2.10."""
        first = (offset - PBA_OFFSET) * 8
        value = 0
        for bit in range(size * 8):
            index = first + bit
            if 0 <= index < len(self.vectors) and self.vectors[index].pending:
                value |= 1 << bit
        return value

    def cold_write(self, offset: int, size: int, value: int) -> None:
        lib.vmm_msix_write(self._table, offset, size, value)
        if offset // _ENTRY < len(self.vectors):
            self._sync(offset // _ENTRY)

    def _sync(self, index: int) -> None:
        """Let the vector do what its entry says."""
        vector = self.vectors[index]
        entry = ffi.new("struct vmm_msix_entry *")
        if lib.vmm_msix_entry(self._table, index, entry) != 1:
            vector.mask()
            return
        try:
            vector.set(entry.address, entry.data)
            vector.unmask()
        except HostError:
            self.refused += 1

    def reset(self) -> None:
        lib.vmm_msix_reset(self._table)
        for vector in self.vectors:
            vector.mask()
            vector.discard()

    def close(self) -> None:
        for vector in self.vectors:
            vector.close()
        self.vectors = []
        if self._table != ffi.NULL:
            lib.vmm_msix_destroy(self._table)
            self._table = ffi.NULL
