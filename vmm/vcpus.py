"""vCPU threads: C runs the guest, Python answers what C leaves over.

A thread's body is a loop around vmm_vcpu_run (native/vcpu.c), which returns only for an event
that is Python's. KVM_RUN, C devices, EINTR, pause and stop never touch the GIL.
"""

from __future__ import annotations

import threading
import time

from vmm._native import ffi, lib
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.kvm import Vcpu

#: Entries of a vCPU's exit history (native/vcpu.c).
HISTORY = 32
MAX_COUNTS = 512


class Registers:
    """A vCPU's general registers by the architecture's names, read when made.

    Assigning writes through to the vCPU. Only while the machine is paused or not running.
    """

    _values: dict[str, int]
    _write: Callable[[str, int], None]

    def __init__(self, values: dict[str, int], write: Callable[[str, int], None]) -> None:
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_write", write)

    def __getattr__(self, name: str) -> int:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no register {name!r}") from None

    def __setattr__(self, name: str, value: int) -> None:
        if name not in self._values:
            raise AttributeError(f"no register {name!r}")
        self._write(name, value)
        self._values[name] = value

    def names(self) -> list[str]:
        return list(self._values)

    def as_dict(self) -> dict[str, int]:
        return dict(self._values)

    def __repr__(self) -> str:
        return " ".join(f"{k}={v:#x}" for k, v in self._values.items())


class CpuThread:
    """One vCPU and the thread that runs it. Owns the vCPU's descriptor and run area."""

    def __init__(
        self,
        native_vm: Any,
        vcpu: Vcpu,
        run_size: int,
        registers: Callable[[Vcpu], Registers],
    ) -> None:
        """``registers`` reads the vCPU's."""
        self.index = vcpu.index
        self.vcpu = vcpu
        self._registers = registers
        self._native_vm = native_vm
        self._native = lib.vmm_vcpu_create(native_vm, vcpu.fd, vcpu.index, run_size)
        if self._native == ffi.NULL:
            err = ffi.errno
            raise HostError(f"The run area of vCPU {vcpu.index} could not be mapped: errno {err}")
        self._thread: threading.Thread | None = None

    def start(
        self,
        on_event: Callable[[int, Any], bool],
        on_error: Callable[[BaseException], None],
        on_end: Callable[[], None],
    ) -> None:
        """Run the guest. ``on_event(index, event)`` answers a cold exit and returns whether to go
        on; an exception of it goes to ``on_error``. ``on_end`` runs last, in any case."""

        def body() -> None:
            event = ffi.new("struct vmm_event *")
            stopped = lib.VMM_EV_STOPPED
            run = lib.vmm_vcpu_run
            native = self._native
            rc = lib.vmm_vcpu_enter(native)
            try:
                if rc:
                    raise HostError(f"vCPU {self.index} already has a thread")
                while run(native, event) != stopped and on_event(self.index, event):
                    pass
            except BaseException as e:
                on_error(e)
            finally:
                lib.vmm_vcpu_leave(native)
                on_end()

        self._thread = threading.Thread(target=body, name=f"vmm-vcpu{self.index}", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended (or never began)."""
        if self._thread is None:
            return True
        for _ in range(100):
            try:
                self._thread.join(timeout)
                return not self._thread.is_alive()
            except RuntimeError:
                # start() was interrupted, by Ctrl-C say: the thread may be on its way.
                time.sleep(0.01)
        return True

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    @property
    def regs(self) -> Registers:
        """General registers; the machine must be paused or ended."""
        return self._registers(self.vcpu)

    def history(self) -> list[Any]:
        """The last exits, oldest first: struct vmm_exit each."""
        room = ffi.new("struct vmm_exit[]", HISTORY)
        count = lib.vmm_vcpu_history(self._native, room, HISTORY)
        return _owned("struct vmm_exit *", room, count)

    def counts(self) -> list[Any]:
        """Exits by reason and address: struct vmm_exit_count each; empty unless counted."""
        room = ffi.new("struct vmm_exit_count[]", MAX_COUNTS)
        count = lib.vmm_vcpu_counts(self._native, room, MAX_COUNTS)
        return _owned("struct vmm_exit_count *", room, count)

    @property
    def exits(self) -> int:
        """Exits handled so far."""
        return int(lib.vmm_vcpu_exits(self._native))

    def close(self) -> None:
        if self._native != ffi.NULL:
            lib.vmm_vcpu_destroy(self._native)
            self._native = ffi.NULL
        self.vcpu.close()


def _owned(kind: str, array: Any, count: int) -> list[Any]:
    """Copies of the first structs of a cffi array; its items alone do not keep it alive."""
    return [ffi.new(kind, array[i])[0] for i in range(count)]
