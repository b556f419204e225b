"""The devices of vmm's PC, where they are, and what the guest is told about them."""

from __future__ import annotations

from vmm.arch.x86_64 import acpi, aml, ioctls, layout
from vmm.board import Notifier
from vmm.chardev import CharDev
from vmm.devices.acpi_pm import AcpiPm, ResetPort
from vmm.devices.debugexit import DebugExit
from vmm.devices.i8042 import I8042
from vmm.devices.port80 import Port80
from vmm.devices.pvpanic import PvPanic
from vmm.devices.rtc import Rtc
from vmm.devices.serial import Serial
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.console import Console as VirtioConsole
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.rng import Rng
from vmm.errors import ConfigError
from vmm.values import cpu_list

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.board import Board
    from vmm.config import MachineConfig
    from vmm.devices.virtio.device import VirtioDevice

COM1, COM1_IRQ = Serial.PORTS[0]
#: Linux's name for it.
CONSOLE = "ttyS0"
RTC_IRQ = 8
SCI = 9
PM_BASE = 0x600
RESET = 0xCF9
#: virtio-mmio takes IOAPIC pins that no PC device uses; more devices than pins share them.
MMIO_GSIS = (5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
PCI_GSIS = (20, 21, 22, 23)
#: Configuration space of bus 0, the only one. PCI Express Base 3.0 §7.2.2.
ECAM_BUS = 1 << 20


def build(board: Board) -> None:
    """Everything a machine of this configuration has."""
    board.spare_memory = lambda: layout.device_memory(board.config.memory, _phys_bits(board))
    board.spare_mmio = (layout.USER_MMIO, layout.USER_MMIO_SIZE)
    # Pins that the other transport would use: an edge and a level cannot share one.
    board.spare_gsis = PCI_GSIS if board.config.transport == "mmio" else MMIO_GSIS
    _legacy(board)
    _serial(board)
    if board.config.testdev:
        _testdev(board)
    devices = _virtio_devices(board)
    if board.config.transport == "mmio":
        _on_mmio(board, devices)
    else:
        _on_pci(board, devices)


def command_line(config: MachineConfig) -> str:
    """vmm's own words first, so that the user's later ones win."""
    words = []
    if config.default_append:
        if config.serial != "none":
            words.append(f"console={CONSOLE}")
        if config.console != "none":
            words.append("console=hvc0")
        # Nothing is looked for that is not there.
        words.append("8250.nr_uarts=1")
        if config.transport == "mmio":
            words.append("pci=off")
        for wanted in config.devices:
            said = getattr(getattr(wanted, "cls", wanted), "COMMAND_LINE", "")
            if said and said not in words:
                words.append(said)
        # A panic ends the run at once, and a reboot takes the shortest way.
        words += ["panic=-1", "reboot=acpi" if config.acpi else "reboot=k"]
    return " ".join([*words, config.command_line]).strip()


def hardware(board: Board, apic_ids: Sequence[int]) -> acpi.Hardware:
    """What the ACPI tables must say of this board."""
    config = board.config
    pci = None
    if config.transport == "pci":
        pci = acpi.PciHost(
            layout.ECAM,
            0,
            (layout.PCI_MMIO32, layout.PCI_MMIO32_SIZE),
            gsis=PCI_GSIS,
            slots=1 + len(board.virtio) + len(board.pci),
        )
    return acpi.Hardware(
        apic_ids,
        pci=pci,
        virtio_mmio=[
            (base, size, _mmio_gsi((base - layout.VIRTIO_MMIO) // layout.VIRTIO_MMIO_STRIDE))
            for base, size, _ in board.mmio.ranges()
            if layout.VIRTIO_MMIO <= base < layout.IOAPIC
        ],
        serial=[(COM1, COM1_IRQ)] if config.serial != "none" else [],
        pvpanic=PvPanic.PORT if config.pvpanic else None,
        rtc=True,
        pm_base=PM_BASE,
        sci=SCI,
        extra=_announced(board),
    )


def _announced(board: Board) -> list[bytes]:
    """Devices that say of themselves what the guest shall know them by."""
    used = list(board.wired.values())
    found = []
    for nr, device in enumerate(board.announced):
        resources = [aml.memory32_fixed(base, size) for base, size in device.memory]
        for first, size in device.ports:
            # One descriptor holds 255 ports at most.
            end = first + size
            resources += [aml.io(port, min(128, end - port)) for port in range(first, end, 128)]
        resources += [
            aml.interrupt(gsi, level=True, shared=used.count(gsi) > 1) for gsi in device.gsis
        ]
        found.append(
            aml.device(
                f"U{nr:03X}",
                aml.name("_HID", aml.string(device.hid)),
                aml.name("_UID", aml.integer(nr)),
                aml.name("_CRS", aml.resources(*resources)),
            )
        )
    return found


def interrupts(board: Board) -> dict[str, str]:
    """What raises interrupts, by device name, and how. For --dry-run."""
    wired = {"serial0": COM1_IRQ, "rtc": RTC_IRQ, "acpi-pm": SCI}
    found = {d.name: f"GSI {wired[d.name]}" for d in board.devices if d.name in wired}
    found |= {name: f"GSI {gsi}" for name, gsi in board.wired.items()}
    for base, _, device in board.mmio.ranges():
        if layout.VIRTIO_MMIO <= base < layout.IOAPIC:
            slot = (base - layout.VIRTIO_MMIO) // layout.VIRTIO_MMIO_STRIDE
            found[device.name] = f"GSI {_mmio_gsi(slot)}"
    return found


def pci_functions(board: Board) -> list[dict[str, object]]:
    """Every PCI function's memory, as it is before the guest moves it. For --dry-run."""
    from vmm.devices.pci import BAR0
    from vmm.devices.pci_host import PciHost

    host = board.find(PciHost.name)
    if not isinstance(host, PciHost):
        return []
    found: list[dict[str, object]] = []
    for slot, function in host.devices.items():
        gsi = PCI_GSIS[slot % len(PCI_GSIS)]
        for bar in function.bars:
            reg = BAR0 + 4 * bar.index
            base = function.config_get(reg, 4) & ~0xF
            base |= function.config_get(reg + 4, 4) << 32 if bar.wide else 0
            found.append(
                {
                    "name": function.name,
                    "bus": "pci",
                    "base": base,
                    "size": bar.size,
                    "slot": f"00:{slot:02x}.0",
                    "interrupt": f"MSI-X or GSI {gsi}",
                }
            )
    return found


def _phys_bits(board: Board) -> int:
    """Of the guest's CPUs; without KVM what most have."""
    leaves = ioctls.supported_cpuid(board.vm.kvm) if board.vm is not None else []
    return next((leaf[3] & 0xFF for leaf in leaves if leaf[0] == 0x8000_0008), 39)


def _ends(board: Board, reason: str, status: int = 0) -> Callable[[], None]:
    return lambda: board.on_end(reason, status)


def _legacy(board: Board) -> None:
    chip, config = board.irqchip, board.config
    reset = _ends(board, "reset")
    if config.acpi:
        sci = chip.line(SCI)
        board.defer(sci.close)
        pm = board.add(AcpiPm(sci, _ends(board, "poweroff")))
        board.pio.insert(PM_BASE, AcpiPm.SIZE, pm)
        board.power_button = pm.press_power_button
    rtc_irq = chip.line(RTC_IRQ)
    board.defer(rtc_irq.close)
    board.add(Rtc(rtc_irq, config.memory)).place(board.pio)
    board.add(I8042(reset)).place(board.pio)
    board.add(Port80()).place(board.pio)
    if config.pvpanic:
        board.add(PvPanic(_ends(board, "panic", 255))).place(board.pio)


def _serial(board: Board) -> None:
    config = board.config
    if config.serial == "none":
        return
    port = CharDev("serial", config.serial, board.loop, limit=config.console_limit)
    board.consoles.append(port)
    irq = board.irqchip.line(COM1_IRQ)
    board.defer(irq.close)
    board.pio.insert(COM1, Serial.SIZE, board.add(Serial("serial0", port.stream, port.input, irq)))


def _testdev(board: Board) -> None:
    from vmm.devices.fwcfg import FwCfg
    from vmm.devices.testdev import TestDev

    config = board.config
    board.add(DebugExit(lambda status: board.on_end("debug-exit", status))).place(board.pio)
    board.add(FwCfg(config.memory, config.cpus)).place(board.pio)
    board.add(TestDev(board.irqchip)).place(board.pio, board.mmio)


def _virtio_devices(board: Board) -> list[VirtioDevice]:
    config = board.config
    devices = board.virtio
    try:
        for nr, disk in enumerate(config.disks):
            blk = Blk(disk, name=f"disk{nr}", cpus=config.cpus)
            blk.on_io_error = lambda disk, error: board.on_pause()
            devices.append(blk)
        if config.console != "none":
            port = CharDev("console", config.console, board.loop, limit=config.console_limit)
            board.consoles.append(port)
            devices.append(VirtioConsole(port.stream, port.input))
        if config.rng:
            devices.append(Rng())
        board.plug_users()
        placement = Placement(config.io_threads, cpu_list(config.io_cpus), config.io_poll)
        placement.pin(board.loop)
        for device in devices:
            device.placement = placement
            device.packed = config.packed
            device.attach(board.memory, board.loop)
    except BaseException:
        for device in devices:
            device.close()
        board.virtio = []
        raise
    return devices


def _mmio_gsi(index: int) -> int:
    return MMIO_GSIS[index % len(MMIO_GSIS)]


def _on_mmio(board: Board, devices: list[VirtioDevice]) -> None:
    from vmm.devices.virtio.mmio import VirtioMmio

    # With PCI this port lies inside the host bridge's, which passes it on.
    board.pio.insert(RESET, ResetPort.SIZE, board.add(ResetPort(_ends(board, "reset"))))
    if board.pci:
        raise ConfigError(f"{board.pci[0].name} is a PCI device; it needs --transport pci.")
    notifier = Notifier(board.vm)
    for nr, device in enumerate(devices):
        base = layout.virtio_mmio(nr)
        irq = board.irqchip.edge(_mmio_gsi(nr))
        transport = VirtioMmio(device, board.memory, irq, notifier)
        board.add(transport)
        transport.place(board.mmio, base)


def _on_pci(board: Board, devices: list[VirtioDevice]) -> None:
    from vmm.devices.pci_host import CONFIG_PORTS, CONFIG_PORTS_SIZE, PciHost
    from vmm.devices.virtio.pci import VirtioPci

    host = PciHost(
        board.mmio,
        [(layout.PCI_MMIO32, layout.PCI_MMIO32_SIZE)],
        [board.irqchip.line(gsi) for gsi in PCI_GSIS],
        reset_port=ResetPort(_ends(board, "reset")),
    )
    board.add(host)
    board.pio.insert(CONFIG_PORTS, CONFIG_PORTS_SIZE, host.ports)
    board.mmio.insert(layout.ECAM, ECAM_BUS, host.ecam)
    any_length = board.vm is not None and bool(board.vm.kvm.check("KVM_CAP_IOEVENTFD_ANY_LENGTH"))
    notifier = Notifier(board.vm, any_length=any_length)
    for device in devices:
        host.add(VirtioPci(device, board.memory, board.irqchip, notifier))
    for function in board.pci:
        host.add(function)
    host.place()
