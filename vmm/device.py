"""What every device model is, whatever bus it sits on."""

from __future__ import annotations

from vmm._native import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Device:
    """A thing the guest reads and writes.

    ``read`` and ``write`` run on a vCPU thread, one at a time per machine; offsets are relative
    to the range the machine placed the device at, values little-endian unsigned integers of
    ``size`` (1, 2, 4, 8) bytes. Nothing the guest does may raise out of them.
    """

    #: Unique in a machine; messages and --dry-run use it.
    name: str = "device"

    def read(self, offset: int, size: int) -> int:
        """What is not decoded reads as all ones."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """What is not decoded is dropped."""

    def reset(self) -> None:
        """Back to power-on."""

    def close(self) -> None:
        """Give back file descriptors and C objects. No thread uses the device any more."""

    def native(self) -> Any:
        """The ``struct vmm_dev *`` that answers (parts of) the range in C, or NULL."""
        return ffi.NULL

    def unclaimed(self) -> str | None:
        """After a run: one sentence if the guest never used this device though it was there
        for it, naming the kernel option that would have made the difference."""
        return None
