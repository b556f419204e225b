"""A machine's devices and RAM, without a processor: what qtest and QMP act on.

One thread uses it, the server's. The devices' I/O threads run beside it as they do under KVM:
``settle`` waits for them.
"""

from __future__ import annotations

import time

from vmm._native import lib
from vmm.arch.base import native_arch, native_qtest
from vmm.board import Board, Notifier
from vmm.config import MachineConfig
from vmm.devices.pci_host import PciHost
from vmm.devices.rtc import Rtc
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.device import Placement, VirtioDevice
from vmm.devices.virtio.pci import VirtioPci
from vmm.devices.watchdog import Watchdog
from vmm.errors import ConfigError
from vmm.memory import GuestMemory
from vmm.qtest.backends import Backends
from vmm.qtest.devices import Maker, Wanted
from vmm.qtest.irq import WatchedChip
from vmm.qtest.space import Space

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.chardev import CharDev
    from vmm.device import Device
    from vmm.devices.pci import PciDevice
    from vmm.irq import IrqLine
    from vmm.qtest.options import Props, Spec

#: The first ends what the I/O thread is doing, the second what it was asked meanwhile; a third
#: for what that set in motion.
_BARRIERS = 3
#: How long a disk may take until nobody waits for it any more, and between looks.
_PATIENCE_S = 1.0
_PAUSE_S = 0.0001


class QtestMachine:
    """Owns everything below it."""

    backends: Backends
    memory: GuestMemory
    board: Board
    maker: Maker
    space: Space

    def __init__(self, spec: Spec) -> None:
        """Raises ConfigError, HostError."""
        self.spec = spec
        #: What devices said happened, oldest first: (what, status). As a board has them: "reset",
        #: "poweroff", "debug-exit", "panic", "watchdog"; and "crashloaded", "pause", "io-error".
        self.ends: list[tuple[str, int]] = []
        #: What a device's own thread raised.
        self.error: BaseException | None = None
        #: Nanoseconds on the clock that clock_step moves.
        self.clock = 0
        self.plugged: dict[str, tuple[Wanted, Device]] = {}
        self._arch = native_arch()
        self._types = native_qtest()
        self._started = time.time()
        self.chip = WatchedChip(self._message)
        #: Told by query-status; there is nothing that runs.
        self.running = True
        self._rtc: Rtc | None = None
        self._read_upto: dict[str, int] = {}
        self._driven: dict[int, IrqLine] = {}
        self._closers: list[Callable[[], None]] = [self.chip.close]
        try:
            self._build()
        except ValueError as e:  # two devices in one place
            self.close()
            raise ConfigError(str(e)) from e
        except BaseException:
            self.close()
            raise

    # ---- building

    def _build(self) -> None:
        spec = self.spec
        self.backends = Backends(spec)
        self._closers.append(self.backends.close)
        watchdog = spec.action.get("watchdog", "reset")
        self.maker = Maker(self.backends, spec.transport, lambda: self.clock / 1e9, watchdog)
        asked = [spec.with_globals(props) for props in spec.devices]
        wanted = self.maker.all(asked) if spec.machine != "none" else []
        cold = wanted if spec.transport == "mmio" else []
        # What is placed behind RAM goes by its size.
        config = MachineConfig(
            memory=max([spec.memory, *(base + size for base, size in spec.ram)]),
            transport=spec.transport,
            serial=self._serial(),
            rng=False,
            pvpanic=False,
            io_threads="shared",
            packed=any(w.packed for w in cold),
            devices=[_Kept(self, w) for w in cold],
        )
        for problem in config.problems():
            if "No kernel" not in problem:
                raise ConfigError(problem)
        self.memory = GuestMemory(spec.ram or self._arch.ram_ranges(config.memory))
        self._closers.append(self.memory.close)
        self.board = Board(config, self.memory, self.chip)
        self._closers += [self.board.free, self.board.close]
        self.space = Space(self.memory, self.board.mmio)
        self.board.on_end = self._say
        self.board.on_pause = lambda: self._say("pause", 0)
        self.board.on_error = self._fail
        if spec.machine == "none":
            return
        self._arch.build(self.board)
        if spec.serial.startswith("chardev:"):
            # The console's ring of COM1, by the name it was given.
            lines = {line.name: line for line in self.board.consoles}
            self.maker.rings[spec.serial[8:]] = lines["serial"]
        if spec.transport == "pci":
            self._lay_out()
            for item in wanted:
                self._plug(item)
            self._host().place()
        if spec.virtual_clock:
            self._drive_clock()

    def _say(self, what: str, status: int) -> None:
        """Any thread."""
        self.ends.append((what, status))
        self.chip.wake()

    def _fail(self, error: BaseException) -> None:
        """A device's thread raised: our fault. Any thread."""
        self.error = error
        self.chip.wake()

    def _serial(self) -> str:
        text = self.spec.serial
        if text in ("none", "stdio", "pty"):
            return text
        if text == "null":
            return "buffer"
        if text.startswith("file:"):
            return text[5:]
        if text.startswith("chardev:"):
            return self.backends.console_target(text[8:])
        raise ConfigError(
            f"-serial {text}: must be none, null, stdio, pty, file:PATH or chardev:ID."
        )

    def _lay_out(self) -> None:
        """Configuration space and the room for base addresses, where the type has them."""
        if self.spec.machine == self._types.OWN:
            return
        host, mmio = self._host(), self.board.mmio
        at = next(base for base, _, device in mmio.ranges() if device is host.ecam)
        size = next(size for base, size, _ in mmio.ranges() if base == at)
        mmio.remove(at)
        host.set_windows([self._types.WINDOW])
        ecam = self._types.ECAM.get(self.spec.machine)
        if ecam is not None:
            if self.memory.contains(ecam, 1):
                raise ConfigError(
                    f"-m: {self.spec.machine} has its PCI configuration space at {ecam >> 20}M; "
                    "ask for less."
                )
            mmio.insert(ecam, size, host.ecam)

    def _host(self) -> PciHost:
        host = self.board.find(PciHost.name)
        if not isinstance(host, PciHost):
            raise ConfigError("This machine has no PCI bus.")
        return host

    def _slot(self, wanted: Wanted) -> int:
        """Raises ConfigError."""
        taken = self._host().devices
        if wanted.slot in taken:
            raise ConfigError(f"{wanted.name}: PCI slot {wanted.slot:x} is taken.")
        if wanted.slot > 0:
            return wanted.slot
        for slot in range(self._types.FIRST_SLOT.get(self.spec.machine, 1), 32):
            if slot not in taken:
                return slot
        raise ConfigError(f"{wanted.name}: no PCI slot is free.")

    def _plug(self, wanted: Wanted) -> None:
        if wanted.name in self.plugged or self.board.find(wanted.name) is not None:
            raise ConfigError(f"Duplicate device ID '{wanted.name}'")
        board, host = self.board, self._host()
        slot = self._slot(wanted)
        device = wanted.build("", board)
        functions, virtio = len(board.pci), len(board.virtio)
        try:
            device.plug(board)
            if len(board.virtio) > virtio and isinstance(device, VirtioDevice):
                device.placement = Placement("shared")
                device.attach(self.memory, board.loop)
                # Clients that know QEMU's devices map BARs by their use, and not one twice.
                apart = self.spec.machine != self._types.OWN
                quiet = Notifier(None)
                function = VirtioPci(device, self.memory, self.chip, quiet, msix_bar=apart)
                host.add(function, slot)
            elif len(board.pci) > functions:
                host.add(board.pci[-1], slot)
        except BaseException as e:
            del board.pci[functions:], board.virtio[virtio:]
            device.close()
            if isinstance(e, ValueError):  # its place is taken
                raise ConfigError(str(e)) from e
            raise
        self.know(wanted, device)

    def know(self, wanted: Wanted, device: Device) -> None:
        """A device is on the board."""
        self.plugged[wanted.name] = (wanted, device)
        if isinstance(device, Blk):
            device.on_io_error = lambda _, error: self._say("io-error", error)

    def resume(self) -> None:
        """What was held because the host failed is tried again."""
        self.running = True
        for _, device in self.plugged.values():
            if isinstance(device, Blk):
                device.retry()

    def _drive_clock(self) -> None:
        """The real-time clock shows what clock_step makes of the time."""
        rtc = self.board.find(Rtc.name)
        if isinstance(rtc, Rtc):
            self._rtc = rtc
            rtc.use_clock(lambda: self._started + self.clock / 1e9)

    # ---- hot-plug

    def add(self, props: Props) -> None:
        """device_add. Its base addresses are the client's to set. Raises ConfigError."""
        if self.spec.transport != "pci" or self.spec.machine == "none":
            raise ConfigError("Devices of this machine cannot be plugged while it runs.")
        self._plug(self.maker.one(self.spec.with_globals(props)))

    def remove(self, name: str) -> None:
        """device_del; the device is gone at once. KeyError, ConfigError."""
        _, device = self.plugged[name]
        function = self._function(device)
        if function is None:
            raise ConfigError(f"Device '{name}' cannot be unplugged")
        if isinstance(device, VirtioDevice):
            self.board.virtio.remove(device)
        else:
            self.board.pci.remove(function)
        self._host().remove(function)
        del self.plugged[name]

    def _function(self, device: Device) -> PciDevice | None:
        host = self.board.find(PciHost.name)
        if not isinstance(host, PciHost):
            return None
        for function in host.devices.values():
            if function is device or (
                isinstance(function, VirtioPci) and function.device is device
            ):
                return function
        return None

    def reset(self) -> None:
        """Every device to power-on; RAM stays."""
        for device in self.board.devices:
            device.reset()

    def resize(self, name: str, size: int) -> bool:
        """block_resize of a disk, by its own name or its drive's; False when there is none.
        Raises ConfigError, HostError."""
        for wanted, device in self.plugged.values():
            if isinstance(device, Blk) and name in (wanted.name, wanted.drive):
                device.resize(size)
                return True
        return False

    def printed(self, name: str, size: int) -> bytes:
        """What came out of a console since the last call."""
        start, data = self.rings[name].stream.read(self._read_upto.get(name, 0), size)
        self._read_upto[name] = start + len(data)
        return data

    @property
    def rings(self) -> dict[str, CharDev]:
        return self.maker.rings

    def press_power_button(self) -> None:
        """Raises ConfigError."""
        if self.board.power_button is None:
            raise ConfigError("This machine has no power button.")
        self.board.power_button()

    # ---- time and interrupts

    def settle(self) -> None:
        """Until the I/O thread has done what it was asked so far, and disks have answered. The
        other side of a network or a socket is not waited for."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            own = [t.native for d in self.board.virtio for t in d.io_threads()]
            for _ in range(_BARRIERS):
                for loop in (self.board.loop, *own):
                    lib.vmm_loop_barrier(loop)
            waiting = any(device.pending() for device in self.board.virtio)
            if not waiting or time.monotonic() > deadline:
                break
            time.sleep(_PAUSE_S)
        self.chip.poll()

    def step(self, ns: int) -> None:
        """Move the clock on, for the devices that go by it."""
        self.clock += ns
        if self._rtc is not None:
            self._rtc.fire()
        for _, device in self.plugged.values():
            if isinstance(device, Watchdog):
                device.advance()

    def next_event(self) -> int:
        """Nanoseconds until something is due on that clock; 0 when nothing is."""
        delay = None if self._rtc is None else self._rtc.fire()
        return 0 if delay is None else int(delay * 1e9) + 1

    def _message(self, address: int, data: int) -> None:
        """An MSI is a write of four bytes; one to RAM is seen there."""
        if self.memory.contains(address, 4):
            self.memory.write_int(address, data, 4)

    def pins(self, path: str) -> bool:
        """Whether the interrupt pins can be watched at this QOM path."""
        return path.rpartition("/")[2] in self._types.CONTROLLERS

    def drive_pin(self, pin: int, level: bool) -> None:
        """Raise or lower an interrupt pin from outside. Pins there are not: nothing happens."""
        if pin < self._types.PINS:
            if pin not in self._driven:
                self._driven[pin] = self.chip.line(pin)
                self._closers.append(self._driven[pin].close)
            self._driven[pin].set(level)

    def close(self) -> None:
        while self._closers:
            self._closers.pop()()


class _Kept(Wanted):
    """One that the platform builds itself; the machine learns of it."""

    __slots__ = ("_machine", "_of")

    def __init__(self, machine: QtestMachine, of: Wanted) -> None:
        super().__init__(of.driver, of.name, of.make, of.slot, of.drive)
        self._machine = machine
        self._of = of

    def build(self, name: str, board: Board) -> Device:
        device = super().build(name, board)
        self._machine.know(self._of, device)
        return device
