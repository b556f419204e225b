"""The C half of a device, for threads that may still use it when the machine closes."""

from __future__ import annotations

import threading

from vmm._native import ffi
from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.device import Device


class Lent:
    """``with lent as native:`` is the C object, which is not destroyed meanwhile; outside a machine
    that runs it raises VmmError."""

    __slots__ = ("_changed", "_device", "_users", "native")

    def __init__(self, device: Device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._users = 0
        #: For the device's own threads, which end before it closes.
        self.native: Any = ffi.NULL

    def __enter__(self) -> Any:
        with self._changed:
            if self.native == ffi.NULL:
                raise VmmError(f"{self._device.name} is not part of a running machine.")
            self._users += 1
            return self.native

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def take_back(self) -> Any:
        """Lend it no more; returns it, or NULL."""
        with self._changed:
            native, self.native = self.native, ffi.NULL
            return native

    def wait(self) -> None:
        """Until nobody uses it, after ``take_back``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
