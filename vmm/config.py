"""MachineConfig: what a machine is made of, checked as a whole before anything is built."""

from __future__ import annotations

from vmm import catalog, values
from vmm.errors import ConfigError
from vmm.settings import (
    OPTIONAL,
    SETTINGS,
    SWITCH,
    VALUE,
    Setting,
    device_setting,
    machine_settings,
    nearest,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import Self, TypeAlias

    from vmm.device import Device
    from vmm.disk import DiskSpec

    Path: TypeAlias = str | os.PathLike[str]
    Disk: TypeAlias = Path | DiskSpec
    AnyDevice: TypeAlias = str | catalog.DeviceSpec | Device
    #: What the keyword of a device takes: its options, several of them, or whether it is there.
    DeviceKeyword: TypeAlias = str | bool | Sequence[str] | None

MEMORY_MIN = 1 << 20
MEMORY_MAX = 1 << 46
CPUS_MAX = 1024
PAGE = 4096
HUGE_PAGE = 2 << 20
IO_POLL_MAX = 1_000_000
TIMEOUT_MAX = 10 * 365 * 86400.0


class MachineConfig:
    """The settings of one machine. Each keyword is a row of vmm/settings.py.

    Text means the same as on the command line (``memory="512"`` is 512 MiB); a number is in the
    plain unit (``memory=512 << 20`` is bytes, ``timeout=2.5`` seconds). A keyword nobody knows, or
    a value of the wrong type, is a ConfigError; ``validate`` checks the rest. Attributes may be
    assigned until the machine is made.
    """

    kernel: str | None
    initrds: list[str]
    append: list[str]
    default_append: bool
    boot: str
    memory: int  # bytes
    cpus: int
    cpu: str
    transport: str
    packed: bool
    acpi: bool
    memory_backing: str
    hugepages: bool
    prefault: bool
    name: str
    root: str | None
    rw: bool
    rodirs: list[str]  # HOST[:GUEST]
    rwdirs: list[str]
    overlay_dirs: list[str]
    hostname: str | None
    disks: list[DiskSpec]
    io_threads: str
    io_cpus: str
    io_poll: int  # microseconds
    devices: list[catalog.DeviceSpec | Device]
    rng: bool
    pvpanic: bool
    testdev: bool
    serial: str  # one of values.TARGETS, or a path
    console: str
    console_limit: int  # bytes
    timeout: float | None  # seconds
    debug_exits: bool

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kernel: Path | None = None,
            initrds: Sequence[Path] | Path = (),
            append: Sequence[str] | str = (),
            default_append: bool = True,
            boot: str = "auto",
            memory: str | int = ...,
            cpus: int | str = 1,
            cpu: str = "host",
            transport: str = "pci",
            packed: bool = False,
            acpi: bool = True,
            memory_backing: str = "auto",
            hugepages: bool = False,
            prefault: bool = False,
            name: str = "vmm",
            root: Path | None = None,
            rw: bool = False,
            rodirs: Sequence[Path] | Path = (),
            rwdirs: Sequence[Path] | Path = (),
            overlay_dirs: Sequence[Path] | Path = (),
            hostname: str | None = None,
            disks: Sequence[Disk] | Disk = (),
            io_threads: str = "device",
            io_cpus: str = "",
            io_poll: str | int = 0,
            devices: Sequence[AnyDevice] | AnyDevice = (),
            rng: bool = True,
            pvpanic: bool = True,
            testdev: bool = False,
            serial: Path = "buffer",
            console: Path = "none",
            console_limit: str | int = ...,
            timeout: str | float | None = None,
            debug_exits: bool = False,
            **device: DeviceKeyword,
        ) -> None: ...

    else:

        def __init__(self, **keywords):
            for row in machine_settings():
                given = row.dest in keywords
                value = row.accept_all(keywords.pop(row.dest)) if given else row.initial()
                setattr(self, row.dest, value)
            for word, value in keywords.items():
                self.devices += _device_keyword(word, value)
            if not self.timeout:
                self.timeout = None
            if self.hugepages and self.memory_backing == "auto":
                self.memory_backing = "hugetlb"

    @property
    def command_line(self) -> str:
        """What the user adds to the kernel's command line."""
        return " ".join(part for part in self.append if part)

    def as_dict(self) -> dict[str, object]:
        """Every keyword with its value; ``MachineConfig(**d)`` makes an equal one."""
        return {row.dest: getattr(self, row.dest) for row in machine_settings()}

    def replace(self, **changes: object) -> Self:
        """A copy with some keywords changed."""
        return type(self)(**{**self.as_dict(), **changes})  # type: ignore[arg-type]

    def problems(self) -> list[str]:
        """Everything that is wrong with this configuration, one sentence each."""
        found = []
        if not self.kernel and self.root is None:
            found.append("No kernel was given; say which with --kernel FILE.")
        found += _memory_problems(self) + _command_problems(self)
        if not 1 <= self.cpus <= CPUS_MAX:
            found.append(f"--cpus {self.cpus}: a machine has 1 to {CPUS_MAX} vCPUs.")
        if self.timeout is not None and not 0 < self.timeout <= TIMEOUT_MAX:
            found.append(f"--timeout {self.timeout:g}: must be more than 0 and at most ten years.")
        if self.serial == self.console == "stdio":
            found.append("--serial and --console cannot both be on stdio; choose one.")
        elif self.serial == self.console and self.serial not in values.TARGETS:
            found.append(f"--serial and --console cannot both write to {self.serial}.")
        found += [
            f"--append {part!r}: a kernel's command line is one line without NUL bytes."
            for part in self.append
            if "\0" in part or "\n" in part
        ]
        if not self.name or not self.name.isprintable():
            found.append("--name must be printable and not empty.")
        writable = [disk.path for disk in self.disks if not disk.read_only]
        for path in sorted({path for path in writable if writable.count(path) > 1}):
            found.append(
                f"--disk {path} is given twice; two writable disks on one file corrupt it."
            )
        if not 0 <= self.io_poll <= IO_POLL_MAX:
            found.append(f"--io-poll {self.io_poll}: from 0 to {IO_POLL_MAX} microseconds.")
        if self.console_limit < 0:
            found.append("--console-limit cannot be negative.")
        return found

    def validate(self) -> Self:
        """This configuration, or a ConfigError with one sentence per line for each problem."""
        found = self.problems()
        if found:
            raise ConfigError("\n".join(found))
        return self

    def to_argv(self) -> list[str]:
        """Flags of ``vmm run`` that make the same machine, from any directory."""
        argv: list[str] = []
        for row in machine_settings():
            value = getattr(self, row.dest)
            if value != row.initial():
                argv += [_flag(row, item) for item in (value if row.repeatable else [value])]
        return argv

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MachineConfig) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        changed = (
            f"{row.dest}={getattr(self, row.dest)!r}"
            for row in machine_settings()
            if getattr(self, row.dest) != row.initial()
        )
        return f"MachineConfig({', '.join(changed)})"


def _command_problems(config: MachineConfig) -> list[str]:
    found = []
    if config.root is None:
        given: dict[str, object] = {"--rw": config.rw, "--hostname": config.hostname}
        given |= {"--rodir": config.rodirs, "--rwdir": config.rwdirs}
        given |= {"--overlay-dir": config.overlay_dirs}
        flags = [flag for flag, value in given.items() if value]
        found += [f"{flag} is for a command in the guest, or with --root." for flag in flags]
    elif config.root == "initrd" and (config.rw or not config.initrds):
        found.append("--root initrd is the files of --initrd, in memory.")
    elif config.boot in ("flat", "multiboot"):
        found.append(f"--boot {config.boot}: a command needs a Linux.")
    return found


def _memory_problems(config: MachineConfig) -> list[str]:
    text = f"--memory {values.format_size(config.memory)}" if config.memory >= 0 else "--memory"
    if not MEMORY_MIN <= config.memory <= MEMORY_MAX:
        return [f"{text}: RAM must be from 1M to {values.format_size(MEMORY_MAX)}."]
    if config.hugepages and config.memory_backing != "hugetlb":
        return [f"--hugepages and --memory-backing {config.memory_backing} contradict each other."]
    unit = HUGE_PAGE if config.memory_backing == "hugetlb" else PAGE
    if config.memory % unit:
        return [f"{text}: RAM must be a multiple of {values.format_size(unit)}."]
    return []


def _device_keyword(word: str, value: object) -> list[object]:
    """``net="user"``, ``net=["user", "tap,ifname=tap0"]``, ``balloon=True``."""
    row = device_setting(word)
    if row is None:
        raise _unknown_keyword(word)
    if value is None or value is False:
        return []
    items = value if isinstance(value, (list, tuple)) else [value]
    return [row.read("" if item is True else _text(word, item)) for item in items]


def _text(word: str, item: object) -> str:
    if not isinstance(item, str):
        raise ConfigError(f"{word}: expected its options as text, True or False, not {item!r}")
    return item


def _flag(row: Setting, value: object) -> str:
    if row.dest == "devices":
        if not isinstance(value, catalog.DeviceSpec):
            raise ConfigError(
                f"{getattr(value, 'name', value)} was made in this process and cannot be handed "
                "to another; give it by --device."
            )
        return f"{row.name}={value}"
    if row.kind == SWITCH:
        return row.name if value else "--no-" + row.name[2:]
    if row.path and value not in row.words:
        value = values.absolute(value)
    if row.parse is values.parse_size and isinstance(value, int):
        value = values.format_size(value)
    elif row.parse is values.parse_duration and isinstance(value, (int, float)):
        value = values.format_duration(value)
    return f"{row.name}={value}"


def _unknown_keyword(word: str) -> ConfigError:
    hint = nearest(word, [row.dest for row in machine_settings()])
    return ConfigError(f"'{word}' is not a setting of a machine.{hint}")


def load_toml(path: str, command: str = "run") -> dict[str, object]:
    """The settings in a TOML file, by ``dest``. Raises ConfigError.

    Keys are the long flags without dashes in front, or the library's keywords. Relative paths
    start at the file's directory.
    """
    import os
    import tomllib

    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"--config {path} could not be read: {e.strerror}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"--config {path} is not valid TOML: {e}") from e
    rows = {}
    for row in SETTINGS:
        if command in row.commands and row.dest not in ("config", "help"):
            rows[row.name[2:].replace("-", "_")] = rows[row.dest] = row
    loaded: dict[str, object] = {}
    for key, value in table.items():
        found = rows.get(key.replace("-", "_")) or device_setting(key)
        if found is None:
            names = [word.replace("_", "-") for word in rows]
            raise ConfigError(
                f"{path}: '{key}' is not a setting.{nearest(key.replace('_', '-'), names)}"
            )
        read = _from_toml(path, key, found, value, os.path.dirname(path))
        if found.dest == "devices":
            loaded["devices"] = [*loaded.get("devices", []), *read]  # type: ignore[misc]
        elif found.dest in loaded:
            raise ConfigError(f"{path}: {found.dest} is set twice, under two of its names")
        else:
            loaded[found.dest] = read
    return loaded


def _toml_device(path: str, key: str, row: Setting, item: object, base: str) -> list[object]:
    """``net = "user"``, ``balloon = true``, ``device = ["net,user"]``."""
    if isinstance(item, bool) and row.name != "--device":
        item = "" if item else None
    if item is None:
        return []
    if not isinstance(item, str):
        raise ConfigError(f"{path}: {key} must be text")
    prefix = [] if row.name == "--device" else [row.name[2:]]
    return [catalog.parse(",".join([*prefix, *([item] if item else [])]), base or ".")]


def _from_toml(path: str, key: str, row: Setting, value: object, base: str) -> object:
    if row.kind == SWITCH:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {key} must be true or false")
        return value
    items = value if row.repeatable and isinstance(value, list) else [value]
    done = []
    for item in items:
        # A number means what it means on the command line.
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            item = str(item)
        if row.dest == "devices":
            done += _toml_device(path, key, row, item, base)
            continue
        if not isinstance(item, str):
            raise ConfigError(f"{path}: {key} must be {'text' if row.kind == VALUE else OPTIONAL}")
        read = row.read(item, f"{path}: {key} =")
        is_path = row.path and read not in row.words
        done.append(values.absolute(read, base or ".") if is_path else read)
    return done if row.repeatable else done[0]
