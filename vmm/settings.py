"""Every setting, once: flags, --help, the configuration file and the library's keywords.

A row is read by vmm/cli/parse.py (the command line), vmm/cli/help.py (help and docs/cli.md) and
vmm/config.py (MachineConfig and TOML). Add a row and, for a setting of the machine, the keyword
in MachineConfig; a test compares them.
"""

from __future__ import annotations

from vmm import catalog, disk, options, values
from vmm.errors import ConfigError
from vmm.values import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmm.device import Device
    from vmm.options import Field

#: How a flag takes its value: not at all (a switch, with a --no- twin), always, or only as
#: --flag=value.
SWITCH, VALUE, OPTIONAL = "switch", "value", "optional"

RUN = ("run",)
NESTED = ("nested",)
DOCTOR = ("doctor",)
ALL = ("run", "nested", "doctor")


class Setting:
    """One row. ``dest`` is its name in Python and, with dashes or underscores, in TOML;
    ``aliases`` are spellings of other tools that are understood too; ``path`` tells that a
    relative value depends on the directory, unless it is one of ``words``; ``machine`` that
    MachineConfig has it."""

    __slots__ = (
        "aliases", "choices", "commands", "default", "default_text", "dest", "flags", "group",
        "help", "kind", "machine", "metavar", "parse", "path", "repeatable", "types", "words",
    )  # fmt: skip

    def __init__(
        self,
        dest: str,
        flags: str,
        group: str,
        help: str,
        *,
        parse: Callable[[str], object] = values.parse_text,
        metavar: str = "",
        kind: str = VALUE,
        default: object = None,
        default_text: str = "",
        aliases: str = "",
        choices: tuple[str, ...] = (),
        repeatable: bool = False,
        path: bool = False,
        words: tuple[str, ...] = (),
        types: tuple[type, ...] = (str,),
        commands: tuple[str, ...] = RUN,
        machine: bool = True,
    ) -> None:
        self.dest = dest
        self.flags = flags.split()
        self.group = group
        self.help = help
        self.parse = parse
        self.metavar = metavar
        self.kind = kind
        self.default = default
        self.default_text = default_text
        self.aliases = aliases.split()
        self.choices = choices
        self.repeatable = repeatable
        self.path = path
        self.words = words
        self.types = (bool,) if kind == SWITCH else types
        self.commands = commands
        self.machine = machine and "run" in commands

    @property
    def name(self) -> str:
        """The flag that messages use: the long one."""
        return next(flag for flag in self.flags if flag.startswith("--"))

    def read(self, text: str, flag: str = "") -> object:
        """One value from text; the sentence of a ConfigError begins with ``flag`` and the text."""
        try:
            if self.choices and text not in self.choices:
                raise ValueError(f"must be one of {', '.join(self.choices)}")
            return self.parse(text)
        except ValueError as e:
            raise ConfigError(f"{flag or self.name} {text}: {e}") from None

    def accept(self, value: object) -> object:
        """One value given from Python: text as on the command line, or one of ``types``."""
        if value is None and self.default is None:
            return None
        if isinstance(value, str):
            return self.read(value) if self.kind != SWITCH else self._refuse(value)
        fspath = getattr(value, "__fspath__", None)
        if fspath is not None and str in self.types and (self.path or self.repeatable):
            # A path object is a file, whatever it is called: a comma, or a target's name.
            path = str(fspath())
            if path in values.TARGETS:
                path = "./" + path
            return self.read(path.replace(",", ",,") if self.dest == "disks" else path)
        if self.dest == "devices" and hasattr(value, "plug"):
            return value  # a Device, made by the caller
        if isinstance(value, self.types) and (type(value) is not bool or bool in self.types):
            return value
        return self._refuse(value)

    def _refuse(self, value: object) -> object:
        wanted = " or ".join(t.__name__ for t in self.types)
        raise ConfigError(f"{self.dest}: expected {wanted}, not {value!r}")

    def accept_all(self, value: object) -> object:
        """A whole setting given from Python: for a repeatable one a list, or one item."""
        if not self.repeatable:
            return self.accept(value)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return [self.accept(item) for item in items]

    def initial(self) -> object:
        """A fresh default."""
        return [] if self.repeatable else self.default


def _field_help(fields: Sequence[Field]) -> str:
    parts = []
    for field in fields:
        word = field.name if field.parse is None else f"{field.name}={field.metavar}"
        unsaid = (None, False, "", 0)
        default = "" if field.default in unsaid else f" (default: {_word(field.default)})"
        parts.append(f"{word}: {field.help.removesuffix('.')}{default}.")
    return " ".join(parts)


def _word(default: object) -> str:
    return "on" if default is True else str(default)


SETTINGS = (
    # ---- what boots
    Setting(
        "kernel", "-k --kernel", "Boot",
        "The kernel or payload to boot: a bzImage, an ELF vmlinux (64-bit or PVH entry, "
        "compressed or not), a multiboot payload, or flat code. For a command also: host, the "
        "newest kernel of this machine that will do; a directory where a kernel was built, or "
        "where a package of one was unpacked; a Debian package.",
        parse=values.parse_path, metavar="FILE", path=True, aliases="--kimg", words=("host",),
        default_text="host, for a command",
    ),
    Setting(
        "initrds", "-i --initrd", "Boot",
        "An initial RAM disk. Several are joined in the order given, as the kernel allows; for a "
        "multiboot payload each is a module.",
        parse=values.parse_path, metavar="FILE", path=True, repeatable=True,
    ),
    Setting(
        "append", "-a --append", "Boot",
        "Text to add to the kernel's command line, after what vmm puts there, so that it has the "
        "last word.",
        metavar="TEXT", repeatable=True, aliases="--params",
    ),
    Setting(
        "default_append", "--default-append", "Boot",
        "Put the console, panic and reboot options that a run needs on the kernel's command "
        "line. With --no-default-append the line is exactly what --append says.",
        kind=SWITCH, default=True,
    ),
    Setting(
        "boot", "--boot", "Boot",
        "How to enter the kernel, when what the file looks like is not what is wanted.",
        choices=("auto", "bzimage", "elf", "pvh", "multiboot", "flat"), default="auto",
        metavar="PROTOCOL",
    ),
    # ---- the machine
    Setting(
        "memory", "-m --memory", "Machine",
        "RAM of the guest; a plain number is MiB.",
        parse=values.parse_size, metavar="SIZE", default=512 * MIB, default_text="512M",
        types=(str, int), aliases="--mem",
    ),
    Setting(
        "cpus", "-c -p --cpus", "Machine",
        "Number of vCPUs. (-p is the number of vCPUs as in virtme-ng; kvmtool's -p is --append "
        "here.)",
        parse=values.parse_cpus, metavar="N", default=1, types=(int, str),
        aliases="-smp",
    ),
    Setting(
        "cpu", "--cpu", "Machine",
        "What CPU the guest sees: the host's as KVM supports it, with features added or taken "
        "away, as in host,-x2apic,+pcid.",
        parse=values.parse_cpu, metavar="host[,±FEATURE...]", default="host",
    ),
    Setting(
        "transport", "--transport", "Machine",
        "The bus virtio devices sit on.",
        choices=("pci", "mmio"), default="pci", metavar="BUS",
    ),
    Setting(
        "packed", "--packed", "Machine",
        "Offer virtio devices' queues in the packed format too, which a driver then prefers: "
        "one cache line a request less. Drivers know the split format better, and vhost only "
        "that one.",
        kind=SWITCH, default=False,
    ),
    Setting(
        "acpi", "--acpi", "Machine",
        "Describe the machine by ACPI tables. Leave them out for payloads only: a stock Linux "
        "without them finds no interrupt controller it can use, and hangs.",
        kind=SWITCH, default=True,
    ),
    Setting(
        "memory_backing", "--memory-backing", "Machine",
        "Where guest RAM comes from: anonymous private memory, a memfd that other processes can "
        "share, or huge pages of the host's pool. auto takes what the machine needs.",
        choices=("auto", "anon", "memfd", "hugetlb"), default="auto", metavar="KIND",
    ),
    Setting(
        "hugepages", "--hugepages", "Machine",
        "The same as --memory-backing hugetlb.",
        kind=SWITCH, default=False,
    ),
    Setting(
        "prefault", "--prefault", "Machine",
        "Touch all guest RAM before the start, so that the guest never waits for the host's "
        "memory.",
        kind=SWITCH, default=False,
    ),
    Setting(
        "name", "--name", "Machine",
        "A name for the machine, in messages and thread names.",
        metavar="NAME", default="vmm",
    ),
    # ---- a command in the guest
    Setting(
        "root", "--root", "Command",
        "Directory whose files are the guest's root. What the command writes there is kept in "
        "memory and lost, unless --rw is given. The word initrd: the files of --initrd.",
        parse=values.parse_path, metavar="DIR", path=True, words=("initrd",),
        default_text="/, for a command",
    ),
    Setting(
        "rw", "--rw", "Command",
        "Let the command change the files of --root.",
        kind=SWITCH, default=False,
    ),
    Setting(
        "rodirs", "--rodir", "Command",
        "Show a directory of this machine in the guest, at the same path or at GUEST, read-only.",
        parse=values.parse_path, metavar="HOST[:GUEST]", repeatable=True, path=True,
    ),
    Setting(
        "rwdirs", "--rwdir", "Command",
        "The same, and let the command change it.",
        parse=values.parse_path, metavar="HOST[:GUEST]", repeatable=True, path=True,
    ),
    Setting(
        "overlay_dirs", "--overlay-dir", "Command",
        "The same; what the command changes in it is kept in memory and lost.",
        parse=values.parse_path, metavar="HOST[:GUEST]", repeatable=True, path=True,
    ),
    Setting(
        "hostname", "--hostname", "Command",
        "The guest's host name.",
        metavar="NAME", default_text="that of --name",
    ),
    Setting(
        "pwd", "--pwd", "Command",
        "The directory the command starts in.",
        parse=values.parse_path, metavar="DIR", machine=False, aliases="--cwd",
        default_text="this one, if the guest has it, else /",
    ),
    Setting(
        "user", "--user", "Command",
        "Who the command runs as: a name or a number, looked up in the guest.",
        metavar="USER", machine=False, default_text="root",
    ),
    Setting(
        "env", "-e --env", "Command",
        "An environment variable for the command, besides PATH, HOME, USER, LOGNAME, SHELL and, "
        "at a terminal, TERM: KEY=VALUE, or KEY to take the value it has here.",
        metavar="KEY[=VALUE]", repeatable=True, machine=False,
    ),
    # ---- devices
    Setting(
        "disks", "-d --disk", "Devices",
        "A disk (virtio-blk); the first is /dev/vda. A comma in a value is written twice. "
        + _field_help(disk.FIELDS[1:]),
        parse=disk.parse_disk, metavar="PATH[,OPTION...]", repeatable=True,
        path=True, types=(str, disk.DiskSpec),
    ),
    Setting(
        "io_threads", "--io-threads", "Devices",
        "Which threads of the host serve disks, network cards and whatever else moves much data: "
        "the machine's one I/O thread, one for each device, or, for disks, one for each queue.",
        choices=("shared", "device", "queue"), default="device", metavar="WHICH",
    ),
    Setting(
        "io_cpus", "--io-cpus", "Devices",
        "CPUs of the host for I/O threads, as in 2-3,6; each thread is pinned to the next of them.",
        parse=values.parse_cpu_list, metavar="LIST", default="", default_text="not pinned",
    ),
    Setting(
        "io_poll", "--io-poll", "Devices",
        "Let an I/O thread of a device look for work for so many microseconds before it sleeps, "
        "while work comes that fast: less latency for CPU time.",
        parse=values.parse_count, metavar="US", default=0, types=(str, int),
    ),
    Setting(
        "devices", "--device", "Devices",
        "A device by its name: one of those below (--net user is short for --device net,user), "
        "one that an installed package offers, or a class of your own as FILE.py:CLASS or "
        "MODULE:CLASS. A comma in a value is written twice.",
        parse=catalog.parse, metavar="NAME[,OPTION...]", repeatable=True, path=True,
        types=(catalog.DeviceSpec,), aliases="-device",
    ),
    Setting(
        "rng", "--rng", "Devices",
        "A virtio source of random numbers.",
        kind=SWITCH, default=True,
    ),
    Setting(
        "pvpanic", "--pvpanic", "Devices",
        "A pvpanic device, by which a guest kernel says that it panicked.",
        kind=SWITCH, default=True,
    ),
    Setting(
        "testdev", "--testdev", "Devices",
        "The ports that payload guests written for QEMU expect: pc-testdev, isa-debug-exit "
        "(0xf4) and fw_cfg (0x510).",
        kind=SWITCH, default=False,
    ),
    # ---- consoles
    Setting(
        "serial", "--serial", "Console",
        "Where the first serial port (ttyS0) ends: stdio, pty, none (no port), buffer (kept in "
        "memory only) or a file to write to.",
        parse=values.parse_target, metavar="TARGET", default="buffer", path=True,
        default_text="stdio, unless --console is; in the library, buffer",
    ),
    Setting(
        "console", "--console", "Console",
        "Where the virtio console (hvc0) ends, by the same words. When there is one it is the "
        "kernel's main console. With a command: where the kernel's log goes.",
        parse=values.parse_target, metavar="TARGET", default="none", path=True,
    ),
    Setting(
        "console_limit", "--console-limit", "Console",
        "How large a file written by --serial or --console may grow; what comes after is "
        "counted, not kept.",
        parse=values.parse_size, metavar="SIZE", default=64 * MIB, default_text="64M",
        types=(str, int),
    ),
    # ---- the run
    Setting(
        "accel", "--accel", "Run",
        "kvm: use this host's /dev/kvm. nested: boot an appliance that has a true /dev/kvm and "
        "run in it, slower. auto: nested only when this host's KVM is missing or cannot run "
        "the kernel given.",
        choices=("auto", "kvm", "nested"), default="auto", metavar="HOW", machine=False,
    ),
    Setting(
        "timeout", "--timeout", "Run",
        "Give up after so many seconds (or 90s, 5m, 1h) with status 124; 0 is never.",
        parse=values.parse_duration, metavar="TIME", default=None, default_text="never",
        types=(str, int, float),
    ),
    Setting(
        "config", "--config", "Run",
        "Read settings from a TOML file first: the long names below, without dashes in front "
        "(memory = \"1G\", disk = [\"root.img\"]). Flags have the last word; repeatable ones add "
        "to the file's. Relative paths in the file start at its directory.",
        parse=values.parse_path, metavar="FILE", machine=False,
    ),
    # ---- looking inside
    Setting(
        "dry_run", "--dry-run", "Inspection",
        "Print the machine that would be built (memory map, command line, devices with addresses "
        "and interrupts, CPU) and stop. Needs no /dev/kvm. --dry-run=json for programs.",
        kind=OPTIONAL, metavar="FORMAT", choices=("text", "json"), machine=False,
    ),
    Setting(
        "debug_exits", "--debug-exits", "Inspection",
        "At the end, print where the guest's exits went: reason, port or address, how many, and "
        "how many of them Python answered.",
        kind=SWITCH, default=False,
    ),
    Setting(
        "verbose", "-v --verbose", "Inspection",
        "Say more on stderr about what is being done.",
        kind=SWITCH, default=False, machine=False, commands=("run", "nested"),
    ),
    Setting(
        "quiet", "-q --quiet", "Inspection",
        "Say nothing on stderr but errors.",
        kind=SWITCH, default=False, machine=False, commands=("run", "nested"),
    ),
    # ---- vmm nested: what its own machine is, not the guest's
    Setting(
        "rw", "--rw", "Machine",
        "A directory of this machine that the command may change; every other write is seen by "
        "the command alone and lost at its end.",
        parse=values.parse_path, metavar="DIR", repeatable=True, path=True, commands=NESTED,
    ),
    Setting(
        "env", "-e --env", "Machine",
        "An environment variable for the command, on top of this environment: KEY=VALUE, or KEY "
        "to take the value it has here.",
        metavar="KEY[=VALUE]", repeatable=True, commands=NESTED,
    ),
    Setting(
        "memory", "-m --memory", "Machine",
        "RAM of the appliance; a plain number is MiB.",
        parse=values.parse_size, metavar="SIZE", default_text="half of this machine's, up to 4G",
        types=(str, int), aliases="--mem", commands=NESTED,
    ),
    Setting(
        "cpus", "-c -p --cpus", "Machine",
        "Number of CPUs of the appliance.",
        parse=values.parse_cpus, metavar="N", default_text="as many as this machine, up to 2",
        types=(int, str), commands=NESTED,
    ),
    Setting(
        "kernel", "-k --kernel", "Machine",
        "The appliance's kernel: an image with its modules beside it, or a directory with "
        "boot/vmlinuz-* and lib/modules/ in it.",
        parse=values.parse_path, metavar="PATH", path=True, commands=NESTED,
        default_text="$VMM_NESTED_KERNEL, a fetched package or the newest that fits in /boot",
    ),
    Setting(
        "timeout", "--timeout", "Run",
        "Give up after so many seconds (or 90s, 5m, 1h) with status 124; 0 is never.",
        parse=values.parse_duration, metavar="TIME", default_text="never",
        types=(str, int, float), commands=NESTED,
    ),
    # ---- vmm doctor
    Setting(
        "kernel", "-k --kernel", "Checks",
        "Look at this kernel image too: what it is, and whether its configuration has what a "
        "guest of vmm needs.",
        parse=values.parse_path, metavar="FILE", path=True, commands=DOCTOR,
    ),
    Setting(
        "json", "--json", "Checks",
        "Print the findings as JSON, for programs.",
        kind=SWITCH, default=False, commands=DOCTOR,
    ),
    Setting(
        "help", "-h --help", "Inspection",
        "Print this and exit.",
        kind=SWITCH, default=False, machine=False, commands=ALL,
    ),
)  # fmt: skip


def device_setting(flag: str) -> Setting | None:
    """The row of a device of vmm's own, made from its class: ``--net`` adds to ``devices``."""
    name = flag.removeprefix("--").replace("_", "-")
    cls = catalog.builtin(name)
    if cls is None:
        return None

    def parse(text: str) -> catalog.DeviceSpec:
        return catalog.parse(f"{name},{text}" if text else name)

    fields = cls.OPTIONS
    needs = any(field.needed for field in fields)
    return Setting(
        "devices", f"--{name}", "Devices", device_help(cls), parse=parse, repeatable=True,
        metavar=options.usage(fields) or "", path=True, kind=VALUE if needs else OPTIONAL,
        default_text="", types=(catalog.DeviceSpec,),
    )  # fmt: skip


def device_help(cls: type[Device]) -> str:
    """A device's sentence and its options."""
    return f"{cls.HELP} {_field_help(cls.OPTIONS)}".strip()


def device_settings() -> list[Setting]:
    """The rows of all devices of vmm's own, for help."""
    return [row for name in catalog.builtins() if (row := device_setting(name)) is not None]


def of_command(command: str) -> list[Setting]:
    """The rows of a sub-command, in the table's order."""
    return [row for row in SETTINGS if command in row.commands]


def machine_settings() -> list[Setting]:
    """The rows that MachineConfig has."""
    return [row for row in SETTINGS if row.machine]


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` for the closest known word, or nothing when none is close."""
    import difflib

    match = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f" Did you mean {match[0]}?" if match else ""
