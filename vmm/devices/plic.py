"""The platform-level interrupt controller, PLIC. The model is native/plic.c."""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.device import NativeDevice
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.irq import IrqLine


class Plic(NativeDevice):
    """Level-triggered sources 1 to ``sources`` for as many contexts as there are ``outputs``.

    plic-v1.0.0. Priorities and thresholds are 0 to 7. An output is the external interrupt of
    one hart in one mode; none is owned. A source's line may be driven from any thread.
    """

    SIZE = int(lib.VMM_PLIC_SIZE)
    SOURCES_MAX = int(lib.VMM_PLIC_SOURCES)
    CONTEXTS_MAX = int(lib.VMM_PLIC_CONTEXTS)
    name = "plic"

    def __init__(self, sources: int, outputs: Sequence[IrqLine | None]) -> None:
        """Raises ConfigError, HostError."""
        if not 0 < sources <= self.SOURCES_MAX:
            raise ConfigError(f"A PLIC has from 1 to {self.SOURCES_MAX} sources, not {sources}.")
        if not 0 < len(outputs) <= self.CONTEXTS_MAX:
            raise ConfigError(
                f"A PLIC has from 1 to {self.CONTEXTS_MAX} contexts, not {len(outputs)}; ask for "
                "fewer with --cpus."
            )
        lines = [ffi.NULL if line is None else line.native for line in outputs]
        self._plic = lib.vmm_plic_create(sources, len(lines), ffi.new("struct vmm_irq *[]", lines))
        if self._plic == ffi.NULL:
            raise HostError("no memory for the PLIC", errno=ffi.errno)

    def set(self, source: int, level: bool) -> None:
        """The level of a source's line. ValueError when there is no such source."""
        if lib.vmm_plic_set(self._plic, source, int(level)):
            raise ValueError(f"the PLIC has no source {source}")

    def reset(self) -> None:
        lib.vmm_plic_reset(self._plic)

    def close(self) -> None:
        """Off every bus first, and after whatever drives a source; before the outputs."""
        if self._plic != ffi.NULL:
            lib.vmm_plic_destroy(self._plic)
            self._plic = ffi.NULL

    def native(self) -> Any:
        return lib.vmm_plic_dev(self._plic)
