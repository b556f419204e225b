"""QEMU's command line, as far as ``vmm qtest`` understands it.

What has no meaning without a processor or a screen (``-smp``, ``-display none``, …) is read and
dropped; what would change a device and is not supported is a ConfigError.
"""

from __future__ import annotations

import json

from vmm import options, values
from vmm.arch.base import native_qtest
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: The properties of -machine that mean nothing here; the others are refused.
_MACHINE_IGNORED = {
    "accel", "acpi", "graphics", "hpet", "i8042", "ioapic2", "isa-serial", "kernel-irqchip",
    "mem-merge", "nvdimm", "pcie", "pic", "pit", "rtc", "sata", "smbus", "smm", "usb", "vmport",
    "auto-kernel-cmdline", "dump-guest-core", "memory-backend", "suppress-vmdesc", "x-option-roms",
}  # fmt: skip

#: Flags that are read and dropped: without a value, and with one.
_SWITCHES = {
    "-nodefaults", "-no-reboot", "-no-user-config", "-nographic", "-S", "-no-hpet", "-no-acpi",
    "-no-fd-bootchk", "-no-shutdown", "-only-migratable",
}  # fmt: skip
_DROPPED = {
    "-audio", "-audiodev", "-bios", "-boot", "-compat", "-cpu", "-display", "-L", "-msg", "-name",
    "-net", "-nic", "-overcommit", "-parallel", "-pidfile", "-run-with", "-sandbox", "-seed",
    "-smbios", "-smp", "-trace", "-uuid", "-vga", "-icount", "-d", "-D",
}  # fmt: skip
#: Of those, what would ask for a thing that is not there.
_ONLY_NONE = {"-net", "-nic", "-parallel"}

MAX_JSON = 1 << 16
_PAGE = 4096


class Endpoint:
    """Where a protocol is spoken: ``kind`` is 'unix', 'tcp', 'fd' or 'stdio'."""

    __slots__ = ("address", "kind", "server")

    def __init__(self, kind: str, address: str = "", *, server: bool = False) -> None:
        self.kind = kind
        self.address = address
        self.server = server


class Props:
    """``key=value`` pairs of one option, in order. Taking one marks it as understood."""

    def __init__(self, flag: str, pairs: dict[str, str]) -> None:
        self.flag = flag
        self.pairs = pairs

    @property
    def text(self) -> str:
        parts = [f"{key}={value}" for key, value in self.pairs.items()]
        return f"{self.flag} {options.join(parts)}"

    def get(self, key: str, default: str = "") -> str:
        return self.pairs.get(key, default)

    def take(self, key: str, default: str = "") -> str:
        return self.pairs.pop(key, default)

    def flag_of(self, key: str, default: bool = False) -> bool:
        """A boolean property, taken. Raises ConfigError."""
        text = self.take(key)
        value = default if not text else options.ON.get(text)
        if value is None:
            raise ConfigError(f"{self.flag}: {key}={text} must be on or off.")
        return value

    def size(self, key: str, default: int) -> int:
        """A size in bytes (or with a suffix), taken. Raises ConfigError."""
        text = self.take(key)
        try:
            return default if not text else _size(text)
        except ValueError as e:
            raise ConfigError(f"{self.flag}: {key}={text} {e}.") from None

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.pairs.pop(key, None)

    def done(self) -> None:
        """Nothing may be left. Raises ConfigError naming what is."""
        if self.pairs:
            left = next(iter(self.pairs))
            raise ConfigError(f"{self.flag}: vmm has no property '{left}' for it.")


class Spec:
    """A command line, read."""

    def __init__(self) -> None:
        self.argv: list[str] = []
        self.machine = native_qtest().DEFAULT
        self.memory = 128 << 20
        #: RAM at other places than the machine's: (base, size) each.
        self.ram: list[tuple[int, int]] = []
        self.devices: list[Props] = []
        self.drives: list[Props] = []
        self.blockdevs: list[Props] = []
        self.chardevs: dict[str, Props] = {}
        self.netdevs: dict[str, Props] = {}
        self.objects: dict[str, Props] = {}
        self.globals: list[Props] = []
        self.serial = "none"
        self.qtest: list[str] = []
        self.qmp: list[str] = []
        self.log: str | None = None
        self.virtual_clock = False
        self.action: dict[str, str] = {}

    def with_globals(self, props: Props) -> Props:
        """A device's properties, and those that -global gives to its kind."""
        for given in self.globals:
            for key, value in given.pairs.items():
                driver, _, name = key.rpartition(".")
                if driver == props.get("driver"):
                    props.pairs.setdefault(name, value)
        return props

    @property
    def transport(self) -> str:
        return "mmio" if self.machine in native_qtest().MMIO_MACHINES else "pci"


def _size(text: str, unit: int = 1) -> int:
    try:
        return int(text, 0) * unit
    except ValueError:
        size = values.parse_size(text)
        assert isinstance(size, int)
        return size


def pairs(flag: str, text: str, first: str = "") -> Props:
    """``a,b=c,d=e``, or QEMU's JSON form. A word alone is the value of ``first`` at the start and
    a switch elsewhere. Raises ConfigError."""
    if text.startswith("{"):
        return Props(flag, _from_json(flag, text))
    found: dict[str, str] = {}
    for nr, part in enumerate(options.split(text)):
        key, equals, value = part.partition("=")
        if nr == 0 and first and not equals:
            key, value = first, part
        elif not equals:
            key, value = (key[2:], "off") if key.startswith("no") and len(key) > 4 else (key, "on")
        if not key:
            raise ConfigError(f"{flag} {text}: a property has no name.")
        found[key] = value
    return Props(flag, found)


def _from_json(flag: str, text: str) -> dict[str, str]:
    try:
        if len(text) > MAX_JSON:
            raise ValueError("too long")
        tree = json.loads(text)
        return flatten(tree)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{flag} {text[:80]}: not what QEMU's JSON form is: {e}.") from None


def flatten(tree: object, prefix: str = "") -> dict[str, str]:
    """``{"file": {"filename": "x"}}`` as ``file.filename=x``. Raises ValueError."""
    if not isinstance(tree, dict):
        raise ValueError("an object is expected")
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flatten(value, f"{name}.")
        elif isinstance(value, bool):
            found[name] = "on" if value else "off"
        elif isinstance(value, (str, int)):
            found[name] = str(value)
        else:
            raise ValueError(f"{name} has a value that no property takes")
    return found


def parse(argv: list[str]) -> Spec:
    """Raises ConfigError."""
    spec = Spec()
    spec.argv = list(argv)
    queue = list(reversed(argv))
    while queue:
        arg = queue.pop()
        flag = arg[1:] if arg.startswith("--") else arg
        if flag == "-no-reboot":
            spec.action["reboot"] = "shutdown"
        if flag in _SWITCHES:
            continue
        read = _READERS.get(flag)
        if read is None and flag not in _DROPPED:
            raise ConfigError(f"{arg} is not a flag of 'vmm qtest'. See 'vmm qtest --help'.")
        if not queue:
            raise ConfigError(f"{arg} needs a value.")
        value = queue.pop()
        if "\0" in value:
            raise ConfigError(f"{arg}: an option cannot hold a NUL byte.")
        if read is not None:
            read(spec, value)
        elif flag in _ONLY_NONE and value != "none":
            raise ConfigError(f"{arg} {value}: only 'none' is possible here; use -device.")
    return spec


def portable(argv: list[str]) -> list[str]:
    """The part of a command line that makes the machine, without who is spoken to."""
    kept: list[str] = []
    queue = list(reversed(argv))
    while queue:
        arg = queue.pop()
        flag = arg[1:] if arg.startswith("--") else arg
        words = [arg] if flag in _SWITCHES or not queue else [arg, queue.pop()]
        if flag not in ("-qtest", "-qmp", "-qtest-log", "-mon"):
            kept += words
    return kept


def machine_type(name: str) -> str:
    """One of the host's machine types. Raises ConfigError."""
    qtest = native_qtest()
    for prefix, known in qtest.MACHINE_PREFIXES:
        if name.startswith(prefix):
            name = known
    if name not in qtest.MACHINES:
        raise ConfigError(f"-machine {name}: the types are {', '.join(qtest.MACHINES)}.")
    return name


def _machine(spec: Spec, text: str) -> None:
    props = pairs("-machine", text, "type")
    if "type" in props.pairs:
        spec.machine = machine_type(props.take("type"))
    _accel(spec, props.take("accel", "qtest"))
    spec.ram = [_range(part) for part in props.take("x-ram").split("/") if part]
    props.drop(*_MACHINE_IGNORED)
    props.done()


def _range(text: str) -> tuple[int, int]:
    """BASE:SIZE of x-ram. Raises ConfigError."""
    base, _, size = text.partition(":")
    try:
        start, length = int(base, 0), int(size, 0)
    except ValueError:
        start = length = -1
    if start < 0 or length <= 0 or (start | length) % _PAGE or start + length > 1 << 52:
        raise ConfigError(f"-machine x-ram={text}: must be BASE:SIZE in bytes, whole pages.")
    return start, length


def _accel(spec: Spec, text: str) -> None:
    if text.partition(",")[0] != "qtest":
        raise ConfigError(f"-accel {text}: there is no processor here; only qtest is possible.")


def _memory(spec: Spec, text: str) -> None:
    props = pairs("-m", text, "size")
    size = props.take("size", "128")
    try:
        # A number alone is MiB, in hexadecimal too.
        spec.memory = _size(size, 1 << 20) if size[-1:].isdigit() else _size(size)
    except ValueError as e:
        raise ConfigError(f"-m {text}: {e}.") from None
    props.drop("slots", "maxmem")
    props.done()


def _named(place: str, flag: str, first: str) -> Callable[[Spec, str], None]:
    def read(spec: Spec, text: str) -> None:
        props = pairs(flag, text, first)
        known: dict[str, Props] = getattr(spec, place)
        name = props.take("id")
        if not name:
            raise ConfigError(f"{flag} {text}: id=NAME is missing.")
        if name in known:
            raise ConfigError(f"{flag} {text}: there is one called {name} already.")
        known[name] = props

    return read


def _listed(place: str, flag: str, first: str) -> Callable[[Spec, str], None]:
    return lambda spec, text: getattr(spec, place).append(pairs(flag, text, first))


def _mon(spec: Spec, text: str) -> None:
    props = pairs("-mon", text, "chardev")
    if props.take("mode", "readline") != "control":
        raise ConfigError(f"-mon {text}: only mode=control, which is QMP, is possible.")
    props.drop("pretty", "id")
    spec.qmp.append("chardev:" + props.take("chardev"))
    props.done()


def _qtest_log(spec: Spec, text: str) -> None:
    spec.log = text


def _monitor(spec: Spec, text: str) -> None:
    if text not in ("none", "null"):
        raise ConfigError(f"-monitor {text}: there is only QMP; use -qmp.")


def _serial(spec: Spec, text: str) -> None:
    spec.serial = text


def _rtc(spec: Spec, text: str) -> None:
    props = pairs("-rtc", text, "base")
    spec.virtual_clock = props.take("clock", "host") == "vm"


def _action(spec: Spec, text: str) -> None:
    spec.action |= pairs("-action", text).pairs


def _watchdog(spec: Spec, text: str) -> None:
    spec.action["watchdog"] = text


_READERS: dict[str, Callable[[Spec, str], None]] = {
    "-machine": _machine,
    "-M": _machine,
    "-accel": _accel,
    "-m": _memory,
    "-device": _listed("devices", "-device", "driver"),
    "-drive": _listed("drives", "-drive", "file"),
    "-blockdev": _listed("blockdevs", "-blockdev", "driver"),
    "-chardev": _named("chardevs", "-chardev", "backend"),
    "-netdev": _named("netdevs", "-netdev", "type"),
    "-object": _named("objects", "-object", "qom-type"),
    "-global": _listed("globals", "-global", "driver"),
    "-serial": _serial,
    "-monitor": _monitor,
    "-mon": _mon,
    "-qmp": lambda spec, text: spec.qmp.append(text),
    "-qtest": lambda spec, text: spec.qtest.append(text),
    "-qtest-log": _qtest_log,
    "-rtc": _rtc,
    "-action": _action,
    "-watchdog-action": _watchdog,
}


def endpoint(spec: Spec, flag: str, text: str) -> Endpoint | None:
    """``unix:PATH[,server=on]``, ``tcp:HOST:PORT``, ``fd:N``, ``stdio``, ``chardev:ID``; None for
    ``none`` and ``null``. Raises ConfigError."""
    if text in ("none", "null"):
        return None
    if text.startswith("chardev:"):
        return _chardev_endpoint(spec, flag, text[8:])
    kind, _, rest = text.partition(":")
    if kind == "stdio":
        return Endpoint("stdio")
    words = options.split(rest)
    props = pairs(flag, ",".join(["x", *words[1:]]), "x")
    # QEMU's older words: "server,nowait".
    props.drop("x", "wait", "wa")
    server = props.flag_of("server")
    props.done()
    if kind not in ("unix", "tcp", "fd") or not words[0]:
        raise ConfigError(f"{flag} {text}: must be unix:PATH, tcp:HOST:PORT, fd:N or stdio.")
    return Endpoint(kind, words[0], server=server)


def _chardev_endpoint(spec: Spec, flag: str, name: str) -> Endpoint | None:
    props = spec.chardevs.get(name)
    if props is None:
        raise ConfigError(f"{flag}: there is no -chardev with id={name}.")
    backend = props.get("backend")
    if backend == "null":
        return None
    if backend == "stdio":
        return Endpoint("stdio")
    if backend != "socket":
        raise ConfigError(f"{flag}: chardev {name} must be a socket, not {backend}.")
    server = props.flag_of("server")
    if props.get("path"):
        return Endpoint("unix", props.get("path"), server=server)
    if props.get("fd"):
        return Endpoint("fd", props.get("fd"), server=server)
    return Endpoint("tcp", f"{props.get('host') or '127.0.0.1'}:{props.get('port')}", server=server)
