"""What every device model is, whatever bus it sits on."""

from __future__ import annotations

from vmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.board import Board
    from vmm.options import Field, Options


class Device:
    """A thing the guest reads and writes.

    ``read`` and ``write`` run on a vCPU thread, one at a time per machine; offsets are relative
    to the range the machine placed the device at, values little-endian unsigned integers of
    ``size`` (1, 2, 4, 8) bytes. Nothing the guest does may raise out of them.
    """

    #: Unique in a machine; messages and --dry-run use it.
    name: str = "device"
    #: One sentence for --help; the options a user may give (vmm/options.py).
    HELP: str = ""
    OPTIONS: tuple[Field, ...] = ()
    #: What Linux shall be told on its command line when a user adds this device.
    COMMAND_LINE: str = ""
    #: Guest RAM must be memory that another process can map.
    SHARES_MEMORY: bool = False

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        """One as the user asked for it; each of OPTIONS is an attribute of ``options``. The
        board is there to look at. Raises ConfigError, HostError."""
        return cls()

    def plug(self, board: Board) -> None:
        """Take a place on the board, which owns the device from here on. For a device that a
        user may add; the others are placed by the architecture."""
        board.add(self)

    def read(self, offset: int, size: int) -> int:
        """What is not decoded reads as all ones."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """What is not decoded is dropped."""

    def reset(self) -> None:
        """Back to power-on."""

    def resumed(self) -> None:
        """The machine runs again after a pause; any thread."""

    def close(self) -> None:
        """Give back file descriptors and C objects. No thread uses the device any more."""

    def native(self) -> Any:
        """The ``struct vmm_dev *`` that answers (parts of) the range in C, or NULL."""
        return ffi.NULL

    def faults(self) -> list[str]:
        """What the guest's driver did that this device could not go on from, one sentence each."""
        return []

    def notes(self) -> list[str]:
        """What the user must know to use it, once the machine runs: the name of a pty."""
        return []

    def unclaimed(self) -> str | None:
        """After a run: one sentence if the guest never used this device though it was there
        for it, naming the kernel option that would have made the difference."""
        return None


class NativeDevice(Device):
    """A device whose registers C answers, all but a few.

    ``read`` and ``write`` ask C first, so that the device behaves the same whoever asks: a vCPU
    thread that C already sent on, the debugger, a test. What C leaves goes to ``cold_read`` and
    ``cold_write``.
    """

    def read(self, offset: int, size: int) -> int:
        data = ffi.new("uint8_t[8]")
        if lib.vmm_dev_access(self.native(), offset, size, data, 0):
            return self.cold_read(offset, size)
        return int.from_bytes(ffi.buffer(data, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        data = ffi.new("uint8_t[8]", value.to_bytes(8, "little"))
        if lib.vmm_dev_access(self.native(), offset, size, data, 1):
            self.cold_write(offset, size, value)

    def cold_read(self, offset: int, size: int) -> int:
        """What is not decoded reads as all ones."""
        return (1 << (8 * size)) - 1

    def cold_write(self, offset: int, size: int, value: int) -> None:
        """What is not decoded is dropped."""
