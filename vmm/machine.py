"""One virtual machine: built, started, watched, ended.

``Machine(kernel="bzImage", memory="256M")`` holds a configuration; ``start`` builds the board and
lets the vCPU threads go; ``wait`` says how it ended. All of it may be used from any thread but a
vCPU's own, and many machines live in one process.
"""

from __future__ import annotations

import os
import threading
import time

from vmm import ending
from vmm._native import ffi, lib
from vmm.arch.base import native_arch
from vmm.board import Board
from vmm.bus import Bus
from vmm.catalog import DeviceSpec
from vmm.config import MachineConfig
from vmm.ending import End
from vmm.errors import GuestLost, HostError, VmmError
from vmm.irq import IrqChip
from vmm.kvm import Kvm, Vcpu, Vm
from vmm.memory import GuestMemory
from vmm.result import RunResult
from vmm.vcpus import CpuThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Self

    from vmm.arch.base import BootImage
    from vmm.chardev import CharDev
    from vmm.console import Console
    from vmm.device import Device
    from vmm.guest.agent import Agent
    from vmm.guest.boot import GuestBoot

PAUSE_TIMEOUT_MS = 10_000
#: After a kernel said it panics, how long it may go on printing why.
PANIC_GRACE_S = 3.0
#: Bytes that a command may write on one stream, by default.
OUTPUT_LIMIT = 256 << 20
PANIC_TEXT = (b"Kernel panic - not syncing",)


class Machine:
    """A virtual machine. Context manager: entering starts it, leaving stops and closes it."""

    def __init__(self, config: MachineConfig | None = None, **options: Any) -> None:
        """``options`` are MachineConfig's keywords, and override ``config``'s.

        Raises ConfigError; nothing of the host is touched before ``start``.
        """
        if config is None:
            config = MachineConfig(**options)
        elif options:
            config = config.replace(**options)
        config.validate()
        self.config = config
        self._arch = native_arch()
        self._lock = threading.Lock()
        #: Devices answered in Python see one access at a time.
        self._device_lock = threading.RLock()
        self._end: End | None = None
        self._error: BaseException | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._kvm: Kvm | None = None
        self._vm: Vm | None = None
        self._native: Any = ffi.NULL
        self._memory: GuestMemory | None = None
        self._chip: IrqChip | None = None
        self._board: Board | None = None
        self._image: BootImage | None = None
        self._vcpus: list[CpuThread] = []
        self._running = 0
        self._pauses = 0
        self._result: RunResult | None = None
        self._started_at = 0.0
        self._panic_seen = 0.0
        #: Where the vCPUs were when a deadline passed.
        self._late_diagnosis = ""
        self._closed = False
        #: A command in the guest may want a terminal; before ``start``.
        self.terminal_port = False
        self._guest: GuestBoot | None = None
        self._agent: Agent | None = None
        #: Held by who looks at the vCPUs, a device's thread perhaps: they are there until then.
        self._looking = threading.Lock()

    # ---- building -------------------------------------------------------------------------

    def _build_memory(self) -> GuestMemory:
        config = self.config
        backing = config.memory_backing
        if backing == "auto":
            kinds = (d.cls if isinstance(d, DeviceSpec) else d for d in config.devices)
            shared = any(kind.SHARES_MEMORY for kind in kinds)
            backing = "memfd" if shared else "anon"
        memory = GuestMemory(self._arch.ram_ranges(config.memory), backing=backing)
        memory.advise(int(lib.MADV_HUGEPAGE))
        memory.advise(int(lib.MADV_DONTDUMP))
        if config.prefault:
            memory.prefault()
        return memory

    def _full_config(self) -> MachineConfig:
        """The configuration with all that a guest that takes commands is made of."""
        config = self.config
        if config.root is not None:
            from vmm.guest.boot import GuestBoot

            self._guest = GuestBoot(config, tty=self.terminal_port)
            return self._guest.config
        return config

    def _build(self) -> None:
        kvm = self._kvm = Kvm(modules=self._arch.kvm_modules)
        kvm.require(*self._arch.required_caps)
        most = kvm.check("KVM_CAP_MAX_VCPUS")
        if self.config.cpus > most:
            raise HostError(f"--cpus {self.config.cpus}: this host's KVM allows {most} at most.")
        vm = self._vm = kvm.create_vm()
        self._chip = self._arch.create_chips(vm)
        self._memory = self._build_memory()
        vm.add_memory(self._memory.ranges)
        self._native = lib.vmm_vm_create(vm.fd, self._memory.table)
        if self._native == ffi.NULL:
            raise HostError("The VM's state could not be allocated.", errno=ffi.errno)
        lib.vmm_vm_count_exits(self._native, int(bool(self.config.debug_exits)))
        config = self._full_config()
        board = Board(config, self._memory, self._chip, vm=vm, native_vm=self._native)
        self._board = board
        board.on_end = self._guest_end
        board.on_error = self._on_error
        board.on_pause = self.pause
        board.paused = lambda: self._pauses > 0
        self._arch.build(board)
        self._image = self._arch.load(board)
        plan = self._arch.vcpu_plan(kvm, self.config)
        for index in range(self.config.cpus):
            vcpu = vm.create_vcpu(index)
            try:
                self._vcpus.append(self._cpu_thread(vcpu, kvm.vcpu_mmap_size))
            except BaseException:
                vcpu.close()
                raise
            self._arch.setup_vcpu(vcpu, plan, self._image)

    def _cpu_thread(self, vcpu: Vcpu, run_size: int) -> CpuThread:
        return CpuThread(self._native, vcpu, run_size, self._arch.registers)

    def start(self) -> Self:
        """Build the machine and let it run. Raises BootError, HostError, KvmError."""
        if self._board is not None or self._closed:
            raise VmmError("A machine starts once; make another one.")
        self._started_at = time.monotonic()
        try:
            self._build()
            self._watch_console()
            for cpu in self._vcpus:
                self._running += 1
                cpu.start(self._on_event, self._on_error, self._on_thread_end)
            if self._guest is not None:
                from vmm.guest.agent import Agent

                self._agent = Agent(self, self._guest.ports)
                self._guest.close()
        except BaseException:
            self.close()
            raise
        return self

    def _watch_console(self) -> None:
        assert self._board is not None
        for port in self._board.consoles:
            port.watch_for(PANIC_TEXT, self._wake)
            port.console.ended = self._console_ended

    def describe(self) -> dict[str, Any]:
        """What this machine would be: memory map, command line, devices. Needs no KVM."""
        memory = self._build_memory()
        board = None
        try:
            config = self._full_config()
            board = Board(config, memory, IrqChip())
            self._arch.build(board)
            image = self._arch.load(board) if config.kernel else None
            facts = self._arch.describe(board, image)
            gsis = facts.pop("interrupts", {})
            facts["devices"] = [
                {
                    "name": d.name,
                    "bus": bus.name,
                    "base": base,
                    "size": size,
                    "interrupt": gsis.get(d.name),
                }
                for bus in (board.pio, board.mmio)
                for base, size, d in bus.ranges()
            ] + facts.pop("pci", [])
            return facts
        finally:
            if board is not None:
                board.close()
            if self._guest is not None:
                self._guest.close()
            memory.close()

    # ---- what vCPU threads call -----------------------------------------------------------

    def _on_event(self, index: int, event: Any) -> bool:
        kind = event.kind
        if kind == lib.VMM_EV_MMIO or kind == lib.VMM_EV_PIO:
            assert self._board is not None
            bus: Bus = self._board.mmio if kind == lib.VMM_EV_MMIO else self._board.pio
            with self._device_lock:
                if event.is_write:
                    bus.write(event.addr, event.size, event.data)
                else:
                    event.data = bus.read(event.addr, event.size)
            return True
        self._finish(ending.by_event(index, event, self._arch.shutdown))
        return False

    def _on_error(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._halt()

    def _on_thread_end(self) -> None:
        with self._lock:
            self._running -= 1
        self._signal()

    def _guest_end(self, reason: str, status: int) -> None:
        """A device says the guest asked to end: board.on_end."""
        if reason == "watchdog":
            self._look()
        self._finish(ending.by_device(reason, status))

    def _finish(self, end: End) -> None:
        with self._lock:
            if self._end is None:
                self._end = end
        self._halt()

    def _halt(self) -> None:
        if self._native != ffi.NULL:
            lib.vmm_vm_stop(self._native)
        self._signal()

    def _signal(self) -> None:
        try:
            os.eventfd_write(self._wake, 1)
        except BlockingIOError:
            return  # full: whoever waits is awake

    # ---- what users call ------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> RunResult:
        """Until the guest ends. ``timeout`` in seconds (default: the configuration's); past it
        the guest is stopped and the result's reason is 'timeout', status 124.

        Raises what a device handler raised; a guest that ends badly is a result, not an
        exception (see RunResult.check).
        """
        import select

        if self._result is not None:
            return self._result
        if self._board is None:
            raise VmmError("The machine was not started.")
        if timeout is None:
            timeout = self.config.timeout
        deadline = None if timeout is None else self._started_at + timeout
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._ended():
            if poll.poll(self._poll_ms(deadline)):
                self._take_wake()
            self._check_panic()
            if deadline is not None and time.monotonic() >= deadline and not self._ended():
                self._finish_late(timeout or 0.0)
        self._signal()  # whoever else waits has been robbed of the event
        self._join()
        if self._error is not None:
            raise self._error
        self._result = self._make_result()
        return self._result

    def _take_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return  # another thread that waits was first

    def _ended(self) -> bool:
        with self._lock:
            return self._end is not None or self._error is not None or self._running == 0

    def _poll_ms(self, deadline: float | None) -> int | None:
        now = time.monotonic()
        times = [t - now for t in (deadline, self._panic_deadline()) if t is not None]
        return max(0, int(min(times) * 1000) + 1) if times else None

    def _panic_deadline(self) -> float | None:
        return self._panic_seen + PANIC_GRACE_S if self._panic_seen else None

    def _check_panic(self) -> None:
        """A kernel that panicked may print on for a moment; then it is over."""
        if not self._panic_seen and self._panicked():
            self._panic_seen = time.monotonic()
        late = self._panic_deadline()
        if late is not None and time.monotonic() >= late:
            self._finish(End("panic", 255, ending.PANICKED))

    def _panicked(self) -> bool:
        return any(c.matched for c in self._consoles())

    def _consoles(self) -> list[CharDev]:
        return self._board.consoles if self._board is not None else []

    def _finish_late(self, timeout: float) -> None:
        """The deadline passed."""
        self._look()
        self._finish(End("timeout", 124, f"The guest had not ended after {timeout:g} s."))

    def _look(self) -> None:
        """Where the vCPUs are, before they stop."""
        with self._looking:
            if self._closed:
                return
            try:
                self.pause()
                self._late_diagnosis = self._diagnose(None)
            except VmmError as e:
                self._late_diagnosis = f"(no registers: {e})"

    def _join(self) -> None:
        for cpu in self._vcpus:
            if cpu.is_current:
                raise VmmError("A device handler cannot wait for its own machine.")
        while not all(cpu.join(0.05) for cpu in self._vcpus):
            lib.vmm_vm_stop(self._native)

    def _make_result(self) -> RunResult:
        end = self._end or End("stopped", 0, "The machine was stopped.")
        if end.reason in ("reset", "lost", "stopped") and self._panicked():
            end = End("panic", 255, ending.PANICKED)
        return ending.result(
            end,
            self._consoles(),
            self._arch.silence,
            self._diagnose(end) if end.event is not None else self._late_diagnosis,
            self._started_at,
            int(lib.vmm_vm_first_run_ns(self._native)),
        )

    def _diagnose(self, end: End | None) -> str:
        from vmm.diagnose import diagnose

        assert self._memory is not None
        cpus = self._vcpus if end is None else [self._vcpus[end.vcpu]]
        return diagnose(
            [self._arch.snapshot(cpu.vcpu, self._memory) for cpu in cpus],
            self._memory,
            None if end is None else end.event,
            "",
            [cpu.history() for cpu in cpus],
        )

    def run(
        self,
        argv: Sequence[str] | None = None,
        *,
        input: bytes | None = b"",
        check: bool = False,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        limit: int = OUTPUT_LIMIT,
    ) -> RunResult:
        """A command in the guest of a machine that was started with a ``root``; without ``argv``
        start, wait, close.

        The result's ``status`` is the command's (128+n when signal n ended it, 126/127 as a shell
        has them) and its ``reason`` is "exited"; after ``timeout`` seconds the command is killed
        and they are 124 and "timeout". When the guest ends first they say how. With ``check``
        anything but status 0 raises CommandFailed, GuestPanic, GuestLost or GuestTimeout. All
        that the command started ends with it; files stay. ``input`` None is /dev/null.

        Raises HostError when the guest cannot run it, or it writes more than ``limit`` bytes on
        one of its streams (its pipe then breaks).
        """
        if argv is None:
            try:
                self.start()
                return self.wait()
            finally:
                self.close()
        from vmm.guest.command import Command

        command = Command(argv, env=env, cwd=cwd, user=user, place=os.getcwd())
        result = self.agent.call(command, input, timeout, limit)
        return result.check() if check else result

    @property
    def agent(self) -> Agent:
        """Carries commands to the guest. Raises VmmError when this machine takes none."""
        if self._agent is None:
            raise VmmError("Only a machine that was started with a root takes commands.")
        return self._agent

    @property
    def result(self) -> RunResult | None:
        """How the guest ended, as ``wait`` gave it; None before."""
        return self._result

    def diagnosis(self) -> str:
        """Where the vCPUs are now: registers, the instruction, the last exits; or empty. Any
        thread but a vCPU's."""
        with self._looking:
            if self._closed or not self._vcpus or self._native == ffi.NULL:
                return ""
            self.pause()
            try:
                return self._diagnose(None)
            finally:
                self.resume()

    def stop(self) -> None:
        """End the guest now, from any thread, more than once. ``wait`` then returns."""
        self._finish(End("stopped", 0, "The machine was stopped."))

    def pause(self) -> None:
        """Hold every vCPU outside the guest; nests. Raises HostError if one does not come."""
        if self._native == ffi.NULL:
            raise VmmError("The machine is not running.")
        rc = lib.vmm_vm_pause(self._native, PAUSE_TIMEOUT_MS)
        if rc:
            raise HostError("A vCPU did not stop within 10 s.", errno=-rc)
        with self._lock:
            self._pauses += 1

    def resume(self) -> None:
        """Undo one ``pause``; after the last, also what devices held back is tried again."""
        with self._lock:
            self._pauses = max(0, self._pauses - 1)
            runs = not self._pauses
        if self._native != ffi.NULL:
            lib.vmm_vm_resume(self._native)
            for device in self.devices if runs else ():
                device.resumed()

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as a computer's power button does."""
        press = self._board.power_button if self._board is not None else None
        if press is None:
            raise VmmError("This machine has no power button.")
        with self._device_lock:
            press()

    @property
    def memory(self) -> GuestMemory:
        """Guest-physical memory; see GuestMemory."""
        if self._memory is None:
            raise VmmError("The machine has no memory before it starts.")
        return self._memory

    @property
    def vcpus(self) -> list[CpuThread]:
        return self._vcpus

    @property
    def devices(self) -> list[Device]:
        """Every device, those behind a virtio transport included."""
        board = self._board
        return [*board.devices, *board.virtio] if board is not None else []

    @property
    def consoles(self) -> list[CharDev]:
        """Where the consoles go on the host, the main one last."""
        return list(self._consoles())

    @property
    def console(self) -> Console:
        """The guest's main console: the last one on its command line that exists."""
        consoles = self._consoles()
        if not consoles:
            raise VmmError("The machine has no console (or was not started).")
        return consoles[-1].console

    def _console_ended(self) -> BaseException | None:
        """For Console.expect: why nothing more will come, or None while the guest runs."""
        if not self._ended():
            return None
        if self._error is not None:
            return self._error
        end = self._end
        return GuestLost(f"The guest ended: {end.message if end else 'stopped'}")

    def exit_counts(self) -> list[tuple[str, int, bool, int, int]]:
        """(reason, address, is_write, count, of those answered by Python), most first."""
        from vmm.diagnose import exit_name

        total: dict[tuple[int, int, bool], list[int]] = {}
        for cpu in self._vcpus:
            for c in cpu.counts():
                both = total.setdefault((c.reason, c.addr, bool(c.is_write)), [0, 0])
                both[0] += c.count
                both[1] += c.cold
        rows = [(exit_name(k[0]), k[1], k[2], v[0], v[1]) for k, v in total.items()]
        return sorted(rows, key=lambda row: -row[3])

    def close(self) -> None:
        """Stop the guest and give everything back; more than once is fine."""
        if self._native != ffi.NULL:
            lib.vmm_vm_stop(self._native)
            self._join()
        if self._agent is not None:
            self._agent.close()
        if self._guest is not None:
            self._guest.close()
        with self._looking:
            self._closed = True
        for cpu in self._vcpus:
            cpu.close()
        if self._board is not None:
            self._board.close()
            self._board.free()
        if self._chip is not None:
            self._chip.close()
        if self._native != ffi.NULL:
            lib.vmm_vm_destroy(self._native)
            self._native = ffi.NULL
        for owner in (self._vm, self._kvm):
            if owner is not None:
                owner.close()
        if self._memory is not None:
            self._memory.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()
