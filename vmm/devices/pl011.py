"""PL011 serial port. The model is native/pl011.c; accesses never reach Python on a vCPU thread."""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.device import NativeDevice
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.chario import Input, Stream
    from vmm.irq import IrqLine


class Pl011(NativeDevice):
    """One port: output to a stream, input from an input, interrupts on a level-triggered line.

    Arm DDI 0183G. None of the three is owned. FR.TXFF is set while the stream has no room, so a
    guest is held back, not memory grown.
    """

    SIZE = 0x1000

    def __init__(
        self, name: str, out: Stream | None, inp: Input | None = None, irq: IrqLine | None = None
    ) -> None:
        self.name = name
        self._uart = lib.vmm_pl011_create(
            out.native if out else ffi.NULL,
            inp.native if inp else ffi.NULL,
            irq.native if irq else ffi.NULL,
        )
        if self._uart == ffi.NULL:
            raise HostError(f"no memory for serial port {name}")

    def reset(self) -> None:
        lib.vmm_pl011_reset(self._uart)

    def close(self) -> None:
        """Off every bus first; before the stream, the input and the line are closed."""
        if self._uart != ffi.NULL:
            lib.vmm_pl011_destroy(self._uart)
            self._uart = ffi.NULL

    def native(self) -> Any:
        return lib.vmm_pl011_dev(self._uart)

    def stats(self) -> dict[str, int]:
        """Counts: tx and rx bytes, dropped, accesses."""
        s = ffi.new("struct vmm_pl011_stats *")
        lib.vmm_pl011_stats(self._uart, s)
        return {
            "tx": int(s.tx),
            "rx": int(s.rx),
            "dropped": int(s.dropped),
            "accesses": int(s.accesses),
        }

    def unclaimed(self) -> str | None:
        if self.stats()["accesses"]:
            return None
        return (
            f"{self.name}: the guest never touched its serial port; a Linux kernel needs "
            "CONFIG_SERIAL_AMBA_PL011_CONSOLE=y and console=ttyAMA0 on its command line"
        )
