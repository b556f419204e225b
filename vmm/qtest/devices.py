"""QEMU's names of devices, and ours."""

from __future__ import annotations

from vmm import catalog, options
from vmm.catalog import DeviceSpec
from vmm.chardev import CharDev
from vmm.device import Device
from vmm.devices.debugexit import DebugExit
from vmm.devices.pvpanic import PvPanic
from vmm.devices.testdev import TestDev
from vmm.devices.virtio.blk import QUEUE_SIZE, Blk
from vmm.devices.virtio.console import Console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.port import Port, Ports
from vmm.devices.virtio.rng import Rng
from vmm.devices.watchdog import Watchdog
from vmm.disk import DiskSpec
from vmm.errors import ConfigError
from vmm.qtest.options import Props

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.board import Board
    from vmm.qtest.backends import Backends

#: Properties of QEMU's transports that change nothing a modern driver can rely on.
_IGNORED = (
    "acpi-index", "any_layout", "ats", "bootindex", "bus", "disable-legacy", "disable-modern",
    "event_idx", "failover", "indirect_desc", "ioeventfd", "iommu_platform", "iothread",
    "modern-pio-notify", "multifunction", "notify_on_empty", "page-per-vq", "queue_reset",
    "rombar", "romfile", "use-disabled-flag", "use-started", "vectors",
)  # fmt: skip
_BLK_IGNORED = (
    "config-wce", "discard_granularity", "min_io_size", "opt_io_size", "physical_block_size",
    "request-merging", "scsi", "seg-max-adjust", "share-rw", "write-zeroes",
)  # fmt: skip

_NET_RINGS = ("rx_queue_size", "tx_queue_size")
_NET_IGNORED = (
    "csum", "ctrl_guest_offloads", "ctrl_mac_addr", "ctrl_rx", "ctrl_rx_extra", "ctrl_vlan",
    "ctrl_vq", "duplex", "gso", "guest_announce", "guest_csum", "guest_ecn", "guest_tso4",
    "guest_tso6", "guest_ufo", "host_ecn", "host_tso4", "host_tso6", "host_ufo", "mq",
    "mrg_rxbuf", "speed", "status", "tx",
)  # fmt: skip

_PCI_SUFFIXES = ("-pci-non-transitional", "-pci-transitional", "-pci")
_MMIO_SUFFIX = "-device"
#: Ours where the name is another.
_RENAMED = {"i6300esb": "watchdog", "vhost-vsock": "vsock"}
_OPTIONS = {
    "guest-cid": "cid",
    "deflate-on-oom": "deflate_on_oom",
    "free-page-reporting": "reporting",
}
_WATCHDOG_ACTIONS = ("reset", "poweroff", "pause", "none")
_PORTS = ("virtconsole", "virtserialport")


class Wanted(DeviceSpec):
    """One -device or device_add. ``slot``: the PCI slot asked for, or -1; ``drive``: its
    backend's name, or nothing."""

    __slots__ = ("drive", "driver", "make", "name", "packed", "slot")

    def __init__(
        self, driver: str, name: str, make: Callable[[Board], Device], slot: int, drive: str = ""
    ) -> None:
        super().__init__(driver, Device, options.Options({}, name))
        self.drive = drive
        self.packed = False
        self.driver = driver
        self.name = name
        self.make = make
        self.slot = slot

    def build(self, name: str, board: Board) -> Device:
        device = self.make(board)
        device.name = self.name
        if isinstance(device, VirtioDevice):
            device.packed = self.packed
        return device


class Maker:
    """Turns properties into devices, for a machine with one kind of transport."""

    def __init__(
        self, backends: Backends, transport: str, clock: Callable[[], float], watchdog: str
    ) -> None:
        """``clock``: seconds, for devices that count them; ``watchdog``: what one does."""
        self._backends = backends
        self._clock = clock
        self._watchdog_action = watchdog
        self._transport = transport
        self._counts: dict[str, int] = {}
        #: Consoles that QMP can read and write (chardev ringbuf), by name.
        self.rings: dict[str, CharDev] = {}

    def all(self, wanted: list[Props]) -> list[Wanted]:
        """Those of a command line; the ports of a serial device follow it. Raises ConfigError."""
        parents: list[tuple[Props, list[Props]]] = []
        for props in wanted:
            if props.get("driver") in _PORTS:
                home = props.get("bus").partition(".")[0]
                fit = [p for p in parents if _family(p[0].get("driver"))[0] == "serial"]
                fit = [p for p in fit if not home or p[0].get("id") == home] or fit
                if not fit:
                    raise ConfigError(f"{props.text}: there is no virtio-serial before it.")
                fit[-1][1].append(props)
            else:
                parents.append((props, []))
        found = [self.one(props, ports) for props, ports in parents]
        for name in self._backends.plugged:
            props = Props("-drive", {"driver": "virtio-blk", "drive": name})
            found += [self.one(props)]
        names = [w.name for w in found]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"-device: two are called {name}.")
        return found

    def one(self, props: Props, ports: list[Props] | None = None) -> Wanted:
        """Raises ConfigError."""
        driver = props.take("driver")
        family, bus = _family(driver)
        if bus and bus != self._transport:
            raise ConfigError(f"-device {driver}: this machine has no {bus.upper()} bus for it.")
        slot = _slot(props.take("addr"))
        name = props.take("id") or self._name(family)
        props.drop(*_IGNORED)
        packed = props.flag_of("packed")
        drive = props.get("drive")
        make = self._maker(driver, family, props, ports or [], name)
        wanted = Wanted(driver, name, make, slot, drive)
        wanted.packed = packed
        return wanted

    def _name(self, family: str) -> str:
        nr = self._counts[family] = self._counts.get(family, -1) + 1
        return f"{family}{nr}"

    def _maker(
        self, driver: str, family: str, props: Props, ports: list[Props], name: str
    ) -> Callable[[Board], Device]:
        special = {
            "blk": self._blk,
            "rng": self._rng,
            "net": self._net,
            "pmem": self._pmem,
            "i6300esb": self._watchdog,
            "watchdog": self._watchdog,
            "isa-debug-exit": _debug_exit,
            "pvpanic": _pvpanic,
            "pc-testdev": _testdev,
        }.get(family)
        if family == "serial":
            return self._serial(props, ports, name)
        if special is not None:
            made = special(props, name)
            props.done()
            return made
        return _catalogued(driver, _RENAMED.get(family, family), props)

    def _blk(self, props: Props, name: str) -> Callable[[Board], Device]:
        drive = self._backends.drive(props.take("drive"))
        changes: dict[str, Any] = {"serial": props.take("serial")}
        queues = props.take("num-queues", "1")
        block = props.take("logical_block_size")
        try:
            changes["queues"] = 1 if queues == "auto" else int(queues, 0)
            changes["block_size"] = int(block or "0", 0)
        except ValueError:
            raise ConfigError(f"-device virtio-blk {name}: a number is none.") from None
        for key in ("werror", "rerror"):
            policy = props.take(key, "auto")
            if policy != "auto":
                changes[key] = "pause" if policy == "stop" else policy
        if not props.flag_of("discard", True):
            changes["discard"] = False
        cache = props.take("write-cache", "auto")
        if cache != "auto":
            direct = drive.spec.direct
            names = ("directsync", "none") if direct else ("writethrough", "writeback")
            changes["cache"] = names[cache == "on"]
        if props.take("queue-size", str(QUEUE_SIZE)) != str(QUEUE_SIZE):
            raise ConfigError(f"-device virtio-blk {name}: queues have {QUEUE_SIZE} entries.")
        props.drop(*_BLK_IGNORED)
        spec = DiskSpec(drive.spec.path, **{**drive.spec.keywords(), **changes})
        return lambda board: Blk(spec, name=name, uring=drive.uring)

    def _watchdog(self, props: Props, name: str) -> Callable[[Board], Device]:
        action = props.take("action", self._watchdog_action)
        action = {"shutdown": "poweroff", "debug": "none", "inject-nmi": "none"}.get(action, action)
        if action not in _WATCHDOG_ACTIONS:
            raise ConfigError(
                f"-device i6300esb: {action} is not an action; those are reset, "
                "poweroff, pause, none."
            )
        return lambda board: Watchdog(action, clock=self._clock)

    def _rng(self, props: Props, name: str) -> Callable[[Board], Device]:
        source = props.take("rng")
        if source:
            self._backends.entropy(source)
        props.drop("max-bytes", "period")
        return lambda board: Rng(name)

    def _net(self, props: Props, name: str) -> Callable[[Board], Device]:
        netdev = props.take("netdev")
        words = self._backends.net(netdev) if netdev else ["none"]
        words += [f"mac={mac}"] if (mac := props.take("mac")) else []
        mtu = props.take("host_mtu", "0")
        words += [f"mtu={mtu}"] if mtu != "0" else []
        for key in _NET_RINGS:
            size = props.take(key)
            words += [f"queue-size={size}"] if size and key == _NET_RINGS[0] else []
        props.drop(*_NET_IGNORED)
        return _ours("net", words)

    def _pmem(self, props: Props, name: str) -> Callable[[Board], Device]:
        return _ours("pmem", self._backends.memory_file(props.take("memdev")))

    def _serial(self, props: Props, ports: list[Props], name: str) -> Callable[[Board], Device]:
        props.drop("max_ports", "emergency-write")
        props.done()
        if not ports or [port.get("driver") for port in ports] == ["virtconsole"]:
            return self._console(ports, name)
        found = []
        for nr, port in enumerate(ports):
            chardev = port.take("chardev")
            target = self._backends.port_target(chardev) if chardev else None
            console = port.take("driver") == "virtconsole"
            label = port.take("name") or port.get("id") or f"{name}-{nr}"
            port.drop("id", "nr", "bus")
            port.done()
            found.append(Port(label, target, console=console))

        def make(board: Board) -> Device:
            device = Ports(name)
            try:
                for port in found:
                    device.add(port)
            except BaseException:
                device.close()
                raise
            return device

        return make

    def _console(self, ports: list[Props], name: str) -> Callable[[Board], Device]:
        """QEMU's console without other ports: ours that has one line."""
        chardev = ports[0].get("chardev") if ports else ""
        target = self._backends.console_target(chardev) if chardev else ""

        def make(board: Board) -> Device:
            if not target:
                return Console(None, None, name=name)
            line = self.rings[chardev] = CharDev(chardev, target, board.loop)
            board.consoles.append(line)
            return Console(line.stream, line.input, name=name)

        return make


def _family(driver: str) -> tuple[str, str]:
    """('blk', 'pci') of virtio-blk-pci; the bus is '' where the name leaves it open."""
    bus = ""
    for suffix in _PCI_SUFFIXES:
        if driver.endswith(suffix):
            driver, bus = driver.removesuffix(suffix), "pci"
            break
    else:
        if driver.startswith(("virtio-", "vhost-")) and driver.endswith(_MMIO_SUFFIX):
            driver, bus = driver.removesuffix(_MMIO_SUFFIX), "mmio"
    return driver.removeprefix("virtio-"), bus


def _slot(text: str) -> int:
    """QEMU's addr=SLOT[.FUNCTION], in hexadecimal. Raises ConfigError."""
    if not text:
        return -1
    slot, _, function = text.partition(".")
    try:
        found = int(slot, 16)
        if int(function or "0", 16) == 0 and 0 < found < 32:
            return found
    except ValueError:
        pass
    raise ConfigError(f"addr={text}: must be a slot from 1 to 1f, function 0.")


def _ours(name: str, words: list[str]) -> Callable[[Board], Device]:
    """A device of the catalogue with its own options. Raises ConfigError."""
    spec = catalog.parse(options.join([name, *words]))
    return lambda board: spec.build(name, board)


def _catalogued(driver: str, name: str, props: Props) -> Callable[[Board], Device]:
    """Any device of ours, with our own options."""
    cls = catalog.builtin(name) or catalog.builtin(f"virtio-{name}")
    named = {_OPTIONS.get(key, key): value for key, value in props.pairs.items()}
    words = [key if value == "on" else f"{key}={value}" for key, value in named.items()]
    text = options.join(words)
    if cls is not None:
        read = options.read(f"device {driver}", cls.OPTIONS, text)
        return lambda board: cls.from_options(read, board)
    if ":" not in driver:
        raise ConfigError(f"-device {driver}: vmm has no such device.")
    spec = catalog.parse(options.join([driver]) + ("," + text if text else ""))
    return lambda board: spec.build(driver, board)


def _debug_exit(props: Props, name: str) -> Callable[[Board], Device]:
    base = props.size("iobase", DebugExit.PORT)
    size = props.size("iosize", DebugExit.SIZE)
    if not 0 < size <= DebugExit.SIZE or not 0 <= base <= 0x10000 - size:
        raise ConfigError(f"-device isa-debug-exit: {size} ports at {base:#x} cannot be.")

    class Placed(DebugExit):
        def plug(self, board: Board) -> None:
            board.pio.insert(base, size, board.add(self))

    return lambda board: Placed(lambda status: board.on_end("debug-exit", status))


def _pvpanic(props: Props, name: str) -> Callable[[Board], Device]:
    base = props.size("ioport", PvPanic.PORT)
    props.drop("events")

    class Placed(PvPanic):
        def plug(self, board: Board) -> None:
            board.pio.insert(base, self.SIZE, board.add(self))

    return lambda board: Placed(
        lambda: board.on_end("panic", 255), lambda: board.on_end("crashloaded", 0)
    )


def _testdev(props: Props, name: str) -> Callable[[Board], Device]:
    class Placed(TestDev):
        def plug(self, board: Board) -> None:
            board.add(self).place(board.pio, board.mmio)

    return lambda board: Placed(board.irqchip)


def types() -> list[tuple[str, str]]:
    """(name, parent) of everything that -device takes, as query by qom-list-types shows it."""
    found = [
        ("isa-debug-exit", "isa-device"),
        ("pc-testdev", "isa-device"),
        ("pvpanic", "isa-device"),
        ("virtconsole", "virtserialport"),
        ("virtserialport", "device"),
    ]
    families = {"blk", "rng", "serial"}
    back = {ours: theirs for theirs, ours in _RENAMED.items()}
    for name, cls in catalog.builtins().items():
        if cls is Port:
            continue
        if hasattr(cls, "DEVICE_ID"):
            families.add(name.removeprefix("virtio-"))
        else:
            found.append((back.get(name, name), "device"))
    if "vsock" in families:
        found.append(("vhost-vsock-pci", "virtio-pci"))
    for family in families:
        found.append((f"virtio-{family}-pci", "virtio-pci"))
        found.append((f"virtio-{family}-device", "virtio-device"))
    return sorted(found)
