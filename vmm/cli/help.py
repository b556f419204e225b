"""Help, written from the settings table: ``vmm CMD --help`` and docs/cli.md.

``python -m vmm.cli.help > docs/cli.md`` brings the document up to date; a test compares them.
"""

from __future__ import annotations

import textwrap

from vmm.cli import COMMANDS
from vmm.errors import ConfigError
from vmm.settings import OPTIONAL, SWITCH, Setting, device_settings, nearest, of_command

USAGE = {
    "run": "vmm run -k KERNEL [FLAG]... | vmm run [FLAG]... -- COMMAND [ARGUMENT]...",
    "nested": "vmm nested [FLAG]... [--] COMMAND [ARGUMENT]...",
    "doctor": "vmm doctor [FLAG]...",
    "qtest": "vmm qtest [QEMU FLAG]... -qtest WHERE",
    "help": "vmm help [COMMAND]",
}

ABOUT = {
    "run": "Boots a kernel or a payload in a virtual machine, with the terminal as its console. "
    "At a terminal all keys go to the guest; Ctrl-A x ends the machine, Ctrl-A a sends a "
    "Ctrl-A. With a command, runs that in the guest, with this machine's files: streams and "
    "exit status are the command's (see docs/command.md). Where this host's KVM is missing or "
    "cannot run the kernel, the same is done inside an appliance (see 'vmm help nested').",
    "nested": "Runs a command in an appliance: a Linux under QEMU's emulation that has a true "
    "/dev/kvm. The command sees this machine's files; what it writes is kept in memory and lost, "
    "but for directories given by --rw. Streams and exit status are the command's own.",
    "doctor": "Checks everything vmm needs of this machine, and says for each finding what it "
    "means and what to do. The status is 0 when a Linux guest can be booted in some way, else 1.",
    "qtest": "Builds the devices of a machine and lets a client play the driver: reads and writes "
    "of ports and memory, interrupts, QMP. Needs no KVM. The protocol and the spelling of the "
    "flags are QEMU's, so that its test programs work; see docs/qtest.md.",
    "help": "Explains a sub-command.",
}

EXAMPLES = {
    "run": (
        "vmm run -k vmlinuz -i initrd.img",
        'vmm run -k vmlinuz -d root.img,serial=root -a "root=/dev/vda rw" -m 1G -c 2',
        "vmm run -k bzImage -i test.cpio --serial boot.log --timeout 60",
        "vmm run --config vm.toml --dry-run",
        "vmm run -k bzImage -- make check",
    ),
    "nested": ("vmm nested ls -l /dev/kvm", "vmm nested --rw . -- make test"),
    "doctor": ("vmm doctor", "vmm doctor --kernel /boot/vmlinuz"),
    "qtest": ("vmm qtest -M pc -device virtio-rng-pci -qtest unix:/tmp/q,server=on",),
}

#: Exit statuses. A guest that ends by itself with one of these is told apart by the message.
STATUSES = {
    "run": (
        ("0", "the guest powered off or was reset"),
        ("0-123", "with a command: its own; 128+N: ended by signal N"),
        ("126, 127", "with a command: it could not be run, was not found"),
        ("N", "the guest ended itself with a status, by the debug exit port"),
        ("2", "wrong use: a flag, a value, the configuration file"),
        ("124", "the deadline of --timeout passed"),
        ("125", "the host or vmm failed: no KVM, no memory, a file, a kernel that cannot boot"),
        ("130, 143", "ended by Ctrl-C (or Ctrl-A x), by SIGTERM"),
        ("255", "the guest's kernel panicked, or the guest vanished or left its command"),
    ),
    "nested": (
        ("0-123", "the command's own"),
        ("128+N", "the command was ended by signal N"),
        ("126, 127", "the command could not be run, was not found"),
        ("2, 124, 125", "as 'vmm run'"),
    ),
    "doctor": (("0", "Linux can be booted here"), ("1", "it cannot, as this machine is")),
    "qtest": (
        ("0", "ended by QMP's quit, by SIGTERM, or because the client left"),
        ("N", "the debug exit port was written"),
        ("2, 125", "as 'vmm run'"),
    ),
}


def spelling(row: Setting) -> str:
    """A row's flags as --help prints them: ``-m, --memory SIZE``."""
    text = ", ".join(row.flags)
    if row.kind == SWITCH and row.default is True:
        return text.replace("--", "--[no-]")
    if row.kind == OPTIONAL:
        return f"{text}[={row.metavar}]" if row.metavar else text
    return text if row.kind == SWITCH else f"{text} {row.metavar}"


def details(row: Setting) -> str:
    """A row's help with its choices, default and other spellings."""
    text = row.help
    if row.choices and row.kind != OPTIONAL:
        text += f" One of {', '.join(row.choices)}."
    facts = []
    if row.repeatable:
        facts.append("may be repeated")
    if row.default_text:
        facts.append(f"default: {row.default_text}")
    elif row.kind == SWITCH and row.default is True:
        facts.append("default: on")
    elif row.kind != SWITCH and row.default is not None:
        facts.append(f"default: {row.default}")
    if row.aliases:
        facts.append(f"also {', '.join(row.aliases)}")
    return f"{text} ({'; '.join(facts)})" if facts else text


def sections(command: str) -> dict[str, list[tuple[str, str]]]:
    """Flags and what they mean, by heading."""
    if command == "qtest":
        from vmm.cli.qtest import FLAGS

        return {"Flags": list(FLAGS)}
    groups = _groups(command).items()
    return {group: [(spelling(row), details(row)) for row in rows] for group, rows in groups}


def _groups(command: str) -> dict[str, list[Setting]]:
    groups: dict[str, list[Setting]] = {}
    for row in of_command(command):
        groups.setdefault(row.group, []).append(row)
        if row.dest == "devices":
            groups[row.group] += device_settings()
    return groups


def _width() -> int:
    import os

    try:
        return max(50, min(100, os.get_terminal_size(1).columns))
    except OSError:
        return 80


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def of(command: str) -> str:
    """The whole help of one sub-command. Raises ConfigError for one that is not."""
    if command not in COMMANDS:
        raise ConfigError(f"'{command}' is not a command of vmm.{nearest(command, COMMANDS)}")
    parts = [f"Usage: {USAGE[command]}\n", _fill(ABOUT[command]) + "\n"]
    for group, rows in sections(command).items():
        parts.append(f"{group}:")
        parts += [f"  {flag}\n{_fill(meaning, ' ' * 8)}" for flag, meaning in rows]
        parts.append("")
    if command in EXAMPLES:
        parts += ["Examples:", *(f"  {line}" for line in EXAMPLES[command]), ""]
        parts += ["Exit status:"]
        parts += [f"  {status:<12} {meaning}" for status, meaning in STATUSES[command]]
        parts.append("")
    return "\n".join(parts)


def overview() -> str:
    """What ``vmm`` alone prints."""
    lines = ["Usage: vmm COMMAND [FLAG]...", "", "Boots Linux and payloads on KVM.", ""]
    lines += [f"  vmm {name:<8} {about}" for name, about in COMMANDS.items()]
    lines += ["", "First line to try:  vmm run -k vmlinuz -i initrd.img"]
    lines += ["'vmm COMMAND --help' lists all flags of one; 'vmm --version' the version.", ""]
    return "\n".join(lines)


def document() -> str:
    """docs/cli.md."""
    out = [
        "# The command line",
        "",
        "Written from the settings table by `python -m vmm.cli.help`; change vmm/settings.py, "
        "not this file.",
        "",
        "Values follow a flag after a space or `=`; short flags may be joined with theirs "
        "(`-m1G`). A size is a number of MiB or has a suffix (`512M`, `1.5G`); a time is in "
        "seconds or has one (`90s`, `5m`, `1h`). Every switch has a `--no-` twin. Long flags are "
        "understood with one dash too, as QEMU's are written, and are never abbreviated.",
        "",
    ]
    for command in ("run", "nested", "doctor", "qtest"):
        out += [f"## vmm {command}", "", f"`{USAGE[command]}`", "", ABOUT[command], ""]
        for group, rows in sections(command).items():
            out += [f"### {group}", "", "| flag | meaning |", "|---|---|"]
            out += [f"| `{_cell(flag)}` | {_cell(meaning)} |" for flag, meaning in rows]
            out.append("")
        out += ["### Examples", "", "```", *EXAMPLES[command], "```", ""]
        out += ["### Exit status", "", "| status | meaning |", "|---|---|"]
        out += [f"| {status} | {meaning} |" for status, meaning in STATUSES[command]]
        out.append("")
    out += [
        "## Configuration file",
        "",
        "`vmm run --config FILE` reads TOML. A key is a long flag without its dashes, or the "
        "keyword of `MachineConfig`; repeatable settings take lists; switches take booleans.",
        "",
        "```toml",
        'kernel = "vmlinuz"  # relative to this file',
        'initrd = ["initrd.img"]',
        'append = ["root=/dev/vda", "rw"]',
        'memory = "1G"',
        "cpus = 2",
        'disk = ["root.img,serial=root"]',
        "rng = false",
        "```",
        "",
        "In Python the same settings are keywords: "
        '`vmm.Machine(kernel="vmlinuz", initrds=["initrd.img"], memory="1G", cpus=2)`. Text means '
        "what it means on the command line; a number is in the plain unit (bytes, seconds).",
        "",
    ]
    return "\n".join(out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(document(), end="")
